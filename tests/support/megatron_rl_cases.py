"""The plug-in for Megatron-LM on a real GPTModel, against one process with plain torch."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator as calculator
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.transformer import TransformerConfig

from entcov.controls import Progress, begin, make_control, mini_batch_totals, needs, select
from entcov.integrations import megatron_lm as plugin
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import Tokens
from megatron_integration.cpu import CONFIG, layer_specs, on_cpu, seed_everything
from tests.support import megatron_rl_standin as standin
from tests.support.megatron_rl_standin import get_logprobs, load_packed_data_by_index

VOCAB, PADDED, LENGTH, LR = 37, 40, 12, 0.2
ADVANTAGES = torch.tensor([1.0, -0.6, 0.3, -1.2, 0.8, 1.5, -0.4, 0.9])


def forward_step(data_iterator, model, loss_only=False):
    """As train_rl.py: log-probabilities by `get_logprobs`, a loss per token, and a report."""
    batch = next(data_iterator)
    if standin.ARGS.rl_use_sequence_packing:
        batch = load_packed_data_by_index(batch[0].item(), standin.STATE.packing_context, False)
        tokens, mask, places = batch[0], batch[3], batch[4]
    else:
        tokens, mask, places = batch[0], batch[3][:, 1:], batch[4]
    standin.STATE.sequences_this_iteration_on_rank += len(tokens)
    return get_logprobs(model, tokens, places), partial(loss_func, mask.float())


def loss_func(loss_mask, output):
    total = loss_mask.sum().clamp(min=1)
    loss = (output * loss_mask).sum()
    return loss, total.int(), {"lm loss": torch.stack([loss, total]), "rl/kl_term": torch.stack([loss, total])}


def make_model(tensor_parallel: int, per_token: bool) -> GPTModel:
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, add_bias_linear=False,
        normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=tensor_parallel,
        calculate_per_token_loss=per_token, params_dtype=torch.float32, init_method_std=0.5, **CONFIG,
    )  # fmt: skip
    seed_everything(3)
    torch.manual_seed(3)
    return GPTModel(
        config, layer_specs(config), vocab_size=PADDED, max_sequence_length=LENGTH, position_embedding_type="rope",
        parallel_output=True, share_embeddings_and_output_weights=False,
    )  # fmt: skip


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (8, LENGTH), generator=draw)
    mask = torch.zeros(8, LENGTH)
    for i, (start, end) in enumerate([(3, 12), (2, 9), (4, 12), (3, 6), (2, 12), (5, 11), (3, 3), (4, 10)]):
        mask[i, start:end] = 1.0
    return tokens, mask


def whole(old: torch.Tensor, ref: torch.Tensor, packed: bool) -> dict[str, torch.Tensor]:
    """The fields of the mini-batch, [8 * 11], by one process. Packed: two responses a row, from position 0 and 6."""
    _, mask = rows()
    row = torch.arange(8)[:, None].expand(8, LENGTH - 1)
    place = torch.arange(LENGTH - 1).expand(8, LENGTH - 1)
    if packed:
        row, place = 2 * row + (place >= 6), torch.where(place >= 6, place - 6, place)
    advantage = (torch.cat([ADVANTAGES, -ADVANTAGES.flip(0)]) if packed else ADVANTAGES)[row]
    fields = {"old_logprob": old, "ref_logprob": ref, "advantage": advantage, "sequence": row, "position": place}
    fields |= {"loss_mask": packed_mask(mask, packed)[:, 1:] > 0, "token_id": row * plugin.STRIDE + place}
    return {name: value.flatten() for name, value in fields.items()}


def packed_mask(mask: torch.Tensor, packed: bool) -> torch.Tensor:
    if packed:
        mask = mask.clone()
        mask[:, 6] = 0  # the first token of the second response has no log-probability
    return mask


def expected(case, config, tokens, places) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Two updates on one rollout by one process, with plain log-softmax over the true vocabulary."""
    model, found = make_model(1, False), []
    controls = [make_control(name, **knobs) for name, knobs in case["controls"].items()]

    def statistics():
        logp = model(tokens, places, None)[:, :-1, :VOCAB].double().log_softmax(-1)
        logprob = logp.gather(-1, tokens[:, 1:, None])[..., 0]
        return logprob.flatten(), -(logp.exp() * logp).sum(-1).flatten()

    with torch.no_grad():
        old, scored = statistics()
    old = old.view(8, LENGTH - 1)
    fields = whole(old, old + 0.1, case.get("packed", False))
    at = fields["loss_mask"]
    rollout = Tokens(logprob=old.flatten()[at], entropy=scored[at], **{n: x[at] for n, x in fields.items()})
    fields["advantage"] = fields["advantage"].double()
    shaped = begin(controls, rollout, Progress(1, 4, 0))
    fields["advantage"][at] = shaped.advantage.double()
    for update in range(2):
        logprob, entropy = statistics()
        batch = Tokens(logprob=logprob, entropy=entropy, **fields)
        bare = Tokens(logprob=logprob.detach(), entropy=entropy.detach(), **fields)
        chosen, metrics = select(controls, [bare], step=update, config=config)
        totals = mini_batch_totals([bare], chosen)
        loss, more = policy_loss(batch, config, totals=totals, controls=controls, selections=chosen[0])
        model.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= LR * parameter.grad
        metrics = metrics if "selection" in needs(controls) else {}
        found.append({name: float(value) for name, value in (metrics | more | shaped.metrics).items()})
    return {name: value.detach().clone() for name, value in model.named_parameters()}, found


def own_batches(case, old, tokens, places) -> list[Any]:
    """What the example's iterator yields on this rank."""
    _, mask = rows()
    ranks, rank, size = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank(), case["micro_batch"]
    own = list(range(rank * 8 // ranks, (rank + 1) * 8 // ranks))
    mask = packed_mask(mask, case.get("packed", False))
    if case.get("packed"):
        advantages = torch.cat([ADVANTAGES, -ADVANTAGES.flip(0)])
        standin.STATE.packing_context = [
            {"tokens": tokens[i : i + 1], "loss_mask": mask[i : i + 1], "position_ids": places[i : i + 1],
             "old_logprobs": old[n : n + 1], "ref_logprobs": old[n : n + 1] + 0.1, "seq_indices": [2 * i, 2 * i + 1],
             "advantages": advantages[2 * i : 2 * i + 2], "seq_starts": [0, 6], "seq_lengths": [7, 6]}
            for n, i in enumerate(own)
        ]  # fmt: skip
        return [[torch.tensor([n])] for n in range(len(own))]
    table = [tokens[own], ADVANTAGES[own], old, mask[own], places[own], old + 0.1, torch.zeros_like(old)]
    return [[column[n : n + size] for column in table] for n in range(0, len(own), size)]


def megatron_rl(folder: Path, case: dict[str, Any]) -> str | None:
    """Two updates on one rollout, in the case's layout and split."""
    tensor_parallel = case.get("tp", 1)
    mpu.initialize_model_parallel(1)
    try:
        with on_cpu():
            standin.arguments(
                vocab_size=VOCAB, rl_use_sequence_packing=case.get("packed", False), **case.get("args", {})
            )
            config = plugin.policy_loss_config(standin.ARGS)
            tokens, places = rows()[0], torch.arange(LENGTH).expand(8, LENGTH)
            weights, metrics = expected(case, config, tokens, places)
            mpu.destroy_model_parallel()
            mpu.initialize_model_parallel(tensor_parallel)
            got, model = train(case, tokens, places)
        for name, parameter in model.named_parameters():
            want = weights[name]
            if getattr(parameter, "tensor_model_parallel", False):
                want = want.chunk(tensor_parallel, parameter.partition_dim)[mpu.get_tensor_model_parallel_rank()]
                if "fc1" in name and tensor_parallel > 1 and model.config.gated_linear_unit:
                    return "the case has no gated layer"
            worst = (parameter.detach() - want).abs().max().item()
            if not worst < 5e-6:  # fp32, sums in another order
                return f"{name} is off by {worst}"
        for update, (mine, theirs) in enumerate(zip(got, metrics, strict=True)):
            theirs = {"entcov/" + n.removeprefix("actor/"): x for n, x in theirs.items()} | {
                "lm loss": theirs["actor/loss"]
            }
            extra = mine.keys() - theirs.keys() - {"rl/kl_term", *(case.get("after_step", ()) if update else ())}
            if theirs.keys() - mine.keys() or extra:
                return f"update {update}: metrics differ by {sorted(mine.keys() ^ theirs.keys())}"
            for name, value in theirs.items():
                if not abs(float(mine[name]) - value) <= 2e-5 * max(1.0, abs(value)):
                    return f"update {update}: {name} is {mine[name]} instead of {value}"
        return None
    finally:
        mpu.destroy_model_parallel()


def train(case, tokens, places) -> tuple[list[dict[str, Any]], GPTModel]:
    ranks, size = mpu.get_data_parallel_world_size(), case["micro_batch"]
    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, 8, size, ranks)
    model = make_model(case.get("tp", 1), case.get("per_token", False))
    wrapped = standin.Wrapped(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    own = slice(mpu.get_data_parallel_rank() * 8 // ranks, (mpu.get_data_parallel_rank() + 1) * 8 // ranks)
    before = {name: getattr(standin, name) for name in ("train_step", "get_logprobs", "selective_log_softmax")}
    with standin.modules(), plugin.entcov_grpo(case["controls"]):
        pairs = [(tokens[own][i : i + size], places[own][i : i + size]) for i in range(0, 8 // ranks, size)]
        old = standin.compute_logprobs_batch(model=wrapped, batches=pairs, dtype=torch.bfloat16)
        found, standin.STATE.last_collection_iteration = [], 0
        for iteration in (0, 1):
            batches = RerunDataIterator(iter(own_batches(case, old, tokens, places)))
            result = standin.train_step(
                forward_step, batches, [wrapped], optimizer, None, model.config, get_forward_backward_func(),
                iteration=iteration,
            )  # fmt: skip
            found.append(result[0])
    assert before == {name: getattr(standin, name) for name in before}
    assert get_logprobs is standin.get_logprobs and dist.is_initialized()
    return found, model
