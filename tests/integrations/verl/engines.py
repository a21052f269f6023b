"""Statistics and gradients of verl's engines, and of the same model in float64.

The loss is a sum of every differentiable statistic with random weights, so that a wrong gradient of any token shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.integrations.verl import megatron_worker, worker
from tests.integrations.verl.worker import PROMPT, RESPONSE, Rollout

DIFFERENTIABLE = ("log_probs", "entropy", "clamped_entropy")
CLAMP = {"clamp_p": 0.33}


@dataclass
class Found:
    columns: dict[str, Tensor] = field(default_factory=dict)  # [rows, RESPONSE]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by the parameters' Hugging Face names


def weighted_rollout(rows: Sequence[int] | None = None) -> Rollout:
    batch = worker.rollout(rows=rows)
    g = torch.Generator().manual_seed(7)
    for name in DIFFERENTIABLE:
        weights = torch.randn(batch.columns["response_mask"].shape, generator=g)
        batch.columns[f"weight_of_{name}"] = weights * batch.columns["response_mask"]
    return batch


def use_engine(backend: str, *mixins: type) -> None:
    """From now on workers get verl's engine of that backend behind these mixins."""
    from verl.workers.engine.base import EngineRegistry

    if backend == "megatron":
        from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead as engine
    else:
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as engine
    EngineRegistry._engines["language_model"][backend]["cpu"] = type("Tested", (*mixins, engine), {})


def found_by(engine: Any, batch: Rollout, *, packed: bool, micro: int = 2, **asked: Any) -> Found:
    """One forward and backward pass of the engine over the rank's share of the rollout."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    pieces: dict[str, list[Tensor]] = {}

    def loss_function(model_output: dict[str, Tensor], data: Any, dp_group: Any = None) -> tuple[Tensor, dict]:
        padded = {name: no_padding_2_padding(value, data) for name, value in model_output.items()}
        for name, value in padded.items():
            pieces.setdefault(name, []).append(value.detach().float())
        weighted = [padded[name] * data[f"weight_of_{name}"] for name in DIFFERENTIABLE if name in padded]
        return sum(x.sum() for x in weighted) * tu.get_non_tensor_data(data, "dp_size", 1), {}

    keys = {"use_remove_padding": packed, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": micro}
    keys |= {"use_fused_kernels": engine.engine_config.use_fused_kernels, "calculate_entropy": True}
    data = batch.local(**{name: value for name, value in (keys | asked).items() if not isinstance(value, Tensor)})
    if isinstance(asked.get("temperature"), Tensor):
        data["temperature"] = asked["temperature"]  # [rows of this rank]
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(data, loss_function)
        gradients = _gradients(engine)
    return Found({name: torch.cat(parts) for name, parts in pieces.items()}, gradients)


def _gradients(engine: Any) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    if isinstance(engine.module, list):
        return megatron_worker.gradients(engine)
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()
    return found


def oracle(
    folder: str, batch: Rollout, *, temperature: float | Tensor = 1.0, asked: Sequence[str] = DIFFERENTIABLE
) -> Found:
    """The same in float64 by plain torch, sequence by sequence. The loss has the statistics that are `asked`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    real = batch.columns["attention_mask"].bool()
    logits = torch.zeros(len(real), RESPONSE, model.config.vocab_size, dtype=torch.float64)
    for row, (ids, here) in enumerate(zip(batch.columns["input_ids"], real, strict=True)):
        length = int(here[PROMPT:].sum())
        made = model(ids[here][None]).logits[0]  # row i predicts token i + 1
        logits = logits.index_put((torch.tensor(row), torch.arange(length)), made[-length - 1 : -1])
    columns = of_logits(logits, batch.columns["responses"], temperature)
    sum((columns[name] * batch.columns[f"weight_of_{name}"]).sum() for name in asked).backward()
    columns = {name: value.detach() for name, value in columns.items()}
    return Found(columns, {name: p.grad for name, p in model.named_parameters()})


def of_logits(logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0) -> dict[str, Tensor]:
    """All statistics of [B, S, V] logits in their dtype; -inf is a probability of 0."""
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None, None].to(logits.dtype)
    log_p = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * log_p.masked_fill(p == 0, 0), 0)
    entropy = -terms.sum(-1)
    kept = logits.shape[-1] - int(logits.shape[-1] * CLAMP["clamp_p"])
    of_kept = (logits / temperature).topk(kept).values.log_softmax(-1)
    slope = -p * (log_p.masked_fill(p == 0, 0) + entropy[..., None])
    step = torch.nn.functional.one_hot(target, logits.shape[-1]) - p
    collision = (p * p).sum(-1)
    return {
        "log_probs": log_p.gather(-1, target[..., None])[..., 0], "entropy": entropy,
        "clamped_entropy": -(of_kept.exp() * of_kept).sum(-1), "entropy_drift": (slope * step).sum(-1),
        "collision": collision, "sum_pi_squared": collision,
    }  # fmt: skip


def worst(found: Found, right: Found, batch: Rollout, rows: slice = slice(None)) -> dict[str, float]:
    """Errors by name: of columns the largest absolute one on real tokens, of gradients relative to the whole's norm."""
    mask = batch.columns["response_mask"].bool()[rows]
    errors = {
        name: float((value.double() - right.columns[name][rows])[mask].abs().max())
        for name, value in found.columns.items()
    }
    norm = torch.stack([g.norm() for g in right.gradients.values()]).norm()
    for name, grad in found.gradients.items():
        errors[f"d {name}"] = float((grad.double() - right.gradients[name]).norm() / norm)
    return errors


def all_below(errors: dict[str, float], value: float, gradient: float) -> bool:
    return all(error < (gradient if name.startswith("d ") else value) for name, error in errors.items())


def raised(call: Callable[[], Any]) -> str:
    """What the call raises, in one line."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "nothing"
