"""Entropy controls: one method a file, one registry, and the selection step that the trainer calls."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.controls.adaptive_bonus import AdaptiveBonus
from entcov.controls.aent import AEnt
from entcov.controls.base import Control, Effect
from entcov.controls.clip_cov import ClipCov
from entcov.controls.entropy_bonus import EntropyBonus
from entcov.controls.kl_cov import KLCov
from entcov.controls.none import NoControl
from entcov.objective.selection import check_counter
from entcov.objective.token_covariance import covariance_over, covariance_summary
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.stats.ranks import AllReduces, attempt

CONTROLS: dict[str, type[Control]] = {
    cls.name: cls for cls in (NoControl, EntropyBonus, AdaptiveBonus, ClipCov, KLCov, AEnt)
}

__all__ = ["CONTROLS", "Control", "Effect", "clamp_arguments", "make_control", "needs", "select"]


def make_control(name: str, **knobs: Any) -> Control:
    """The control called `name` with the given knobs; an unknown name or knob is an error that lists the known ones."""
    check.one_of("control name", name, CONTROLS)
    known = {field.name for field in fields(CONTROLS[name])}
    for knob in knobs:
        if knob not in known:
            raise ValueError(
                f"control {name} has no knob {knob!r}; it has {', '.join(sorted(known)) or 'none'}"
                + check.suggestion(knob, known)
            )
    return CONTROLS[name](**knobs)


def needs(controls: Sequence[Control]) -> frozenset[str]:
    """What the trainer must compute for these controls: of "selection", "entropy", "clamped_entropy"."""
    return frozenset().union(*(control.needs for control in controls))


def clamp_arguments(controls: Sequence[Control]) -> dict[str, Any]:
    """Arguments of `token_stats` for the clamped entropy. Two controls that need different ones are an error."""
    wanted = [(control.name, control.clamp) for control in controls if control.clamp]
    if any(clamp != wanted[0][1] for _, clamp in wanted):
        raise ValueError(f"controls must agree on the clamped entropy, got {wanted}")
    return dict(wanted[0][1]) if wanted else {}


@torch.no_grad()
def select(
    controls: Sequence[Control],
    micro_batches: Sequence[Tokens],
    *,
    step: int,
    config: PolicyLossConfig,
    group: dist.ProcessGroup | None = None,
) -> tuple[list[list[Tensor | None]], dict[str, Tensor]]:
    """Selections of one optimizer mini-batch, and the covariance of its tokens.

    Controls with scope "global" choose the same tokens however the mini-batch is split into micro-batches and over
    ranks; those with scope "micro_batch" see one micro-batch at a time.

    Args:
        micro_batches: all micro-batches of this rank, at least one, which may be empty of loss tokens; `logprob` is
            that of the policy about to be updated.
        step: number of the mini-batch in the run; every random choice depends on it.
        config: of the loss that follows.
        group: data-parallel group. None: this process has the whole mini-batch.
    Returns: (selections, metrics). selections[i] goes to `policy_loss` with micro_batches[i]. metrics describe the
        whole mini-batch, are equal on all ranks and must not be added up: actor/cov_mean, actor/cov_max,
        actor/cov_p999 (with no control too), actor/cov_threshold.
    Collectives: 4 all-reduces for the metrics and 6 (Clip-Cov) or 8 (KL-Cov) more for each control with a selection
        and global scope, 2 MiB and 2.5 or 3.5 MiB more, for every batch; every rank must call with the same
        controls.
    Raises: ValueError where a field is missing, a value is bad or the whole mini-batch has no token under the mask.
        RuntimeError where another rank failed, or was called with another step, config or controls. On an accelerator
        all metrics are NaN there instead (ranks with other controls do not enter as many collectives, though).
    """
    alone: dict[int, list[Tensor]] = {}  # selections of the controls that see one micro-batch at a time

    def prepared() -> Tokens:
        check_counter("step", step)
        everything = Tokens.cat(micro_batches)
        for i, control in enumerate(controls):
            if "selection" in control.needs:
                control.check(everything)
                if control.scope == "micro_batch":
                    alone[i] = [control.select(tokens, step=step, config=config)[0] for tokens in micro_batches]
        return everything

    everything, failure = attempt(prepared, group)
    if failure is not None:  # the other ranks enter the collectives: so does this one, without tokens
        everything = _no_tokens(micro_batches)
        micro_batches, step = [everything], 0
    call = {"step": step, "config": config, "controls": []}
    for control in controls:  # their knobs too must be equal on every rank
        knobs = {name: v for name, v in vars(control).items() if isinstance(v, bool | int | float | str)}
        call["controls"].append((control.name, knobs))
    ranks = AllReduces("select", group, everything.logprob.device, call, failure=failure)
    parts = everything.logprob, everything.advantage, everything.loss_mask
    covariance = covariance_over(ranks, *parts, 0.0, failure is not None)
    metrics = covariance_summary(covariance, group=group)
    sizes = [len(tokens.loss_mask) for tokens in micro_batches]
    columns: list[Sequence[Tensor | None]] = []
    for i, control in enumerate(controls):
        if "selection" not in control.needs:
            columns.append([None] * len(micro_batches))
        elif control.scope == "micro_batch":
            columns.append(alone.get(i, [everything.loss_mask] * len(micro_batches)))
        else:
            mask, extra = control.select(everything, step=step, config=config, group=group)
            metrics.update(extra)
            columns.append(mask.split(sizes))
    ranks.finish()
    return [[column[i] for column in columns] for i in range(len(micro_batches))], metrics


def _no_tokens(micro_batches: Sequence[Tokens]) -> Tokens:
    """The tokens of a rank that has none, on the device of those that it was given."""
    parts = micro_batches if isinstance(micro_batches, Sequence) else []
    device = next((x.device for part in parts for x in vars(part).values() if isinstance(x, Tensor)), None)
    nothing = torch.zeros(0, device=device)
    return Tokens(nothing, nothing, nothing, nothing.bool(), token_id=nothing.long())
