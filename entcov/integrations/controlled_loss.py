"""The policy loss with entropy controls, for training loops that are not entcov's.

A trainer divides a mini-batch over micro-batches and data-parallel ranks. A control must see all of it: it selects
tokens before the first backward pass, and the losses have the denominators of the whole mini-batch. `ControlledLoss`
keeps that order. The plug-ins of this folder are made of it; docs/own_loop.md has a loop of twenty lines.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.controls import (
    Control,
    Progress,
    Selection,
    begin,
    check_composition,
    check_objective,
    clamp_arguments,
    mini_batch_totals,
    needs,
    select,
    selects,
)
from entcov.integrations.gather import gather_tokens
from entcov.integrations.remembered import Remembered, decides, reads_rollout
from entcov.objective.policy_loss import policy_loss
from entcov.objective.sequences import SequenceIndex
from entcov.objective.token_means import token_means
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.stats.ranks import attempt

ENTROPIES = ("entropy", "sampled_entropy", "clamped_entropy")


class ControlledLoss:
    """`entcov.policy_loss` with a list of controls, over a mini-batch that nobody holds as a whole.

    The order of a training step, on every rank:

        controlled.begin(step=..., steps=..., rollout=...)       once per rollout
            update = controlled.update(micro_batches)            before an optimizer update
                loss, _ = update.loss(i, tokens)                 for every micro-batch; then loss.backward()
            metrics = update.finish()                            after it
        metrics = controlled.after_step()                        once per rollout, after its last update

    Losses of all micro-batches and ranks ADD UP to that of the mini-batch. Where the trainer averages gradients over
    ranks (DDP, FSDP), multiply the loss by `ranks`.

    Args:
        controls: entropy controls, see entcov/controls; an empty list gives the plain loss.
        loss: knobs of `policy_loss`.
        group: the data-parallel ranks that share a mini-batch; each has tokens that no other one has. None: this
            process has the whole mini-batch (not torch's default group). Ranks that hold the same tokens (tensor
            parallel) make the same calls, each in its own data-parallel group.
    Raises: ValueError for controls that make no sense together or not with the objective, by name.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        loss: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008  frozen
        *,
        group: dist.ProcessGroup | None = None,
    ):
        for control in controls:
            if not isinstance(control, Control):
                raise TypeError(f"controls must hold controls (entcov.controls.make_control), got {control!r}")
        check_composition(controls)
        check_objective(controls, loss)
        self.controls, self.loss, self.group = list(controls), loss, group
        self.updates = 0  # optimizer updates done
        self._progress: Progress | None = None  # None between two steps
        self._remembered: Remembered | None = None
        self._scored: dict[str, float] = {}
        self._updated: dict[str, float] = defaultdict(float)  # sums over the tokens of the step's updates
        self._tokens = 0  # of these updates
        self._open: Update | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Of "selection", "entropy", "clamped_entropy", "ref_logprob": the fields of tokens that the loss reads.

        "old_entropy" is not among them: `begin` remembers the rollout's `entropy`.
        """
        return needs(self.controls) - {"old_entropy"}

    @property
    def clamp(self) -> dict[str, Any]:
        """Arguments of `token_stats` for the clamped entropy, {} where no control needs it."""
        return clamp_arguments(self.controls)

    @property
    def selects(self) -> bool:
        """Whether `update` reads the current policy's log-probability (and entropy, where `needs` names it)."""
        return any(selects(control) for control in self.controls)

    @property
    def begins(self) -> bool:
        """Whether `begin` needs the rollout's tokens: a control decides over them, adapts to their means, or compares a
        token's entropy with that in the rollout."""
        return any(map(reads_rollout, self.controls))

    @property
    def ranks(self) -> int:
        """Data-parallel ranks that share a mini-batch."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def begin(
        self,
        *,
        step: int,
        steps: int,
        rollout: Tokens | None = None,
        epoch: int | None = None,
        epochs: int | None = None,
    ) -> dict[str, float]:
        """Begins a training step: the controls decide what depends on the scored policy alone.

        What they decide is remembered by `token_id`: `update` and `Update.loss` give every token the advantage that it
        was shaped to, and leave out what was dropped.

        Args:
            step: of the run, from 1.
            steps: training steps of the whole run.
            rollout: this rank's tokens of the whole rollout, with the statistics of the policy that scored them and
                without gradient: `logprob` (equal to `old_logprob`), `entropy`, `entropy_drift` (token_stats with
                moments=True), `clamped_entropy` where `clamp` asks for it; `token_id`, unique over all ranks and the
                same for every division over ranks; and what the controls' `begin` reads: `sequence` and `group` (equal
                numbers on all ranks), `position`, `reward`. Must be given if `begins`.
            epoch, epochs: over the training data, from 1, where the trainer has epochs.
        Returns: the controls' metrics of the rollout.
        Collectives over `group`: 1 all-reduce for the means if there is a rollout; those of `gather_tokens` if a
            control decides over the rollout. Then every rank holds its loss tokens until the call returns.
        Raises: ValueError where the rollout is missing, or lacks a field; what a control's `begin` raises. On the CPU
            an error of one rank is raised on all.
        """
        if self._open is not None:
            raise RuntimeError("begin: finish() of the last update must be called first")
        check.integer("step", step, 1)
        check.integer("steps", steps, step)
        if rollout is None and self.begins:
            name = next(control.name for control in self.controls if reads_rollout(control))
            raise ValueError(f"rollout must be given for control {name}, which reads all of it; got None")
        self._remembered, self._scored, self._updated, self._tokens = None, {}, defaultdict(float), 0
        self._progress = Progress(step, steps, self.updates, epoch, epochs)
        if rollout is None:
            return {}
        with torch.no_grad():
            values = {"sampled_entropy": -rollout.logprob}
            values |= {n: getattr(rollout, n) for n in ENTROPIES if getattr(rollout, n, None) is not None}
            remembered, failure = attempt(lambda: Remembered.of(rollout, self.controls), self.group)
            try:  # a rank that failed enters the collective, without a mask, so that the others do not wait for it
                means = token_means(values, None if failure else rollout.loss_mask, group=self.group).mean
            except Exception as error:
                raise failure or error from None
            self._scored = {f"scored/{name}": float(mean) for name, mean in means.items()}
            self._remembered = remembered
            if not any(map(decides, self.controls)):
                return {}
            whole = gather_tokens(rollout, self.group)
            shaped = begin(self.controls, whole, self._progress)
            self._remembered.add(whole, shaped)
        return shaped.metrics

    def update(self, micro_batches: Sequence[Tokens], *, num_sequences: int | None = None) -> "Update":
        """Opens an optimizer update: the controls select over the mini-batch of all ranks.

        Args:
            micro_batches: those of this rank, at least one, of whole responses; `sequence` must be set, and `token_id`
                for selections. `logprob` is the current policy's, without gradient; only read if `selects` (otherwise
                `old_logprob` will do in its place). Other fields: what the controls read (`Control.reads`).
            num_sequences: divisor of the seq-* aggregations over all ranks, for trainers that count responses without
                a loss token too. Default: those that have one.
        Collectives over `group`: those of `entcov.controls.select` if `selects`, and 1 all-reduce of 16 bytes.
        Raises: as `entcov.controls.select`; RuntimeError outside of a step, or before `finish` of the last update.
        """
        if self._progress is None:
            raise RuntimeError("update: begin(step=..., steps=...) of this training step must be called first")
        if self._open is not None:
            raise RuntimeError("update: finish() of the last update must be called first")
        if num_sequences is not None:
            check.integer("num_sequences", num_sequences, 1)
        tokens, failure = attempt(lambda: [self._with_remembered(own) for own in micro_batches], self.group)
        metrics: dict[str, float] = {}
        rows: list[list[Selection | None]] = [[None] * len(self.controls) for _ in micro_batches]
        try:  # a rank that failed enters the first collective, without tokens, so that the others do not wait for it
            if self.selects:
                rows, found = select(self.controls, tokens or [], step=self.updates, config=self.loss, group=self.group)
                metrics = {name: float(value) for name, value in found.items()}
            elif failure is not None:
                mini_batch_totals([], [], group=self.group)
        except Exception as error:
            raise failure or error from None
        if failure is not None:
            raise failure
        for i, control in enumerate(self.controls):
            if control.scope == "rollout":
                for row, own in zip(rows, tokens, strict=True):
                    row[i] = Selection(self._remembered.selected(control.name, own))
        totals = mini_batch_totals(tokens, rows, group=self.group)
        if num_sequences is not None:
            totals = Totals(totals.num_tokens, num_sequences)
        self._open = Update(self, totals, rows, metrics, tokens)
        return self._open

    def after_step(self) -> dict[str, float]:
        """Ends a training step: the controls adapt to its means. Returns their metrics; {} if nothing was updated."""
        if self._progress is None or self._open is not None:
            first = "finish() of the last update" if self._open is not None else "begin(step=..., steps=...)"
            raise RuntimeError(f"after_step: {first} must be called first")
        metrics: dict[str, float] = {}
        if self._tokens:
            means = self._scored | {f"updated/{name}": x / self._tokens for name, x in self._updated.items()}
            progress = replace(self._progress, update=self.updates)
            for control in self.controls:
                metrics |= control.after_step(means, progress)
        self._progress, self._remembered = None, None
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """A JSON tree: the number of updates, and the controls' state.

        What `begin` decided is not in it: a run that goes on from the middle of a step begins that step again.
        """
        controls = [{"name": control.name, "state": control.state_dict()} for control in self.controls]
        return {"updates": self.updates, "controls": controls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for a state of other controls; nothing is changed then."""
        if set(state) != {"updates", "controls"}:
            raise ValueError(f"state must have keys controls and updates, got {sorted(state)}")
        check.integer("updates", state["updates"], 0)
        saved, own = [one["name"] for one in state["controls"]], [control.name for control in self.controls]
        if saved != own:
            raise ValueError(f"state must be that of the controls {own}, got that of {saved}")
        before = [control.state_dict() for control in self.controls]
        try:
            for control, one in zip(self.controls, state["controls"], strict=True):
                control.load_state_dict(one["state"])
        except Exception:
            for control, old in zip(self.controls, before, strict=True):
                control.load_state_dict(old)
            raise
        self.updates = state["updates"]
        self._progress = self._remembered = self._open = None

    def _with_remembered(self, tokens: Tokens) -> Tokens:
        if not isinstance(tokens, Tokens):
            raise TypeError(f"tokens must be entcov.Tokens, got {type(tokens).__name__}")
        return tokens if self._remembered is None else self._remembered.applied_to(tokens)

    def _finish(self, sums: Mapping[str, Tensor], totals: Totals) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name] for name in names])
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        metrics = dict(zip(names, values.tolist(), strict=True))
        means = {name: metrics[f"actor/{name}"] for name in ENTROPIES if f"actor/{name}" in metrics}
        count = int(totals.num_tokens)
        self._open, self._tokens = None, self._tokens + count
        self.updates += 1
        for name, value in means.items():
            self._updated[name] += value * count
        for control in self.controls:
            control.after_update(means, replace(self._progress, update=self.updates))
        return metrics


class Update:
    """One optimizer update, opened by `ControlledLoss.update`.

    totals: the denominators of the mini-batch over all ranks, without what a control drops
    selections: [micro-batch][control]
    metrics: of the selection, over the whole mini-batch: actor/cov_mean, actor/cov_p999 ...; {} where nothing selects
    """

    def __init__(
        self,
        controlled: ControlledLoss,
        totals: Totals,
        selections: list[list[Selection | None]],
        metrics: dict[str, float],
        micro_batches: Sequence[Tokens],
    ):
        self.totals, self.selections, self.metrics = totals, selections, metrics
        self._controlled = controlled
        self._token_ids = [tokens.token_id for tokens in micro_batches]
        self._sizes = [len(tokens.loss_mask) for tokens in micro_batches]
        self._left = list(self._sizes)  # tokens whose loss is still missing
        self._unused = set(range(len(micro_batches)))
        self._sums: dict[str, Tensor] = {}

    def loss(
        self, number: int, tokens: Tokens, *, sequences: SequenceIndex | None = None, part: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of micro-batch `number`, as `entcov.policy_loss` returns them; both are sums.

        Args:
            number: index in the list that `update` was given.
            tokens: the same tokens in the same order, `logprob` and entropies with gradient.
            sequences: as for `policy_loss`, where the host must not wait or ranks divide sequences.
            part: [n] int64, where the trainer divides the micro-batch further, into whole responses, in a way that was
                not known before: the positions of `tokens` in it. Then one call for each part.
        Raises: as `policy_loss`; ValueError for another micro-batch's tokens; RuntimeError for a second call.
        """
        count = len(tokens.loss_mask)
        self._check_unused(number, count)
        tokens, given = self._controlled._with_remembered(tokens), self._token_ids[number]
        chosen = self.selections[number]
        if part is not None:
            given = None if given is None else given[part]
            chosen = [one if one is None else one.at(part) for one in chosen]
        if given is not None and tokens.token_id is not None and check.readable(given):
            if not torch.equal(given, tokens.token_id):
                raise ValueError(f"tokens must be those of micro-batch {number}, in its order: their token_id differ")
        loss, metrics = policy_loss(
            tokens,
            self._controlled.loss,
            totals=self.totals,
            controls=self._controlled.controls,
            selections=chosen,
            sequences=sequences,
        )
        self._add(number, count, metrics)
        return loss, metrics

    def computed(self, number: int, metrics: Mapping[str, Tensor]) -> None:
        """In place of `loss`, where other processes have called `policy_loss` with `totals` and `selections`.

        Args:
            metrics: that `policy_loss` returned, summed over these processes.
        Raises: ValueError or RuntimeError for the number, as `loss`.
        """
        self._check_unused(number, None)
        self._add(number, self._sizes[number], metrics)

    def _check_unused(self, number: int, count: int | None) -> None:
        """Raises unless that many tokens of the micro-batch (None: all) are still without a loss."""
        check.integer("number", number, 0)
        if number >= len(self.selections):
            raise ValueError(f"number must be below {len(self.selections)}, the number of micro-batches; got {number}")
        count = self._sizes[number] if count is None else count
        if self._controlled._open is not self or count > self._left[number]:
            raise RuntimeError(f"loss: micro-batch {number} of this update has been used already")

    def _add(self, number: int, count: int, metrics: Mapping[str, Tensor]) -> None:
        self._left[number] -= count
        self._unused.discard(number)
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def finish(self) -> dict[str, float]:
        """Closes the update: the controls adapt to its means. Returns the mini-batch's metrics, equal on all ranks.

        Collectives over the group: 1 all-reduce of 8 bytes a metric. The host waits for the metrics.
        Raises: RuntimeError while the loss of a micro-batch is missing, or for a second call.
        """
        if self._controlled._open is not self:
            raise RuntimeError("finish: this update is closed already")
        missing = [number for number, left in enumerate(self._left) if left or number in self._unused]
        if missing:
            raise RuntimeError(f"finish: loss() must be called for every micro-batch first, missing are {missing}")
        return self.metrics | self._controlled._finish(self._sums, self.totals)

    def abandon(self) -> None:
        """Closes an update that failed half way, so that the step can go on; nothing adapts."""
        if self._controlled._open is self:
            self._controlled._open = None


def entcov_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under `entcov/...`, for trainers that have metrics of their own under the names `actor/...`."""
    return {"entcov/" + name.removeprefix("actor/"): value for name, value in metrics.items()}
