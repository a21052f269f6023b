"""Log-probabilities and entropies in verl's engines by entcov: mixins for the FSDP and the Megatron engine.

Micro-batches ask for them by verl's own entries (calculate_entropy, calculate_sum_pi_squared) and by two more:
    entcov_clamp     arguments of `entcov.token_stats` for the clamped entropy, such as {"clamp_p": 0.33}
    entcov_moments   whether to give entropy drift and collision probability too
The engine's model_output has them as nested tensors [sequence, tokens] like verl's own: log_probs, entropy,
clamped_entropy (with gradients), entropy_drift, collision, sum_pi_squared (without).

Distillation goes to verl's own code, which does not know the two entries: asking for both is an error. Value models
have engines of their own, which stay verl's.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from verl.utils import tensordict_utils as tu

from entcov.integrations.verl import fused_head
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.stats.token_stats import TokenStats, token_stats

IMPL_BACKEND = "entcov"  # of model.fused_kernel_options: statistics without logits
NO_TARGET = -100
LEAST_TEMPERATURE = 1e-8  # verl's


class Request(NamedTuple):
    """What a micro-batch asks for: names in model_output -> fields of TokenStats, and arguments of `token_stats`."""

    fields: dict[str, str]
    arguments: dict


def requested(micro_batch: TensorDict) -> Request:
    """Reads the entries that this module's head names."""
    fields = {"log_probs": "logprob"}
    if _entry(micro_batch, "calculate_entropy"):
        fields["entropy"] = "entropy"
    clamp = _entry(micro_batch, "entcov_clamp") or {}
    if clamp:
        fields["clamped_entropy"] = "clamped_entropy"
    if _entry(micro_batch, "entcov_moments"):
        fields |= {"entropy_drift": "entropy_drift", "collision": "collision"}
    if _entry(micro_batch, "calculate_sum_pi_squared"):
        fields["sum_pi_squared"] = "collision"
    return Request(fields, {**clamp, "moments": "collision" in fields.values()})


def distils(micro_batch: TensorDict) -> bool:
    """Whether verl's own code must serve the micro-batch."""
    return bool(_entry(micro_batch, "distillation_use_topk") or _entry(micro_batch, "distillation_only"))


def refuse_without_entcov(micro_batch: TensorDict, because: str) -> None:
    """NotImplementedError where verl's own code would leave out what a control asked for."""
    asked = [name for name in ("entcov_clamp", "entcov_moments") if _entry(micro_batch, name)]
    if asked:
        raise NotImplementedError(f"{', '.join(asked)} must not be asked for {because}")


def _entry(micro_batch: TensorDict, name: str):
    return tu.get_non_tensor_data(data=micro_batch, key=name, default=False)


class _WithoutLogits:
    """Whether model.use_fused_kernels is set with model.fused_kernel_options.impl_backend = "entcov": the statistics
    then come from `linear_token_stats`, and there are no logits."""

    @property
    def _without_logits(self) -> bool:
        options = self.model_config.fused_kernel_options or {}
        return self.model_config.use_fused_kernels and options.get("impl_backend") == IMPL_BACKEND


class FSDPStatistics(_WithoutLogits):
    """Mixin before FSDPEngineWithLMHead: the statistics of logits, or in the place of the output embedding."""

    def _build_module(self) -> nn.Module:
        module = super()._build_module()
        if self._without_logits:
            fused_head.install(module)
        return module

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        if not self._without_logits:
            return super().prepare_model_inputs(micro_batch)
        tu.assign_non_tensor(micro_batch, use_fused_kernels=False)  # verl's: they change the model's arguments
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if not distils(micro_batch):  # verl's code for distillation needs logits
            compute = partial(_linear_statistics, micro_batch=micro_batch, output_args=output_args)
            fused_head.installed(self.module).ask(compute)
        return model_inputs, output_args

    def prepare_model_outputs(self, output, output_args: dict, micro_batch: TensorDict, logits_processor_func) -> dict:
        verls_kernels = _entry(micro_batch, "use_fused_kernels")
        if verls_kernels or distils(micro_batch):
            refuse_without_entcov(micro_batch, "with verl's fused kernels" if verls_kernels else "in distillation")
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        if self._without_logits:
            made = fused_head.installed(self.module).take(output.logits)
            columns = dict(zip(requested(micro_batch).fields, made.unbind(-1), strict=True))
        else:
            columns = _statistics(output.logits, micro_batch, output_args)
        if _packed(micro_batch):
            columns = {
                name: self._gather_and_unpad_packed(x.squeeze(0), output_args["pad_size"])
                for name, x in columns.items()
            }
        else:
            real = _real(micro_batch, next(iter(columns.values())).shape[1])
            columns = {name: x[real] for name, x in columns.items()}
        return {name: torch.nested.nested_tensor_from_jagged(x, offsets) for name, x in columns.items()}


def _packed(micro_batch: TensorDict) -> bool:
    return tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)


def _real(micro_batch: TensorDict, width: int) -> Tensor:
    """[B, width] bool: where the rows of padded sequences have a token."""
    lengths = micro_batch["input_ids"].offsets().diff()
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _targets(micro_batch: TensorDict, output_args: dict, width: int) -> tuple[Tensor, float | Tensor]:
    """Next tokens and temperatures of logits or hidden states: packed [1, T], padded [B, width]."""
    tokens, temperature = output_args["input_ids_rmpad_rolled"], micro_batch["temperature"]
    if not _packed(micro_batch):
        real = _real(micro_batch, width)
        tokens = torch.full(real.shape, NO_TARGET, device=tokens.device).masked_scatter(real, tokens)
        if isinstance(temperature, Tensor):
            temperature = temperature[:, None].expand(real.shape)
        return tokens, temperature
    if isinstance(temperature, Tensor):
        temperature = output_args["temperature_rmpad"][None]
    return tokens[None], temperature


def _statistics(logits: Tensor, micro_batch: TensorDict, output_args: dict) -> dict[str, Tensor]:
    local, shard = _shard(logits)
    target, temperature = _targets(micro_batch, output_args, logits.shape[1])
    return named_statistics(local, target, temperature, requested(micro_batch), **shard)


def _linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, micro_batch: TensorDict, output_args: dict
) -> Tensor:
    """[..., n]: the columns of the request."""
    fields, arguments = requested(micro_batch)
    target, temperature = _targets(micro_batch, output_args, hidden.shape[1])
    stats = linear_token_stats(hidden, weight, target, bias=bias, temperature=one_temperature(temperature), **arguments)
    return torch.stack([getattr(stats, field) for field in fields.values()], -1)


def _shard(logits: Tensor) -> tuple[Tensor, dict]:
    """This rank's columns of logits, and the arguments of `token_stats` that say which they are."""
    if not isinstance(logits, DTensor):
        return logits, {}
    last, mesh = logits.dim() - 1, logits.device_mesh
    split = [dim for dim, placement in enumerate(logits.placements) if placement == Shard(last)]
    others = [p for dim, p in enumerate(logits.placements) if dim not in split]
    if len(split) != 1 or any(p != Replicate() for p in others):
        return logits.full_tensor(), {}
    columns, width = logits.shape[last], -(-logits.shape[last] // mesh.size(split[0]))
    start = min(mesh.get_local_rank(split[0]) * width, columns)  # the last shards are narrower, or empty
    return logits.to_local(), {"group": mesh.get_group(split[0]), "vocab_start": start, "vocab_size": columns}


def named_statistics(
    logits: Tensor, target: Tensor, temperature: float | Tensor, request: Request, **shard
) -> dict[str, Tensor]:
    """`token_stats` by the names of the request, each of target's shape; rows are [..., T], temperature one or each's.

    A row whose target is NO_TARGET gets zeros. Where temperatures differ, neighbours of equal temperature are computed
    together: dividing bf16 logits by a tensor would round the quotients.
    """
    values = temperatures(temperature)
    stats = partial(token_stats, ignore_index=NO_TARGET, **request.arguments, **shard)
    if len(values) == 1:
        found = stats(logits, target, temperature=values[0])
    else:
        rows, tokens = logits.flatten(0, -2), target.flatten()
        runs, counts = torch.unique_consecutive(temperature.clamp(min=LEAST_TEMPERATURE).flatten(), return_counts=True)
        counts = counts.tolist()
        parts = zip(rows.split(counts), tokens.split(counts), runs.tolist(), strict=True)
        made = [stats(*part[:2], temperature=part[2]) for part in parts]
        found = TokenStats(
            *(None if x[0] is None else torch.cat(x).view(target.shape) for x in zip(*made, strict=True))
        )
    return {name: getattr(found, field) for name, field in request.fields.items()}


def temperatures(temperature: float | Tensor) -> list[float]:
    """The different values. Reads a tensor, for which a GPU is waited for."""
    if isinstance(temperature, Tensor):
        return temperature.clamp(min=LEAST_TEMPERATURE).unique().tolist()
    return [max(float(temperature), LEAST_TEMPERATURE)]


def one_temperature(temperature: float | Tensor) -> float:
    values = temperatures(temperature)
    if len(values) > 1:
        raise fused_head.refused(f"a micro-batch must have one temperature, and has {len(values)}")
    return values[0]


class MegatronStatistics(_WithoutLogits):
    """Mixin before MegatronEngineWithLMHead: statistics of logits whose vocabulary is split over the tensor-parallel
    ranks, or of hidden states. Columns from the Hugging Face model's vocab_size on are padding."""

    def _maybe_enable_fused_kernels(self) -> None:
        if not self._without_logits:
            return super()._maybe_enable_fused_kernels()
        if self.model_config.mtp.enable:
            raise fused_head.refused("multi-token prediction needs logits")
        from entcov.integrations.verl import megatron_head

        megatron_head.install(self.module)
        self.engine_config.use_fused_kernels = False  # verl's: they replace the model's forward
        return None

    def _lm_head_logits_processor(
        self, logits, label, temperature, *, calculate_sum_pi_squared, calculate_entropy, distillation_use_topk,
        distillation_only, logits_processor_func, batch, data_format,
    ):  # fmt: skip
        from megatron.core import parallel_state

        from entcov.integrations.verl import megatron_head

        head = megatron_head.layer_of(self.module) if self._without_logits else None
        if distillation_use_topk or distillation_only:
            if head is not None:
                raise fused_head.refused("distillation needs logits")
            refuse_without_entcov(batch, "in distillation")
            return super()._lm_head_logits_processor(
                logits, label, temperature, calculate_sum_pi_squared=calculate_sum_pi_squared,
                calculate_entropy=calculate_entropy, distillation_use_topk=distillation_use_topk,
                distillation_only=distillation_only, logits_processor_func=logits_processor_func, batch=batch,
                data_format=data_format,
            )  # fmt: skip
        real = temperature > 0  # verl pads it with zeros
        if not bool(real.all()):
            temperature = temperature.masked_fill(~real, float(temperature[real][0]) if real.any() else 1.0)
        target = label.long().masked_fill(~real, NO_TARGET)
        group = parallel_state.get_tensor_model_parallel_group()
        columns = (logits.shape[-1] if head is None else len(head.used)) * dist.get_world_size(group)
        vocab_size = min(columns, self.model_config.hf_config.get_text_config().vocab_size)
        request = requested(batch)
        if head is None:
            return named_statistics(logits, target, temperature, request, group=group, vocab_size=vocab_size)
        stats = linear_token_stats(
            logits.to(head.used.dtype), head.used, target, bias=head.bias, group=group, vocab_size=vocab_size,
            temperature=one_temperature(temperature), reduce_hidden_grad=head.reduces, **request.arguments,
        )  # fmt: skip
        return {name: getattr(stats, field) for name, field in request.fields.items()}

    def prepare_model_outputs(self, output: dict, data: TensorDict) -> dict:
        if self.engine_config.use_fused_kernels:
            refuse_without_entcov(data, "with verl's fused kernels")
        return super().prepare_model_outputs(output, data)
