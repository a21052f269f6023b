"""`torchrun --nproc-per-node=2 -m tests.support.counted_traffic`: collectives of a scoring pass and an update.

Rank 0 prints a JSON list: for every case, how often each kind of collective ran on tensors of a micro-batch's hidden
states.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.batch import pack
from entcov.rl.config import ActorConfig, MegatronConfig
from entcov.rl.types import Example, Prompt, Rollout
from megatron_integration.actor import MegatronActor
from megatron_integration.bridge import build_model, load_hf_weights, make_bridge
from megatron_integration.process_groups import make_process_groups, start_processes

LAYERS, HIDDEN, TOKENS = 3, 32, 24
CASES = [
    {"sequence_parallel": False},
    {"sequence_parallel": True},
    {"sequence_parallel": True, "recompute": "full"},
]
KINDS = {
    "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts collectives on tensors as large as a micro-batch's hidden states: smaller ones are other traffic."""

    def __init__(self):
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = KINDS.get(func._schema.name.removeprefix("c10d::"))
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            if kind and max(sizes, default=0) == TOKENS * HIDDEN:
                self.found[kind] += 1
        return func(*args, **(kwargs or {}))


def batch():
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for uid, length in enumerate((10, 14)):  # TOKENS in all
        tokens = torch.randint(0, 128, (length,), generator=generator).tolist()
        prompt = Prompt(uid, Example("x", ({"role": "user", "content": "x"},), "1"), tuple(tokens[:4]))
        response = tokens[4:]
        rollouts.append(Rollout(prompt, 0, response, [-1.0] * len(response), True, 0, reward=1.0))
    packed = pack(rollouts)
    packed.assign_advantages(torch.tensor([1.0, 0.0]))
    return packed


@contextmanager
def _shared_folder() -> Iterator[str]:
    """A folder of rank 0's that all ranks see, until the last of them has left."""
    with tempfile.TemporaryDirectory() as folder:
        name = [folder]
        dist.broadcast_object_list(name)
        yield name[0]
        dist.barrier()


def count(case: dict, device: torch.device) -> dict:
    megatron = MegatronConfig(tensor_parallel=2, **case)
    layout = make_process_groups(megatron, device)
    with _shared_folder() as folder:
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        if dist.get_rank() == 0:
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        dist.barrier()
        bridge = make_bridge(folder, megatron, layout, dtype=torch.float32)
        model = build_model(bridge, layout)
        load_hf_weights(bridge, model, folder, layout)
    settings = ActorConfig(micro_batch_tokens=TOKENS, packing=True)
    actor = MegatronActor(model, bridge, layout, settings, megatron, PolicyLossConfig(), [], temperature=1.0)
    work = batch()
    with Counting() as scoring:
        work.assign_scores(actor.compute_logprobs(work), 0)
    with Counting() as updating:
        actor.update(work, step=1)
    layout.destroy()
    return {"case": case, "score": scoring.found, "update": updating.found}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = start_processes("cpu")
    results = [count(case, place) for case in CASES]
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()
