"""Adaptive clip: the upper bound of PPO's ratio steps up while the entropy is below a target, and down above it."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection, finite_mean
from entcov.objective.objectives import token_ratio
from entcov.objective.tokens import Tokens


@dataclass
class AdaptiveClip(Control):
    """PPO's clip to [1 - epsilon, 1 / (1 - epsilon) + k], in place of the loss's own.

    k starts at 0, and after every update becomes clip(k + step_size * sign(target - H), 0, relaxation_max). H is the
    mean entropy of the mini-batch under the policy that the update started from. A higher bound lets unlikely tokens
    with A > 0 gain more, which raises the entropy; with k = 0 the interval is symmetric in log r. k is part of the
    checkpoint.

    The bounds act as PPO's: a token with A > 0 above the upper one, or with A < 0 below the lower one, has no gradient.
    The loss's clip_low, clip_high and dual_clip have no effect. With one update per rollout no ratio leaves 1, and the
    control does nothing.
    Composition: for the objective ppo. A second entropy controller pulls at the same entropy and is refused, as is a
    control that drops the clip. clip_cov with semantics "reference" still leaves out what the loss's own clip would
    stop.
    Source: Microsoft AI, MAI-Thinking-1 (2026), section 3.1.1, from a third party's notes on it (epsilon 0.6, target
        0.3, step 0.25, at most 2.5); H is exact here, where theirs is an importance-weighted estimate from the sampled
        tokens.
    """

    name: ClassVar[str] = "adaptive_clip"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the clip of the ratio", "the target of the entropy"})
    state: ClassVar[tuple[str, ...]] = ("relaxation",)

    target: float = 0.3  # nats
    epsilon: float = 0.6
    step_size: float = 0.25
    relaxation_max: float = 2.5

    def __post_init__(self) -> None:
        check.positive("target", self.target)
        check.number("epsilon", self.epsilon, 0.0, 0.99)
        check.number("step_size", self.step_size, 0.0)
        check.number("relaxation_max", self.relaxation_max, 0.0)
        self.relaxation = 0.0  # k
        self._used = self.upper

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("ppo",)

    @property
    def upper(self) -> float:
        """The upper bound of the ratio in the coming update."""
        return 1 / (1 - self.epsilon) + self.relaxation

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        ratio = token_ratio(tokens.logprob.detach() - tokens.old_logprob)
        stopped = torch.where(tokens.advantage > 0, ratio > self.upper, ratio < 1 - self.epsilon)
        stopped &= tokens.advantage != 0
        return Effect(keep=~stopped, unclipped=True, metrics={"actor/adaptive_clipfrac": stopped})

    def after_update(self, means: dict[str, float], progress: Progress) -> None:
        entropy, self._used = finite_mean(self.name, means, "entropy"), self.upper
        if entropy != self.target:
            moved = self.relaxation + math.copysign(self.step_size, self.target - entropy)
            self.relaxation = min(max(moved, 0.0), float(self.relaxation_max))

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        """Returns the upper bound that the step's last update used."""
        return {"actor/adaptive_clip_upper": self._used, "actor/entropy_target": float(self.target)}
