"""verl's real TrainingWorker with FSDP2 and a tiny Qwen2 on a CPU: what the tests of the verl plug-in drive.

`start` makes this process a rank of a gloo group and verl believe in a platform "cpu"; nothing else here imports verl
before. Then `make_worker` builds a worker, `rollout` a batch of responses with fixed random content, `score` fills in
the log-probabilities as verl's trainer does, and `train` runs verl's train_mini_batch on it.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

PROMPT, RESPONSE, VOCABULARY = 5, 6, 100  # most tokens of a prompt and of a response, and of the vocabulary
_FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank: int = 0, world: int = 1, port: int | None = None) -> None:
    """Makes this process rank `rank` of a gloo group of `world`. A second call does nothing."""
    if dist.is_initialized():
        return
    ranks = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()}
    os.environ |= {name: str(value) for name, value in (ranks | address).items()}
    os.environ |= {"VERL_PLATFORM": "cpu", "VERL_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    register_platform()
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    import entcov.integrations.verl  # noqa: F401  verl's own discovery does it where entcov is installed

    if "cpu" not in EngineRegistry._engines["language_model"]["fsdp2"]:
        register = EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
        register(FSDPEngineWithLMHead)


def register_platform() -> None:
    """Adds a platform "cpu" to verl's, which has GPUs and NPUs only."""
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    counters = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
    known = {name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("_")}
    known |= dict.fromkeys((*counters, "current_device"), zero)
    known |= dict.fromkeys(("empty_cache", "ipc_collect", "set_device", "manual_seed", "manual_seed_all"), nothing)
    known |= {"mem_get_info": lambda *args: (0, 0), "is_available": lambda: True, "get_device_name": lambda *a: "cpu"}
    known |= {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    module = SimpleNamespace(**known)
    methods: dict[str, Any] = {
        "device_name": property(lambda self: "cpu"),
        "vendor_name": property(lambda self: "generic"),
        "device_module": property(lambda self: module),
        "is_available": lambda self: True,
        "is_platform_available": lambda self, use_smi_check=False: False,
        "current_device": lambda self: "cpu",
        "device_count": lambda self: 1,
        "get_device_capability": lambda self, index=0: (None, None),
        "communication_backend_name": lambda self: "gloo",
        "visible_devices_envvar": lambda self: "CUDA_VISIBLE_DEVICES",
        "nvtx_range": lambda self, message: nullcontext(),
        "ray_resource_name": lambda self: "CPU",
        "ray_noset_envvars": lambda self: [],
        "is_ipc_supported": lambda self: False,
        "manual_seed": lambda self, seed: torch.manual_seed(seed),
        "manual_seed_all": lambda self, seed: torch.manual_seed(seed),
    }
    for name in ("set_device", "synchronize", "set_allocator_settings", "empty_cache", "profiler_start"):
        methods[name] = nothing
    for name in ("profiler_stop", "cudart"):
        methods[name] = nothing
    PlatformRegistry.register(platform="cpu")(type("PlatformCPU", (PlatformBase,), methods))


def tiny_model(folder: str, *, tied: bool = True) -> str:
    """Writes a Qwen2 of two layers with random weights to `folder`, where there is none yet; returns the folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if not os.path.exists(os.path.join(folder, "config.json")):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_worker(
    model: str,
    *,
    micro: int = 8,
    max_tokens: int | None = None,
    policy_loss: Any = None,
    actor: dict[str, Any] | None = None,
    hf_model: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
) -> Any:
    """A TrainingWorker of the actor, with its loss function.

    Args:
        model: folder of `tiny_model`.
        micro: sequences of a micro-batch, on each rank.
        max_tokens: tokens of a micro-batch instead: verl's dynamic batches.
        policy_loss: a PolicyLossConfig of verl, or of the plug-in; None: verl's default, vanilla.
        actor, hf_model, engine: further keys of verl's FSDPActorConfig, HFModelConfig, FSDPEngineConfig.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    engine_config = FSDPEngineConfig(**{
        "strategy": "fsdp2", "use_dynamic_bsz": max_tokens is not None, "max_token_len_per_gpu": max_tokens or 64,
        "infer_max_token_len_per_gpu": 64, "micro_batch_size_per_gpu": micro, "infer_micro_batch_size_per_gpu": 2,
        "mixed_precision": _FP32, "model_dtype": "fp32", "use_torch_compile": False, **(engine or {}),
    })  # fmt: skip
    model_config = HFModelConfig(**{
        "path": model, "load_tokenizer": False, "override_config": {"attn_implementation": "eager"},
        "use_remove_padding": False, "enable_gradient_checkpointing": False, **(hf_model or {}),
    })  # fmt: skip
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine_config,
            optimizer_config=FSDPOptimizerConfig(
                lr=1e-3, total_training_steps=10, clip_grad=1.0, override_optimizer_config={"eps": 1e-4}
            ),  # Adam's own eps would make rounding errors of tiny gradients as large as the learning rate
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor_config = FSDPActorConfig(**{
        "strategy": "fsdp2", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": micro,
        "policy_loss": policy_loss or PolicyLossConfig(), **(actor or {}),
    })  # fmt: skip
    worker.set_loss_fn(partial(ppo_loss, config=actor_config))
    return worker


@dataclass
class Rollout:
    """Sequences in verl's padded format, on all ranks alike: row i belongs to prompt i // 4."""

    columns: dict[str, torch.Tensor]
    rows: Sequence[int]  # in the order in which they are dealt to the ranks
    shared: bool = False  # every rank has all rows: the ranks are not data-parallel
    nested: bool = False  # fields of prompts and responses are nested, as verl's V1 trainer sends them

    def local(self, **non_tensors: Any) -> Any:
        """This rank's share as the TensorDict that verl's trainer sends to a worker."""
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import left_right_2_no_padding

        ranks = 1 if self.shared else dist.get_world_size()
        share = torch.tensor(self.rows).view(ranks, -1)[dist.get_rank() % ranks]
        data = TensorDict({name: column[share] for name, column in self.columns.items()}, batch_size=len(share))
        tu.assign_non_tensor(data, uid=[f"prompt {i // 4}" for i in share.tolist()])
        data = left_right_2_no_padding(data)
        if self.nested:
            attention = data.pop("attention_mask").bool()
            for name in {"prompts", *self.columns} & set(data.keys()):
                column = data[name]
                if not column.is_nested:
                    here = attention[:, :PROMPT] if name == "prompts" else attention[:, PROMPT:]
                    rows = [row[at] for row, at in zip(column, here, strict=True)]
                    data[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
            data["loss_mask"] = data["response_mask"]
            data["rm_scores"] = data.pop("token_level_scores")
            del data["max_response_len"], data["max_seq_len"], data["indices"]
        common = {"temperature": 1.0, "global_batch_size": len(self.rows), "pad_token_id": 0}
        return tu.assign_non_tensor(data, **(common | non_tensors))

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, ...] in the order of the rows, from every rank's share of them."""
        parts = [torch.zeros_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        whole = values if self.shared else torch.cat(parts)
        ordered = torch.zeros_like(whole)
        ordered[torch.tensor(self.rows)] = whole
        return ordered


def rollout(size: int = 8, seed: int = 0, rows: Sequence[int] | None = None, longest: int = RESPONSE) -> Rollout:
    """`size` responses of different lengths with random advantages and rewards; no log-probabilities yet.

    longest: of the responses, in tokens; the model has room for 50.
    """
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, PROMPT + 1, (size,), generator=g)
    responses = torch.randint(2, longest + 1, (size,), generator=g)
    ids = torch.randint(3, VOCABULARY - 2, (size, PROMPT + longest), generator=g)
    attention = torch.zeros(size, PROMPT + longest, dtype=torch.long)
    for i in range(size):
        attention[i, PROMPT - prompts[i] : PROMPT + responses[i]] = 1
    ids = ids * attention
    mask = attention[:, PROMPT:].clone()
    reward = torch.randint(0, 2, (size,), generator=g).float()
    scores = torch.zeros(size, longest)
    scores[torch.arange(size), responses - 1] = reward
    columns = {
        "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "input_ids": ids, "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0), "response_mask": mask, "token_level_scores": scores,
        "advantages": torch.randn(size, 1, generator=g).expand(size, longest).clone(),
    }  # fmt: skip
    return Rollout(columns, list(rows) if rows is not None else list(range(size)))


def score(worker: Any, batch: Rollout, *, moved: float = 0.0, **non_tensors: Any) -> dict[str, torch.Tensor]:
    """Sets old_log_probs to the worker's log-probabilities, as the trainer does before an update.

    moved: standard deviation of noise on old_log_probs, as if the policy had moved since.
    Returns: {"log_probs", "entropy"}, [rows, longest response], of the worker's policy.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    data = batch.local(calculate_entropy=True, compute_loss=False, **non_tensors)
    output = worker.infer_batch(data)
    said = {}
    if output is not None:  # of tensor-parallel ranks verl's trainer hears the first
        said = {name: no_padding_2_padding(tu.get(output, name), data).float() for name in ("log_probs", "entropy")}
        width = batch.columns["responses"].shape[1]
        said = {name: torch.nn.functional.pad(x, (0, width - x.shape[1])) for name, x in said.items()}
    if batch.shared:
        heard = [said]
        dist.broadcast_object_list(heard, src=0)
        said = heard[0]
    said = {name: batch.gathered(value) for name, value in said.items()}
    noise = moved * torch.randn(said["log_probs"].shape, generator=torch.Generator().manual_seed(1))
    batch.columns["old_log_probs"] = (said["log_probs"] + noise) * batch.columns["response_mask"]
    return said


def train(worker: Any, batch: Rollout, *, mini: int | None = None, epochs: int = 1, **non_tensors: Any) -> dict | None:
    """One training step of verl's trainer; returns the worker's metrics, as its trainer gets them (None: not here)."""
    from verl.utils import tensordict_utils as tu

    size = mini or len(batch.rows)
    keys = {"mini_batch_size": size, "global_batch_size": size, "epochs": epochs, "seed": 1, "compute_loss": True}
    keys |= {"dataloader_kwargs": {"shuffle": False}, "calculate_entropy": False}
    output = worker.train_mini_batch(batch.local(**(keys | non_tensors)))
    return None if output is None else tu.get(output, "metrics")


def parameters(worker: Any) -> torch.Tensor:
    """All parameters of the model in one vector, whole on every rank."""
    from torch.distributed.tensor import DTensor

    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in worker.engine.module.parameters())
    return torch.cat([p.detach().flatten() for p in whole]).clone()


@dataclass
class Case:
    """One training run. Can be sent to another process."""

    policy_loss: dict[str, Any] = field(
        default_factory=dict
    )  # keys of PolicyLossConfig, the plug-in's if it has controls
    worker: dict[str, Any] = field(default_factory=dict)  # further arguments of `make_worker`
    rows: Sequence[int] | None = None
    rollouts: int = 1
    mini: int | None = None
    epochs: int = 2
    moved: float = 0.1
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # of the data, in place of `rollout`'s
    nested: bool = False
    forget: bool = False  # the engine's scores of the rollout, as if verl's trainer had not asked for any


@dataclass
class Outcome:
    """What a run came to; equal on all ranks.

    metrics: one dictionary a rollout
    chosen: of every update with a selection, the ids of the tokens that the first control selected
    passes: forward passes of the model without a gradient, and with one
    """

    parameters: torch.Tensor
    metrics: list[dict[str, Any]]
    chosen: list[list[int]]
    passes: tuple[int, int]


def policy_loss_config(keys: dict[str, Any]) -> Any:
    """verl's PolicyLossConfig, or the plug-in's where the keys are its own."""
    from verl.workers.config import PolicyLossConfig as Verls

    from entcov.integrations.verl import PolicyLossConfig

    return (PolicyLossConfig if {"controls", "preset", "objective"} & set(keys) else Verls)(**keys)


def run(model: str, case: Case) -> Outcome:
    worker = make_worker(model, policy_loss=policy_loss_config(case.policy_loss), **case.worker)
    metrics, chosen, passes = [], record_selections(worker), _count_passes(worker)
    for number in range(case.rollouts):
        batch = rollout(seed=number, rows=case.rows)
        batch.columns |= case.columns
        batch.nested = case.nested
        score(worker, batch, moved=case.moved)
        if case.forget:
            worker.engine.training.weights_changed()
        metrics.append(train(worker, batch, mini=case.mini, epochs=case.epochs))
    return Outcome(parameters(worker), metrics, chosen, tuple(passes))


def record_selections(worker: Any) -> list[list[int]]:
    """Grows with every update that selects: the token ids, of all data-parallel ranks, that the first control chose."""
    training, found = getattr(worker.engine, "training", None), []
    if training is None:
        return found
    own = training.controlled.update

    def update(micro_batches: Any, **keys: Any) -> Any:
        made = own(micro_batches, **keys)
        ids = [t.token_id[c[0].mask] for t, c in zip(micro_batches, made.selections, strict=True) if c[0] is not None]
        if ids:
            ranks: list[Any] = [None] * training.controlled.ranks
            dist.all_gather_object(ranks, torch.cat(ids).tolist(), group=training.controlled.group)
            found.append(sorted(sum(ranks, [])))
        return made

    training.controlled.update = update
    return found


def _count_passes(worker: Any) -> list[int]:
    passes, own = [0, 0], worker.engine.forward_backward_batch

    def forward_backward_batch(data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        passes[not forward_only] += 1
        return own(data, loss_function, forward_only=forward_only)

    worker.engine.forward_backward_batch = forward_backward_batch
    return passes


def _rank(rank: int, world: int, port: int, work: Any, arguments: tuple, folder: str) -> None:
    start(rank, world, port)
    torch.save(work(*arguments), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def on_ranks(world: int, work: Any, *arguments: Any, folder: str) -> list[Any]:
    """What `work(*arguments)` returns on each of `world` new processes, ranks of one group; `work` is of a module."""
    torch.multiprocessing.spawn(_rank, (world, free_port(), work, arguments, folder), nprocs=world)
    return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
