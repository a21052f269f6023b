"""The base of the actors of all backends: the statistics of the policy, and one optimizer step.

A backend's actor adds the passes through its model: `_forward`, `_micro_batches`, `_backward`, `_take_step`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from entcov.controls import (
    Control,
    Selection,
    clamp_arguments,
    kept_tokens,
    mini_batch_totals,
    needs,
    select,
    selects,
)
from entcov.objective.policy_loss import policy_loss
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig
from entcov.rl.interfaces import PolicyStats
from entcov.stats.token_stats import TokenStats

Selections = list[Selection | None]  # of the loss tokens of one micro-batch: one entry a control


def needs_reference(loss: PolicyLossConfig, controls: Sequence[Control]) -> bool:
    """Whether the reference policy, that of the run's start, is kept and scores every rollout."""
    return loss.kl_coef > 0 or "ref_logprob" in needs(controls)


class PolicyActor(ABC):
    """An `entcov.rl.interfaces.Actor` without its model's passes.

    Args:
        reference: a frozen model, where `needs_reference`.
        temperature: the policy is softmax(logits / temperature), except for sequences with a temperature of their own.
    """

    optimizer: Any  # has `param_groups`
    sequence_group: ProcessGroup | None = None  # the ranks that a sequence's tokens are divided over
    selects_by_old_logprob = True  # on the first update after a rollout, where the policy is still the old one

    def __init__(
        self,
        model: nn.Module,
        config: ActorConfig,
        loss: PolicyLossConfig,
        controls: Sequence[Control],
        *,
        temperature: float,
        reference: nn.Module | None = None,
    ):
        if needs_reference(loss, controls) and reference is None:
            raise ValueError(
                f"reference: a reference model is needed where loss.kl_coef > 0 (got {loss.kl_coef}) or a control "
                f"compares with it (got {[control.name for control in controls]})"
            )
        self.model, self.reference = model, reference
        self.config, self.loss, self.controls = config, loss, list(controls)
        self.temperature = temperature
        self.weight_version = 0  # optimizer steps taken
        self.clamp = clamp_arguments(self.controls)

    def temperature_of(self, micro: Batch) -> float:
        """The temperature that a micro-batch was sampled at, so that its policy is the one that sampled."""
        return self.temperature if micro.temperature is None else micro.temperature

    @torch.no_grad()
    def compute_logprobs(self, batch: Batch) -> PolicyStats:
        names = ["logprob", "entropy", "entropy_drift", "collision", *(["clamped_entropy"] if self.clamp else [])]
        stats = self._forward(self.model, batch, names, moments=True, **self.clamp)
        if self.reference is not None:
            stats["ref_logprob"] = self._forward(self.reference, batch, ["logprob"])["logprob"]
        return stats

    @torch.no_grad()
    def compute_entropy(self, batch: Batch, *, temperature: float) -> Tensor:
        return self._forward(self.model, batch, ["entropy"], temperature=temperature)["entropy"]

    def update(self, batch: Batch, *, step: int) -> dict[str, float]:
        """One optimizer step on a mini-batch, on every rank.

        The controls select over the whole mini-batch, under the current policy, before the first backward pass. The
        micro-batches' losses have the denominators of the mini-batch, so their gradients add up to its gradient.

        The learning rate warms up over `warmup_steps` rollouts, with one rate for all updates of a rollout, as in verl.
        verl counts the rollouts from 0, so that its first one changes no weight; here `step` counts from 1.
        """
        lr = self.config.lr * min(1.0, step / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        selections, selection_metrics, totals = self._select(batch)
        metrics, grad_norm = self._backward(batch, selections, totals)
        if not math.isfinite(grad_norm):
            raise RuntimeError(
                f"step {step}: the gradient norm must be finite, got {grad_norm}; the weights were not changed. Look "
                "for NaN logits (half precision overflow, a learning rate too high) in the last metrics. On GPUs, "
                "ranks called differently get NaN too; TORCH_DISTRIBUTED_DEBUG=DETAIL names what differs"
            )
        self._take_step()
        self.weight_version += 1
        metrics |= {name: float(value) for name, value in selection_metrics.items()}
        return metrics | {"actor/grad_norm": grad_norm, "actor/lr": lr}

    def _select(self, batch: Batch) -> tuple[list[Selections], dict[str, Tensor], Totals]:
        """The controls' selections for every micro-batch of all ranks, their metrics, the mini-batch's denominators.

        Every rank has the whole mini-batch and computes the same integers, so nothing is communicated.
        """
        micro_batches = self._micro_batches(batch)
        metrics: dict[str, Tensor] = {}
        totals = Totals(num_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        selections: list[Selections] = [[None] * len(self.controls) for _ in micro_batches]
        if any(selects(control) for control in self.controls):
            stats = self._selection_stats(batch)
            tokens = [
                micro.loss_tokens(micro.loss_mask, **{name: x[index[micro.loss_mask]] for name, x in stats.items()})
                for micro, index in micro_batches
            ]
            selections, metrics = select(self.controls, tokens, step=self.weight_version, config=self.loss)
            if any(chosen is not None and chosen.drop is not None for row in selections for chosen in row):
                totals = mini_batch_totals(tokens, selections)
        for i, control in enumerate(self.controls):
            if control.name in batch.selected:  # chosen in `begin`
                for row, (micro, _) in zip(selections, micro_batches, strict=True):
                    row[i] = Selection(micro.selected[control.name][micro.loss_mask])
        return selections, metrics, totals

    def _selection_stats(self, batch: Batch) -> PolicyStats:
        """What the controls select by, under the current policy."""
        names = ["logprob", *(["entropy"] if "entropy" in needs(list(filter(selects, self.controls))) else [])]
        if batch.logprob_version == self.weight_version and self.selects_by_old_logprob:
            return {name: getattr(batch, "old_logprob" if name == "logprob" else name) for name in names}
        with torch.no_grad():
            return self._forward(self.model, batch, names)

    def _policy_loss(
        self, micro: Batch, at: Tensor, stats: TokenStats, selections: Selections, totals: Totals
    ) -> tuple[Tensor, Tokens, dict[str, Tensor]]:
        """(loss, its tokens, metrics) of the entries `at` of a micro-batch; `stats` and `selections` hold these."""
        tokens = micro.loss_tokens(at, stats.logprob, entropy=stats.entropy, clamped_entropy=stats.clamped_entropy)
        sequences = SequenceIndex(micro.sequence[at], micro.num_sequences, self.sequence_group)
        loss, metrics = policy_loss(
            tokens, self.loss, totals=totals, controls=self.controls, selections=selections, sequences=sequences
        )
        return loss, replace(tokens, loss_mask=kept_tokens(tokens, selections)), metrics

    @abstractmethod
    def _micro_batches(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """(micro-batch, positions of its tokens in `batch`), those of all ranks in order."""

    @abstractmethod
    def _forward(self, model: nn.Module, batch: Batch, names: Sequence[str], **options: Any) -> PolicyStats:
        """The fields `names` of `token_stats(..., **options)`, as `compute_logprobs` returns them. Collective.

        The temperature is the rollouts', unless the options have another.
        """

    @abstractmethod
    def _backward(self, batch: Batch, selections: list[Selections], totals: Totals) -> tuple[dict[str, float], float]:
        """Leaves the mini-batch's gradient in the model; its metrics, and the norm before clipping. Collective."""

    @abstractmethod
    def _take_step(self) -> None:
        """The optimizer's step along the gradient of `_backward`, clipped to `config.max_grad_norm`. Collective."""
