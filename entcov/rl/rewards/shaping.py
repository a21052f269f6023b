"""Reward shaping: what is added to the scores before the advantage is computed.

Scores themselves never change (`Rollout.reward`, metrics critic/score/*, the filter of dynamic sampling); the advantage
is computed from `Rollout.shaped_reward` (metrics critic/rewards/*). A shaping is a function of a group's scores and
lengths alone, so every rank computes the same, and nothing of it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.objective.responses import Responses
from entcov.registry import Registry
from entcov.rl.types import RIGHT, Rollout


class RewardShaping:
    """Base of all shapings. A concrete one is a dataclass whose fields are its knobs, checked when it is made."""

    name: ClassVar[str]  # key in REWARD_SHAPINGS

    def bonus(self, group: Sequence[Rollout], *, max_response_length: int) -> list[float]:
        """What is added to the rewards of the scored responses to one prompt, in their order."""
        return [0.0] * len(group)

    def pseudo(self, scores: Sequence[float]) -> list[float]:
        """Rewards of responses that do not exist, but count in the mean and deviation of a group with these scores."""
        return []


@dataclass
class Overlong(RewardShaping):
    """DAPO's soft overlong punishment. Yu et al., arXiv 2503.14476, eq. 13: for a response of n tokens, 0 up to
    L_max - buffer, then linear down to -1 at L_max, times `factor`. L_max is rollout.max_response_length.

    Defaults of the paper's runs: buffer 4096 of L_max 20480, factor 1 (verl: overlong_buffer.len, .penalty_factor).
    """

    name = "overlong"
    buffer: int = 4096  # tokens
    factor: float = 1.0

    def __post_init__(self):
        check.integer("buffer", self.buffer, 1)
        check.positive("factor", self.factor)

    def check_length(self, max_response_length: int) -> None:
        if self.buffer > max_response_length:
            raise ValueError(
                f"buffer: must be at most rollout.max_response_length = {max_response_length}, got {self.buffer}"
            )

    def bonus(self, group, *, max_response_length):
        self.check_length(max_response_length)
        free = max_response_length - self.buffer
        return [-self.factor * min(max(len(r.tokens) - free, 0) / self.buffer, 1.0) for r in group]


@dataclass
class RelativeLength(RewardShaping):
    """Relative length reward (RLR): among right responses, shorter than their mean is better.

    "Dissecting Long-CoT Reasoning Models", arXiv 2506.04913. In groups whose share of right responses is at least
    `corr_ratio`, a right response of n tokens gets clip((mean n of the right ones - n) / length_base, lower, upper).
    Defaults: code, takagi97/Dissect-Long-Reason-Models @ fe466d7b, its training script (its configuration file has 0.5,
    1000, -0.5, 0.5).
    """

    name = "rlr"
    corr_ratio: float = 0.75
    length_base: float = 500.0  # tokens
    lower: float = -0.5
    upper: float = 1.0

    def __post_init__(self):
        check.fraction("corr_ratio", self.corr_ratio)
        check.positive("length_base", self.length_base)
        check.number("lower", self.lower, high=0.0)
        check.number("upper", self.upper, 0.0)

    def bonus(self, group, *, max_response_length):
        lengths = [len(r.tokens) for r in group if r.reward >= RIGHT]
        if not lengths or len(lengths) < self.corr_ratio * len(group):
            return [0.0] * len(group)
        mean = sum(lengths) / len(lengths)
        return [
            min(max((mean - len(r.tokens)) / self.length_base, self.lower), self.upper) if r.reward >= RIGHT else 0.0
            for r in group
        ]


@dataclass
class Reactivate(RewardShaping):
    """A signal for groups whose responses are all right. ERPO's RA, Liu et al., arXiv 2511.04800.

    The group is compared with one more response of reward `pseudo_reward`, which does not exist. With `advantage: grpo`
    every response of a group of G then has the advantage 1 / sqrt(G + 1), whatever the pseudo reward is; with dr_grpo
    it has (1 - pseudo_reward) / (G + 1).

    That all-right groups get a signal by a pseudo negative reward is the paper's. Its value, and that it enters as one
    more response of the group, are our reading: we could read neither them nor the code.
    """

    name = "reactivate"
    pseudo_reward: float = 0.0

    def __post_init__(self):
        check.number("pseudo_reward", self.pseudo_reward, -10.0, 1.0)
        if self.pseudo_reward >= RIGHT:
            raise ValueError(f"pseudo_reward: must be less than a right response's {RIGHT:g}, got {self.pseudo_reward}")

    def pseudo(self, scores):
        return [self.pseudo_reward] if min(scores) >= RIGHT else []


REWARD_SHAPINGS = Registry(
    "reward shaping", RewardShaping, (Overlong, RelativeLength, Reactivate), "entcov.reward_shapings"
)


def shape_rewards(
    shapings: Sequence[RewardShaping], rollouts: Sequence[Rollout], *, max_response_length: int
) -> dict[str, float]:
    """Sets `shaped_reward` of every scored rollout to its reward plus the bonuses of all shapings.

    Returns the mean of each shaping's bonuses as critic/shaping/NAME. A bonus depends on the scores, not on the other
    bonuses, so the order of the shapings does not matter.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        rollout.shaped_reward = rollout.reward
        groups.setdefault(rollout.prompt.uid, []).append(rollout)
    sums = {shaping.name: 0.0 for shaping in shapings}
    for shaping in shapings:
        for group in groups.values():
            bonuses = shaping.bonus(group, max_response_length=max_response_length)
            for rollout, value in zip(group, bonuses, strict=True):
                rollout.shaped_reward += value
                sums[shaping.name] += value
    return {f"critic/shaping/{name}": total / len(rollouts) for name, total in sums.items()}


def with_pseudo(shapings: Sequence[RewardShaping], responses: Responses) -> Responses:
    """The table with one row more, at its end, for each pseudo response; such a row has length 0."""
    groups: dict[int, list[float]] = {}
    for group, score in zip(responses.group.tolist(), responses.score.tolist(), strict=True):
        groups.setdefault(group, []).append(score)
    added = [(reward, group) for group, scores in groups.items() for s in shapings for reward in s.pseudo(scores)]
    if not added:
        return responses
    reward = responses.reward.new_tensor([reward for reward, _ in added])
    zero = responses.length.new_zeros(len(added))
    group = zero.new_tensor([group for _, group in added])
    rows = {"reward": reward, "score": reward, "group": group, "length": zero, "lag": zero}
    rows["number"] = len(responses.reward) + torch.arange(len(added), device=zero.device)
    joined = {name: torch.cat([getattr(responses, name), row]) for name, row in rows.items()}
    return replace(responses, **joined, baseline=None, components=None)  # a response that does not exist has neither
