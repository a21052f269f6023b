"""The base of the actors of all backends: the statistics of the policy, and one optimizer step.

A backend's actor adds the passes through its model: `_forward`, `_micro_batches`, `_backward`, `_take_step`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entcov.controls import Control, clamp_arguments, needs, select
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig
from entcov.rl.interfaces import PolicyStats
from entcov.stats.token_stats import TokenStats

Selection = list[Tensor | None]  # of one micro-batch: a mask over its loss tokens for each control that selects


class PolicyActor(ABC):
    """An `entcov.rl.interfaces.Actor` without its model's passes.

    Args:
        reference: a frozen model, where `loss.kl_coef` > 0.
        temperature: the policy is softmax(logits / temperature).
    """

    optimizer: Any  # has `param_groups`
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
        if loss.kl_coef > 0 and reference is None:
            raise ValueError(f"reference: a reference model is needed where loss.kl_coef > 0, got {loss.kl_coef}")
        self.model, self.reference = model, reference
        self.config, self.loss, self.controls = config, loss, list(controls)
        self.temperature = temperature
        self.weight_version = 0  # optimizer steps taken
        self.clamp = clamp_arguments(self.controls)

    @torch.no_grad()
    def compute_logprobs(self, batch: Batch) -> PolicyStats:
        names = ["logprob", "entropy", "entropy_drift", *(["clamped_entropy"] if self.clamp else [])]
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
        selections, selection_metrics = self._select(batch)
        totals = Totals(num_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
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

    def _select(self, batch: Batch) -> tuple[list[Selection], dict[str, Tensor]]:
        """The controls' selections for every micro-batch of all ranks, and their metrics.

        Every rank has the whole mini-batch and computes the same integers, so nothing is communicated.
        """
        micro_batches = self._micro_batches(batch)
        if "selection" not in needs(self.controls):
            return [[None] * len(self.controls) for _ in micro_batches], {}
        fresh = batch.logprob_version == self.weight_version
        if fresh and self.selects_by_old_logprob:
            logprob = batch.old_logprob
        else:
            with torch.no_grad():
                logprob = self._forward(self.model, batch, ["logprob"])["logprob"]
        tokens = [
            loss_tokens(micro, micro.loss_mask, logprob[index[micro.loss_mask]]) for micro, index in micro_batches
        ]
        return select(self.controls, tokens, step=self.weight_version, config=self.loss)

    def _policy_loss(
        self, micro: Batch, at: Tensor, stats: TokenStats, selection: Selection, totals: Totals
    ) -> tuple[Tensor, Tokens, dict[str, Tensor]]:
        """(loss, its tokens, metrics) of the entries `at` of a micro-batch; `stats` and `selection` hold these."""
        tokens = loss_tokens(micro, at, stats.logprob, entropy=stats.entropy, clamped_entropy=stats.clamped_entropy)
        loss, metrics = policy_loss(tokens, self.loss, totals=totals, controls=self.controls, selections=selection)
        return loss, tokens, metrics

    @abstractmethod
    def _micro_batches(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """(micro-batch, positions of its tokens in `batch`), those of all ranks in order."""

    @abstractmethod
    def _forward(self, model: nn.Module, batch: Batch, names: Sequence[str], **options: Any) -> PolicyStats:
        """The fields `names` of `token_stats(..., **options)`, as `compute_logprobs` returns them. Collective.

        The temperature is the rollouts', unless the options have another.
        """

    @abstractmethod
    def _backward(self, batch: Batch, selections: list[Selection], totals: Totals) -> tuple[dict[str, float], float]:
        """Leaves the mini-batch's gradient in the model; its metrics, and the norm before clipping. Collective."""

    @abstractmethod
    def _take_step(self) -> None:
        """The optimizer's step along the gradient of `_backward`, clipped to `config.max_grad_norm`. Collective."""


def loss_tokens(micro: Batch, at: Tensor, logprob: Tensor, **statistics: Tensor | None) -> Tokens:
    """The loss's view of the entries `at` (mask or indices) of a micro-batch; `logprob` and `statistics` hold these."""
    return Tokens(
        logprob=logprob,
        old_logprob=micro.old_logprob[at],
        advantage=micro.advantage[at],
        loss_mask=micro.loss_mask[at],
        ref_logprob=None if micro.ref_logprob is None else micro.ref_logprob[at],
        rollout_logprob=micro.rollout_logprob[at],
        sequence_length=micro.sequence_length[at],
        token_id=micro.token_id[at],
        **statistics,
    )
