"""Entropy-based advantage: a token's advantage grows with its entropy, by at most a share of itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Selection
from entcov.objective.tokens import Tokens


@dataclass
class EntropyAdvantage(Control):
    """A' = A + min(alpha * H, |A| / kappa), H the current policy's entropy as a constant for the gradient.

    The bonus is positive for either sign of A: rewards weigh more and penalties less where the policy is uncertain. It
    is at most |A| / kappa, so with kappa > 1 the sign of A never changes and tokens with A = 0 get none. As a
    multiplier of A it is 1 + sgn(A) min(alpha H / |A|, 1 / kappa).

    It is applied in the micro-batch, with the entropy of the policy that is being updated: the paper detaches H from
    the graph, so its H comes from the update's own pass, and not from the scores before.
    Composition: it reads A as `begin` and the estimator left it; its multiplier goes with those of other controls.
    Source: Cheng et al., "Reasoning with Exploration: An Entropy Perspective", arXiv 2506.14758 (kappa 2; alpha 0.4
    with GRPO, 0.1 with PPO), from secondary notes.
    """

    name: ClassVar[str] = "entropy_advantage"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        check.number("alpha", self.alpha, 0.0)
        check.number("kappa", self.kappa, 1.0, hint="below 1 the bonus would change the sign of a negative advantage")

    @torch.no_grad()
    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        size = tokens.advantage.abs()
        share = (self.alpha * tokens.entropy / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1 / self.kappa)
        effect = Effect(metrics={"actor/entropy_advantage": share * size})
        if self.alpha > 0:
            effect.multiplier = 1 + tokens.advantage.sign() * share
        return effect
