"""Entropy controls: one method a file, one registry, and the selection step that the trainer calls."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.controls.adaptive_bonus import AdaptiveBonus
from entcov.controls.adaptive_clip import AdaptiveClip
from entcov.controls.aent import AEnt
from entcov.controls.base import Control, Effect, Progress, Selection, Shaping, kept_tokens
from entcov.controls.clip_b import ClipB
from entcov.controls.clip_cov import ClipCov
from entcov.controls.clip_v import ClipV
from entcov.controls.difficulty_bonus import DifficultyBonus
from entcov.controls.entropic import EntroPIC
from entcov.controls.entropy_advantage import EntropyAdvantage
from entcov.controls.entropy_bonus import EntropyBonus
from entcov.controls.entropy_ratio_clip import EntropyRatioClip
from entcov.controls.high_entropy_tokens import HighEntropyTokens
from entcov.controls.kl_cov import KLCov
from entcov.controls.none import NoControl
from entcov.controls.perplexity_shaping import PerplexityShaping
from entcov.controls.position_shaping import PositionShaping
from entcov.controls.positive_advantage_reweighting import PositiveAdvantageReweighting
from entcov.controls.relative_entropy import RelativeEntropy
from entcov.controls.sent import SENT
from entcov.objective.selection import check_counter
from entcov.objective.token_covariance import covariance_over, covariance_summary
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.registry import Registry
from entcov.stats.ranks import AllReduces, attempt

CONTROLS = Registry(
    "control",
    Control,
    (
        NoControl, EntropyBonus, AdaptiveBonus, DifficultyBonus, AEnt, EntroPIC, ClipCov, KLCov, SENT, ClipB, ClipV,
        HighEntropyTokens, EntropyAdvantage, PositiveAdvantageReweighting, RelativeEntropy, PerplexityShaping,
        PositionShaping, EntropyRatioClip, AdaptiveClip,
    ),
    "entcov.controls",
)  # fmt: skip
make_control = CONTROLS.make

__all__ = [
    "CONTROLS", "Control", "Effect", "Progress", "Selection", "Shaped", "Shaping", "begin", "check_composition",
    "check_objective", "clamp_arguments", "make_control", "mini_batch_totals", "needs", "select",
]  # fmt: skip


def needs(controls: Sequence[Control]) -> frozenset[str]:
    """What the trainer must compute for these controls, see `Control.needs`."""
    return frozenset().union(*(control.needs for control in controls))


def clamp_arguments(controls: Sequence[Control]) -> dict[str, Any]:
    """Arguments of `token_stats` for the clamped entropy. Two controls that need different ones are an error."""
    wanted = [(control.name, control.clamp) for control in controls if control.clamp]
    if any(clamp != wanted[0][1] for _, clamp in wanted):
        raise ValueError(f"controls must agree on the clamped entropy, got {wanted}")
    return dict(wanted[0][1]) if wanted else {}


def check_composition(controls: Sequence[Control]) -> None:
    """Raises ValueError for controls that make no sense together, by their names and the reason."""
    for a, b in combinations(controls, 2):
        if a.name == b.name:
            raise ValueError(f"control: must not repeat an entry, got {a.name} twice")
        if NoControl.name in (a.name, b.name):
            raise ValueError(f"control: none stands for no control and must be alone, got {a.name}, {b.name}")
        for one in sorted(a.sets & b.sets):
            raise ValueError(f"control: {a.name} and {b.name} both set {one}; choose one of them")
    clamp_arguments(controls)


def check_objective(controls: Sequence[Control], config: PolicyLossConfig) -> None:
    """Raises ValueError if a control does not go with the objective of the loss."""
    for control in controls:
        if control.objectives is not None and config.objective not in control.objectives:
            raise ValueError(
                f"objective must be one of {', '.join(control.objectives)} for control {control.name} as it is set, "
                f"got {config.objective}"
            )


def selects(control: Control) -> bool:
    """Whether the control's `select` is called."""
    return "selection" in control.needs and control.scope != "rollout"


@dataclass
class Shaped:
    """What all controls together decided of a rollout; tensors are [T]."""

    advantage: Tensor
    drop: Tensor | None = None  # bool: these tokens leave the loss and its denominators
    selected: dict[str, Tensor] = field(default_factory=dict)  # by the control's name: the mask of its selections
    metrics: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def begin(controls: Sequence[Control], rollout: Tokens, progress: Progress) -> Shaped:
    """Calls `begin` of every control with the same `rollout`, and joins what they decide, whatever their order.

    advantage = advantage * (product of all multipliers) + (sum of all bonuses); a token is dropped if one control drops
    it.

    Args:
        rollout: the loss tokens of the whole rollout, `loss_mask` True everywhere; see `Control.begin`.
    Raises: ValueError or TypeError that names the control, for a tensor of another shape or dtype, an advantage that is
        not finite, or a control of scope "rollout" that selects nothing.
    Collectives: none. Nothing is mutated.
    """
    advantage, bonus, shaped = rollout.advantage, torch.zeros_like(rollout.advantage), Shaped(rollout.advantage)
    for control in controls:
        shaping = control.begin(rollout, progress) or Shaping()
        for name in ("multiplier", "bonus", "drop", "selected"):
            value, dtypes = getattr(shaping, name), (torch.float32, torch.float64)
            if value is not None:
                dtypes = dtypes if name in ("multiplier", "bonus") else (torch.bool,)
                check.vector(f"{name} of control {control.name}", value, dtypes, advantage)
        if shaping.multiplier is not None:
            advantage = advantage * shaping.multiplier
        if shaping.bonus is not None:
            bonus = bonus + shaping.bonus
        if shaping.drop is not None:
            shaped.drop = shaping.drop if shaped.drop is None else shaped.drop | shaping.drop
        if control.scope == "rollout":
            if shaping.selected is None:
                raise ValueError(f"control {control.name} has scope rollout and must select tokens in begin, got None")
            shaped.selected[control.name] = shaping.selected
        shaped.metrics |= shaping.metrics
    shaped.advantage = (advantage + bonus).to(rollout.advantage.dtype)
    check.finite("advantage", shaped.advantage)
    return shaped


def mini_batch_totals(
    micro_batches: Sequence[Tokens],
    selections: Sequence[Sequence[Selection | None]],
    *,
    group: dist.ProcessGroup | None = None,
) -> Totals:
    """The denominators of a mini-batch after `select`: without the tokens that a control drops.

    Args:
        micro_batches: those of this rank, whole sequences, with `sequence`; numbers differ between ranks.
        selections: as `select` returned them.
        group: data-parallel group. None: this process has the whole mini-batch.
    Returns: Totals of 0-d int64 tensors, at least 1, so that a mini-batch of which all is dropped has loss 0.
    Collectives: 1 all-reduce of 16 bytes, and 8 for each rank, where there is a group.
    Raises: ValueError without `sequence`. RuntimeError on every rank (CPU) where another rank failed.
    """

    def counted() -> Tensor:
        kept = [kept_tokens(tokens, chosen) for tokens, chosen in zip(micro_batches, selections, strict=True)]
        everything = Tokens.cat(micro_batches)
        if everything.sequence is None:
            raise ValueError("tokens.sequence must be given, mini_batch_totals counts by it; got None")
        mask = torch.cat(kept)
        sequences = everything.sequence[mask].unique().numel()
        return torch.stack([mask.sum(), torch.as_tensor(sequences, device=mask.device)])

    counts, failure = attempt(counted, group)
    if failure is not None:
        counts = torch.zeros(2, dtype=torch.int64, device=_device_of(micro_batches))
    ranks = AllReduces("mini_batch_totals", group, counts.device, {}, failure=failure)
    counts = ranks.sum(counts)
    ranks.finish()
    return Totals(*counts.clamp(min=1))


@torch.no_grad()
def select(
    controls: Sequence[Control],
    micro_batches: Sequence[Tokens],
    *,
    step: int,
    config: PolicyLossConfig,
    group: dist.ProcessGroup | None = None,
) -> tuple[list[list[Selection | None]], dict[str, Tensor]]:
    """Selections of one optimizer mini-batch, and the covariance of its tokens.

    Controls with scope "global" choose the same tokens however the mini-batch is split into micro-batches and over
    ranks; those with scope "micro_batch" see one micro-batch at a time. Those with scope "rollout" have chosen in
    `begin`, and have None here.

    Args:
        micro_batches: all micro-batches of this rank, at least one, which may be empty of loss tokens; `logprob` is
            that of the policy about to be updated.
        step: number of the mini-batch in the run; every random choice depends on it.
        config: of the loss that follows.
        group: data-parallel group. None: this process has the whole mini-batch.
    Returns: (selections, metrics). selections[i] goes to `policy_loss` with micro_batches[i]. metrics describe the
        whole mini-batch, are equal on all ranks and must not be added up: actor/cov_mean, actor/cov_max,
        actor/cov_p999 (with no control too), actor/cov_threshold.
    Collectives: 3 all-reduces of 0.5 MiB in all for the metrics; more for each control with a selection and global
        scope, for every batch: 6 of 1.5 MiB (clip_cov), 8 of 2 MiB (kl_cov, high_entropy_tokens), 1 of some words
        (entropic), 16 of 4 MiB (sent "paper") or 23 of 6 MiB (sent). Every rank must call with the same controls.
    Raises: ValueError where a field is missing, a value is bad or the whole mini-batch has no token under the mask.
        RuntimeError where another rank failed, or was called with another step, config or controls. On an accelerator
        all metrics are NaN there instead (ranks with other controls do not enter as many collectives, though).
    """
    alone: dict[int, list[Selection]] = {}  # selections of the controls that see one micro-batch at a time

    def prepared() -> Tokens:
        check_counter("step", step)
        check_objective(controls, config)
        everything = Tokens.cat(micro_batches)
        for i, control in enumerate(controls):
            if selects(control):
                control.check(everything)
                if control.scope == "micro_batch":
                    alone[i] = [control.select(tokens, step=step, config=config) for tokens in micro_batches]
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
    ends = list(accumulate((len(tokens.loss_mask) for tokens in micro_batches), initial=0))
    columns: list[Sequence[Selection | None]] = []
    for i, control in enumerate(controls):
        if not selects(control):
            columns.append([None] * len(micro_batches))
        elif control.scope == "micro_batch":
            columns.append(alone.get(i, [Selection(everything.loss_mask)] * len(micro_batches)))
        else:
            chosen = control.select(everything, step=step, config=config, group=group)
            metrics.update(chosen.metrics)
            columns.append([chosen.at(slice(a, b)) for a, b in pairwise(ends)])
    ranks.finish()
    return [[column[i] for column in columns] for i in range(len(micro_batches))], metrics


def _no_tokens(micro_batches: Sequence[Tokens]) -> Tokens:
    """The tokens of a rank that has none, on the device of those that it was given."""
    nothing = torch.zeros(0, device=_device_of(micro_batches))
    return Tokens(nothing, nothing, nothing, nothing.bool(), entropy=nothing, token_id=nothing.long())


def _device_of(micro_batches: Sequence[Tokens]) -> torch.device | None:
    parts = micro_batches if isinstance(micro_batches, Sequence) else []
    return next((x.device for part in parts for x in vars(part).values() if isinstance(x, Tensor)), None)
