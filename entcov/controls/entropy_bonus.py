"""Entropy bonus with a fixed coefficient."""

from dataclasses import dataclass
from typing import ClassVar

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection
from entcov.objective.tokens import Tokens


@dataclass
class EntropyBonus(Control):
    """Adds -entropy_coef * H to every token's loss.

    It takes part in the loss's aggregation, as verl's actor.entropy_coeff does. The default is the one coefficient
    that stabilised entropy in Cui et al. 2025, sec. 4.1 (Qwen2.5-7B: 1e-4 and 1e-3 had no effect, 1e-2 exploded).
    Source: Williams and Peng 1991; Mnih et al. 2016.
    """

    name: ClassVar[str] = "entropy_bonus"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the entropy bonus"})

    entropy_coef: float = 5e-3

    def __post_init__(self) -> None:
        check.number("entropy_coef", self.entropy_coef, 0.0)

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(penalty=-self.entropy_coef * tokens.entropy) if self.entropy_coef > 0 else Effect()

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        return {"actor/entropy_coef": float(self.entropy_coef)}
