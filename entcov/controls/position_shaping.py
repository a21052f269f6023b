"""Position shaping: tokens towards the end of a response have larger advantages."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Progress, Shaping
from entcov.objective.tokens import Tokens


@dataclass
class PositionShaping(Control):
    """A' = A + sgn(A) * position_coef * sigmoid(steepness * (x - start)), x in (0, 1] the place in the response.

    x = (position + 1) / length: 1 at the last token. The bonus has the direction of A and is 0 where A = 0; the paper
    finds more to learn near the end.

    The paper's formula and constants were not available to us: the form is from an unverified note, and all three
    constants are ours.
    Composition: a bonus is added after all multipliers, see `entcov.controls.begin`.
    Source: Deng et al., "Decomposing the Entropy-Performance Exchange", arXiv 2508.02260; no official code found.
    """

    name: ClassVar[str] = "position_shaping"

    position_coef: float = 0.1
    steepness: float = 10.0
    start: float = 0.5  # where in the response the bonus is half of position_coef

    def __post_init__(self) -> None:
        check.number("position_coef", self.position_coef, 0.0)
        check.number("steepness", self.steepness, 0.0, 1e6)
        check.fraction("start", self.start)

    @torch.no_grad()
    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        place = (rollout.position + 1).double() / rollout.sequence_length
        size = self.position_coef * torch.sigmoid(self.steepness * (place - self.start))
        return Shaping(bonus=(rollout.advantage.sign() * size).to(rollout.advantage.dtype))
