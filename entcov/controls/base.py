"""What an entropy control is: the interface between a method and the training loop.

The moments of a training step, in the trainer's order. A control implements those that it needs:
    1. `begin`, once per rollout, after it was scored and before it is divided: what the scored policy alone decides
    2. `select`, once per optimizer mini-batch, before its backward passes: what the current policy decides
    3. `apply`, once per micro-batch, inside `policy_loss`: the effect on the loss
    4. `after_update`, once per optimizer update
    5. `after_step`, once per training step (one rollout and all its updates)
docs/controls.md has a table of what each moment sees, and a control written from nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor

from entcov.objective.tokens import PolicyLossConfig, Tokens


@dataclass(frozen=True)
class Progress:
    """Where the training is. Equal on all ranks."""

    step: int  # of the training step, from 1
    steps: int  # training steps of the whole run
    update: int  # optimizer updates done so far
    epoch: int | None = None  # over the training data, from 1; None: generated prompts, or unknown
    epochs: int | None = None  # that the run is planned to begin


@dataclass
class Shaping:
    """What a control decides of a whole rollout in `begin`; every tensor is [T], the tokens that `begin` was shown.

    The advantage becomes advantage * multiplier + bonus. A dropped token leaves the loss and its denominators; one
    with multiplier 0 stays in the denominators. `selected` comes back in `apply` as the mask of its `Selection`.
    Metrics describe the rollout.
    """

    multiplier: Tensor | None = None
    bonus: Tensor | None = None
    drop: Tensor | None = None  # bool
    selected: Tensor | None = None  # bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Selection:
    """What a control chooses of a mini-batch in `select`; every tensor is [T], except the scalars, which are 0-d.

    A token with `drop` leaves the loss and its denominators. Metrics describe the mini-batch.
    """

    mask: Tensor | None = None  # bool
    drop: Tensor | None = None  # bool
    weight: Tensor | None = None  # float32 or float64, a number of each token for `apply`
    scalars: dict[str, Tensor] = field(default_factory=dict)  # numbers of the mini-batch for `apply`
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def at(self, index: Any) -> Selection:
        """The selection of the tokens that `index` (a slice, mask or indices) takes."""
        parts = {name: getattr(self, name) for name in ("mask", "drop", "weight")}
        return replace(self, **{name: None if part is None else part[index] for name, part in parts.items()})


@dataclass
class Effect:
    """What a control does to the loss of one micro-batch; every tensor is [T]. `policy_loss` says how effects compose.

    `metrics` hold per-token values; the loss reports their means over the mini-batch's tokens.
    """

    keep: Tensor | None = None  # bool; False: the token's policy-gradient loss is 0
    multiplier: Tensor | None = None  # scales the advantage, a constant for the gradient
    penalty: Tensor | None = None  # added to the token's loss, differentiable
    unclipped: bool = False  # drop the PPO clip and the dual clip
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Control:
    """Base of all controls. A concrete control is a dataclass whose fields are its knobs, checked when it is made."""

    name: ClassVar[str]  # key in CONTROLS
    # Of "selection" (`select` is called), and the fields of tokens "entropy", "clamped_entropy", "ref_logprob",
    # "old_entropy": what `select` and `apply` read; "old_entropy" is for `apply` alone.
    # `begin` always has the scored entropy and entropy_drift.
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[
        tuple[str, ...]
    ] = ()  # fields of Tokens that `select` needs besides those that every micro-batch has
    # What the control sets alone: two controls that set the same are refused. docs/controls.md lists them.
    sets: ClassVar[frozenset[str]] = frozenset()
    state: ClassVar[tuple[str, ...]] = ()  # attributes that change during training: numbers and booleans
    reads_scored: bool = False  # whether `after_step` reads the means "scored/..." of the whole rollout
    # What a control with "selection" decides on: the mini-batch ("global"), each "micro_batch" alone, or the whole
    # "rollout"; then `begin` decides by `Shaping.selected`, and `select` is not called.
    scope: str = "global"

    @property
    def baseline_knobs(self) -> dict[str, Any] | None:
        """Knobs of strength 0, where that is not the plain loss: what a comparison measures the control against."""
        return None

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """The objectives of the loss that the control goes with, see entcov/objective/objectives.py; None: all."""
        return None

    @property
    def clamp(self) -> dict[str, Any]:
        """Arguments of `token_stats` that "clamped_entropy" needs, for example {"clamp_p": 0.33}."""
        return {}

    def begin(self, rollout: Tokens, progress: Progress) -> Shaping | None:
        """Decide what depends on the scored policy alone, for all updates on this rollout. None: nothing.

        `rollout` holds the loss tokens of the whole rollout with the statistics of the policy that scored them and
        without gradient; `logprob` equals `old_logprob`. So no collective is needed, and no split changes the result.
        Of several processes on a node one is called; the others get what it sets on `self`, which must pickle. With
        staleness the scored policy is newer than the one that sampled (`rollout.lag`).
        A control of scope "rollout" chooses here what it would otherwise choose of every mini-batch.
        """
        if self.scope != "rollout":
            return None
        self.check(rollout)
        chosen = self.select(rollout, step=progress.update, config=PolicyLossConfig())
        metrics = {name: float(value) for name, value in chosen.metrics.items()}
        return Shaping(selected=chosen.mask, drop=chosen.drop, metrics=metrics)

    def check(self, tokens: Tokens) -> None:
        """Raises if `tokens` lack what `select` reads. Called before any collective, only if `select` will be."""
        for name in self.reads:
            if getattr(tokens, name) is None:
                raise ValueError(f"tokens.{name} must be given, control {self.name} reads it; got None")

    def select(
        self, tokens: Tokens, *, step: int, config: PolicyLossConfig, group: dist.ProcessGroup | None = None
    ) -> Selection:
        """Choose tokens (only if "selection" is in `needs`).

        `tokens` are all tokens that this rank has in the scope; `logprob` is the current policy's, no gradient. `step`
        numbers the mini-batches of the run. What it returns must not depend on how the mini-batch is divided over
        ranks: reduce over `group` in integers, as entcov.objective.selection does.
        """
        raise NotImplementedError(f"{type(self).__name__} selects no tokens")

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        """The effect on one micro-batch. Fields of `tokens` are 0 outside the mask. No collective.

        `selection` holds this micro-batch's tokens; None for a control that selects none.
        """
        return Effect()

    def after_update(self, means: dict[str, float], progress: Progress) -> None:
        """Adapt to the mean over the tokens of the mini-batch just trained on.

        `means`: "entropy", "sampled_entropy" (of -old_logprob), and "clamped_entropy" where a control needs it; of the
        policy before the update, over all micro-batches and ranks.
        """

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        """Adapt to the step's means, return metrics of the step just done. Not called for a step without an update.

        `means`: the names of `after_update`, as "scored/<name>", over the rollout's tokens under the policy before its
        first update, and as "updated/<name>", over the tokens of all updates, each under the policy before the update.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Adaptive state, fit for JSON; the knobs are not in it."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != set(self.state):
            raise ValueError(f"state of control {self.name} must have keys {sorted(self.state)}, got {sorted(state)}")
        for name, value in state.items():
            kind = type(getattr(self, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise TypeError(f"state of control {self.name}: {name} must be a {kind.__name__}, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"state of control {self.name}: {name} must be finite, got {value!r}")
        for name, value in state.items():
            setattr(self, name, type(getattr(self, name))(value))


def finite_mean(control: str, means: dict[str, float], name: str) -> float:
    """means[name] as a finite float: a coefficient that adapted to NaN would stay NaN."""
    if name not in means:
        raise ValueError(f"means must hold {name!r} for control {control}, got {sorted(means)}")
    value = float(means[name])
    if not math.isfinite(value):
        raise ValueError(f"means[{name!r}] must be finite for control {control}, got {value}")
    return value


def kept_tokens(tokens: Tokens, selections: Iterable[Selection | None]) -> Tensor:
    """[T] bool: the loss tokens that no selection drops."""
    mask = tokens.loss_mask
    for selection in selections:
        if selection is not None and selection.drop is not None:
            mask = mask & ~selection.drop
    return mask
