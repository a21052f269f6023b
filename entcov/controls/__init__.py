"""Entropy controls: one method a file, one registry, and the selection step that the trainer calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import _checks as check
from entcov.controls.adaptive_bonus import AdaptiveBonus
from entcov.controls.aent import AEnt
from entcov.controls.base import Control, Effect
from entcov.controls.clip_cov import ClipCov
from entcov.controls.entropy_bonus import EntropyBonus
from entcov.controls.kl_cov import KLCov
from entcov.controls.none import NoControl
from entcov.covariance import covariance_summary, token_covariance
from entcov.losses import PolicyLossConfig, Tokens

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
    """Arguments of `token_stats` for the clamped entropy. Controls that want different ones cannot go together."""
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
        and global scope, 2 MiB and as much or 3 MiB more, whatever the batch; every rank must call with the same
        controls.
    Raises: ValueError where a field is missing, a value is bad or the whole mini-batch has no token under the mask.
    """
    everything = Tokens.cat(micro_batches)
    sizes = [len(tokens.loss_mask) for tokens in micro_batches]
    covariance = token_covariance(everything.logprob, everything.advantage, everything.loss_mask, group=group)
    metrics = covariance_summary(covariance, group=group)
    columns: list[Sequence[Tensor | None]] = []
    for control in controls:
        if "selection" not in control.needs:
            columns.append([None] * len(micro_batches))
        elif control.scope == "micro_batch":
            columns.append([control.select(tokens, step=step, config=config)[0] for tokens in micro_batches])
        else:
            mask, extra = control.select(everything, step=step, config=config, group=group)
            metrics.update(extra)
            columns.append(mask.split(sizes))
    return [[column[i] for column in columns] for i in range(len(micro_batches))], metrics
