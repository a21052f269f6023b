"""The statistics of the policy in TRL's models: log-probability and entropies, in the place of TRL's fused head.

TRL calls `model(**inputs, labels=labels, fused_lm_head=True)` and reads `log_probs`, `entropy` and `aux_loss` of what
it returns. Here `entropy` has a trailing axis of the columns `PolicyHead.columns`.
"""

import functools
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import FusedCausalLMOutput

from entcov.integrations.trl.fsdp_head import gathered
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.stats.token_stats import TokenStats, token_stats

# Keys of a model's configuration that change its logits after the product with the LM head
_CHANGES_LOGITS = (
    "final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling",
)  # fmt: skip


@dataclass
class PolicyHead:
    """What the patched models compute.

    Two routes, the same numbers (tests/integrations/trl/test_head.py). From hidden states, by `linear_token_stats`,
    which does not hold more than 1 GiB of logits: where the logits are hidden @ weight.T + bias. From the model's own
    logits, by `token_stats`: where the model scales or caps them, for mixtures of experts (their auxiliary loss), and
    under DeepSpeed ZeRO-3, whose weights are there inside their own module's forward alone.

    clamp: of `ControlledLoss.clamp`
    moments: whether entropy_drift and collision are computed too (the scoring pass)
    """

    temperature: float
    cast_to_fp32: bool = False  # TRL's cast_lm_head_to_fp32
    clamp: dict[str, Any] = field(default_factory=dict)
    moments: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        clamped = ("clamped_entropy",) if self.clamp else ()
        return ("entropy", *clamped, *(("entropy_drift", "collision") if self.moments else ()))

    def install(self, model: Any) -> None:
        """Patches the `forward` of a causal LM that TRL has patched; without fused_lm_head it is TRL's."""
        before, config = model.forward, model.config.get_text_config()
        scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _CHANGES_LOGITS)

        # `generate` checks its arguments against the signature
        @functools.wraps(type(model).forward)
        def forward(own, *args, fused_lm_head=False, labels=None, **kwargs):
            if not fused_lm_head:
                return before(*args, **kwargs) if labels is None else before(*args, labels=labels, **kwargs)
            routed = kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False)
            kwargs["use_cache"] = False
            if scaled or routed or is_deepspeed_zero3_enabled():
                if routed:
                    kwargs["output_router_logits"] = True
                outputs = before(*args, **kwargs)
                return self._output(self._of_logits(outputs.logits, labels), labels, getattr(outputs, "aux_loss", None))
            hidden = own.base_model(*args, **kwargs).last_hidden_state[:, :-1]
            return self._output(self._of_hidden(hidden, own.get_output_embeddings(), labels), labels, None)

        model.forward = types.MethodType(forward, model)

    def _of_hidden(self, hidden: Tensor, head: Any, labels: Tensor) -> TokenStats:
        weight, bias = head.weight, getattr(head, "bias", None)
        if isinstance(weight, DTensor):
            weight, bias = gathered(weight), None if bias is None else gathered(bias)
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise RuntimeError(
                f"{type(head).__name__}: the LM head's weight must be [vocabulary, {hidden.shape[-1]}] in the model's "
                f"forward, got {tuple(weight.shape)}; a wrapper that shards it by itself is not supported (FSDP2 is)"
            )
        hidden, labels = hidden.to(weight.device), labels.to(weight.device)
        target = labels[:, 1:]
        hidden, target = hidden[target != -100], target[target != -100]
        if not self.cast_to_fp32:
            return self._statistics(linear_token_stats, hidden, weight, target, bias=bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._statistics(linear_token_stats, hidden.float(), weight, target, bias=bias)

    def _of_logits(self, logits: Tensor, labels: Tensor) -> TokenStats:
        target = labels.to(logits.device)[:, 1:]
        return self._statistics(token_stats, logits[:, :-1][target != -100], target[target != -100])

    def _statistics(self, function, *args, **kwargs) -> TokenStats:
        return function(*args, temperature=self.temperature, moments=self.moments, **self.clamp, **kwargs)

    def _output(self, stats: TokenStats, labels: Tensor, aux_loss: Tensor | None) -> FusedCausalLMOutput:
        """[B, L - 1] and [B, L - 1, columns], 0 where nothing is scored; with a graph where that is everywhere, too."""
        at = labels[:, 1:].to(stats.logprob.device) != -100
        columns = torch.stack([getattr(stats, name) for name in self.columns], dim=-1)
        logprob = stats.logprob.new_zeros(at.shape).masked_scatter(at, stats.logprob)
        spread = columns.new_zeros(*at.shape, len(self.columns)).masked_scatter(at[..., None], columns)
        return FusedCausalLMOutput(log_probs=logprob, entropy=spread, aux_loss=aux_loss)
