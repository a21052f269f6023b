"""The base of the actors of all backends: the statistics of the policy, and the update by the policy loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

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
from entcov.diagnostics import ENTROPY_CHANGE, entropy_change
from entcov.objective.policy_loss import policy_loss
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig
from entcov.rl.interfaces import PolicyStats
from entcov.rl.trained_model import Selections, TrainedModel
from entcov.stats.token_stats import TokenStats


def needs_reference(loss: PolicyLossConfig, controls: Sequence[Control]) -> bool:
    """Whether the reference policy, that of the run's start, is kept and scores every rollout."""
    return loss.kl_coef > 0 or "ref_logprob" in needs(controls)


class PolicyActor(TrainedModel):
    """An `entcov.rl.interfaces.Actor` without its model's passes.

    Args:
        reference: a frozen model, where `needs_reference`.
        temperature: the policy is softmax(logits / temperature), except for sequences with a temperature of their own.
    """

    what = "actor"
    selects_by_old_logprob = True  # on the first update after a rollout, where the policy is still the old one
    # Called with a control's name, the token_id of the loss tokens of a micro-batch, and what it chose of them.
    on_selection: Callable[[str, Tensor, Selection], None] | None = None

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
        super().__init__(model, config, temperature=temperature, reference=reference)
        self.loss, self.controls = loss, list(controls)
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

        The controls select over the whole mini-batch, under the current policy, before the first backward pass.
        """
        selections, found, totals = self._select(batch)
        return self._optimize(batch, selections, totals, step, found)

    def _select(self, batch: Batch) -> tuple[list[Selections], dict[str, Tensor], Totals]:
        """The controls' selections for every micro-batch of this replica, the mini-batch's metrics and denominators.

        Each replica has its own micro-batches; what all of them decide comes from sums of integers over the replicas.
        """
        micro_batches = self._micro_batches(batch)
        metrics: dict[str, Tensor] = {}
        totals = Totals(num_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        selections: list[Selections] = [[None] * len(self.controls) for _ in micro_batches]
        if any(selects(control) for control in self.controls):
            stats = self._selection_stats(batch.logprob_version, micro_batches)
            tokens = [
                micro.loss_tokens(micro.loss_mask, **own) for micro, own in zip(micro_batches, stats, strict=True)
            ]
            group = self.batch_group
            selections, metrics = select(self.controls, tokens, step=self.weight_version, config=self.loss, group=group)
            if any(chosen is not None and chosen.drop is not None for row in selections for chosen in row):
                totals = mini_batch_totals(tokens, selections, group=group)
        for i, control in enumerate(self.controls):
            if control.name in batch.selected:  # chosen in `begin`
                for row, micro in zip(selections, micro_batches, strict=True):
                    row[i] = Selection(micro.selected[control.name][micro.loss_mask])
        if self.on_selection is not None:
            for row, micro in zip(selections, micro_batches, strict=True):
                for control, chosen in zip(self.controls, row, strict=True):
                    if chosen is not None:
                        self.on_selection(control.name, micro.token_id[micro.loss_mask], chosen)
        return selections, metrics, totals

    def _selection_stats(self, version: int | None, micro_batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """What the controls select by, of each micro-batch's loss tokens, under the current policy.

        `version`: of the policy that the micro-batches' `old_logprob` is from.
        """
        names = ["logprob", *(["entropy"] if "entropy" in needs(list(filter(selects, self.controls))) else [])]
        if version == self.weight_version and self.selects_by_old_logprob:
            columns = {name: "old_logprob" if name == "logprob" else name for name in names}
            return [{name: getattr(m, column)[m.loss_mask] for name, column in columns.items()} for m in micro_batches]
        with torch.no_grad():
            found = self._score(self.model, micro_batches, names)
        return [dict(zip(names, own, strict=True)) for own in found]

    def _loss(
        self, micro: Batch, at: Tensor, stats: TokenStats, selections: Selections, totals: Totals
    ) -> tuple[Tensor, Tokens, dict[str, Tensor]]:
        tokens = micro.loss_tokens(
            at, stats.logprob, entropy=stats.entropy, clamped_entropy=stats.clamped_entropy,
            old_entropy=micro.entropy[at],
        )  # fmt: skip
        sequences = SequenceIndex(micro.sequence[at], micro.num_sequences, self.sequence_group)
        loss, metrics = policy_loss(
            tokens, self.loss, totals=totals, controls=self.controls, selections=selections, sequences=sequences
        )
        tokens = replace(tokens, loss_mask=kept_tokens(tokens, selections))
        predicted, measured = entropy_change(
            stats.logprob, stats.entropy, old_logprob=tokens.old_logprob, old_entropy=tokens.old_entropy,
            rollout_logprob=tokens.rollout_logprob,
        )  # fmt: skip
        for name, change in zip(ENTROPY_CHANGE, (predicted, measured, predicted - measured), strict=True):
            metrics[name] = torch.where(tokens.loss_mask, change, 0.0).sum() / totals.num_tokens
        return loss, tokens, metrics
