"""What an entropy control is: the interface between a method and the loss.

A training step with controls, in the trainer's order:
    1. `entcov.controls.select(...)`, once per optimizer mini-batch, before its backward passes
    2. `policy_loss(..., controls=, selections=)`, once per micro-batch; it calls `apply`
    3. `after_step(totals)`, once per training step (one rollout and all its optimizer updates), with means over all
       tokens of the step, micro-batches and ranks, so that every rank reaches the same state for every split
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor

from entcov.objective.tokens import PolicyLossConfig, Tokens


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
    needs: ClassVar[frozenset[str]] = frozenset()  # of "selection", "entropy", "clamped_entropy"
    state: ClassVar[tuple[str, ...]] = ()  # attributes that change during training, numbers and booleans
    scope: str = "global"  # what `select` is shown: "global" mini-batch, or each "micro_batch" alone

    @property
    def baseline_knobs(self) -> dict[str, Any] | None:
        """Knobs of strength 0, where that is not the plain loss: what a comparison measures the control against."""
        return None

    @property
    def clamp(self) -> dict[str, Any]:
        """Arguments of `token_stats` that "clamped_entropy" needs, for example {"clamp_p": 0.33}."""
        return {}

    def check(self, tokens: Tokens) -> None:
        """Raises if `tokens` lack what `select` reads. Called before any collective, only if `select` will be."""

    def select(
        self, tokens: Tokens, *, step: int, config: PolicyLossConfig, group: dist.ProcessGroup | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Choose tokens (only if "selection" is in `needs`): (mask [T] bool, metrics of the whole mini-batch).

        `tokens` are all tokens that this rank has in the scope; `logprob` is the current policy's, no gradient. `step`
        numbers the mini-batches of the run.
        """
        raise NotImplementedError(f"{type(self).__name__} selects no tokens")

    def apply(self, tokens: Tokens, selected: Tensor | None) -> Effect:
        """The effect on one micro-batch. Fields of `tokens` are 0 outside the mask."""
        return Effect()

    def after_step(self, totals: dict[str, float]) -> dict[str, float]:
        """Adapt to the step's global token means ("entropy", "clamped_entropy", "sampled_entropy"), return metrics.

        "sampled_entropy" is the mean of -old_logprob. Metrics describe the step just done.
        """
        return {}

    def state_dict(self) -> dict[str, float | int | bool]:
        """Adaptive state, fit for JSON; the knobs are not in it."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, float | int | bool]) -> None:
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


def step_mean(control: str, totals: dict[str, float], name: str) -> float:
    """totals[name] as a finite float: a coefficient that adapted to NaN would stay NaN."""
    if name not in totals:
        raise ValueError(f"totals must hold {name!r} for control {control}, got {sorted(totals)}")
    value = float(totals[name])
    if not math.isfinite(value):
        raise ValueError(f"totals[{name!r}] must be finite for control {control}, got {value}")
    return value
