"""KL in the reward: what a response loses for its distance to the reference policy, and how its weight adapts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.objective.policy_loss import kl_estimate
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import Tokens

ESTIMATORS = ("k1", "abs", "k2", "k3")  # the "+" forms differ in the gradient alone, and a reward has none
LARGEST_ERROR = 0.2  # of the controller, as published


@dataclass(frozen=True)
class KLInReward:
    """reward = reward - coef * (sum over the response's tokens of the estimated KL(policy || reference)).

    The log-probabilities are those that score the rollout, before its first update, so the penalty is a constant.
    It comes after reward shaping and before the advantage, which sees the sum alone: verl's REINFORCE++ gives each
    token the penalties from itself on.

    target   with it the coefficient adapts after each step, coef *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon,
             with n the responses of the step and kl the mean over them of the mean over their tokens. None: fixed.
    horizon  of the controller, in responses.
    Source: Ziegler et al., arXiv 1909.08593 (the controller); verl's use_kl_in_reward, kl_penalty (which
        calls k1 "kl") and kl_ctrl, with the same numbers.
    """

    coef: float = 0.0  # 0: off, and no reference policy is needed
    estimator: str = "k1"
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        check.number("coef", self.coef, 0.0)
        check.one_of("estimator", self.estimator, ESTIMATORS)
        if self.target is not None:
            check.positive("target", self.target)
        check.integer("horizon", self.horizon, 1)
        for name, reader in (("estimator", "coef"), ("target", "coef"), ("horizon", "target")):
            if not getattr(self, reader) and getattr(self, name) != getattr(KLInReward, name):
                raise ValueError(
                    f"{name} has no effect without {reader}, got {getattr(self, name)!r} and {reader} "
                    f"{getattr(self, reader)}"
                )

    @torch.no_grad()
    def of_responses(self, tokens: Tokens, count: int) -> tuple[Tensor, float]:
        """([count] float64: the sum over each response's tokens, nats; the mean that the controller sees).

        `tokens` are the loss tokens of the whole rollout, with `ref_logprob`, and with `sequence` holding the numbers
        of the `count` responses, which all have a token.
        """
        reference = tokens.given("ref_logprob", "kl_in_reward").double()
        kl = kl_estimate(tokens.old_logprob.double(), reference, self.estimator)
        sequences = SequenceIndex.of(tokens.given("sequence", "kl_in_reward"))
        if sequences.count != count:
            raise ValueError(f"tokens must be of {count} responses, got {sequences.count}")
        total = sequences.totals(kl)
        return total, float((total / sequences.totals(torch.ones_like(kl))).mean())

    def adapted(self, coef: float, kl: float, responses: int) -> float:
        """The next step's coefficient."""
        if self.target is None:
            return coef
        error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        return coef * (1 + error * responses / self.horizon)
