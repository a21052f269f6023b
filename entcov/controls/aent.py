"""AEnt: bonus on the clamped entropy, with a coefficient that keeps it inside a band."""

from dataclasses import dataclass
from typing import Any, ClassVar

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection, finite_mean
from entcov.objective.tokens import Tokens


@dataclass
class AEnt(Control):
    """Adds -coef * H~ to every token's loss, H~ the entropy of the policy renormalised over its likelier tokens.

    H~ leaves out the int(V * clamp_p) lowest logits. With H~ the mean over the tokens of the
    step's updates, each under the policy before the update, after each step
        g    = min(0, H~ - entropy_low) + max(0, H~ - entropy_high)        0 inside the band
        coef = clip(coef - coef_lr * g, coef_min, coef_max)
    `warmup` is the number of steps, counted from 1, that leave coef alone. (AReaL's code adapts where step > warmup,
    which is this; a verl port adapts where step >= warmup, one step earlier.)

    Defaults are those of the paper's MATH run with Qwen2.5-Math-1.5B. The bonus takes part in the loss's aggregation;
    token-mean is the published form.
    Source: Shen, "On Entropy Control in LLM-RL Algorithms", arXiv 2509.03493; code in AReaL and antgroup/AEnt.
    """

    name: ClassVar[str] = "aent"
    needs: ClassVar[frozenset[str]] = frozenset({"clamped_entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the entropy bonus", "the target of the entropy"})
    state: ClassVar[tuple[str, ...]] = ("coef", "steps")

    entropy_coef: float = 2e-3  # initial
    clamp_p: float = 0.33  # fraction of the vocabulary that is left out
    adaptive: bool = True
    entropy_low: float = 0.15  # nats
    entropy_high: float = 0.24
    coef_lr: float = 2e-3
    coef_min: float = 6e-4
    coef_max: float = 9e-3
    warmup: int = 30

    def __post_init__(self) -> None:
        check.number("entropy_coef", self.entropy_coef, 0.0)
        check.fraction("clamp_p", self.clamp_p)
        if self.clamp_p == 1:
            raise ValueError(f"clamp_p must be below 1, or nothing is left of the vocabulary; got {self.clamp_p}")
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"adaptive must be True or False, got {self.adaptive!r}")
        if self.adaptive:
            check.number("entropy_low", self.entropy_low, 0.0)
            check.number("entropy_high", self.entropy_high, self.entropy_low, hint="the lower end is entropy_low")
            check.number("coef_lr", self.coef_lr, 0.0)
            check.number("coef_min", self.coef_min, 0.0)
            check.number("coef_max", self.coef_max, self.coef_min, hint="the lower end is coef_min")
            check.number(
                "entropy_coef", self.entropy_coef, self.coef_min, self.coef_max, "the ends are coef_min, coef_max"
            )
            check.integer("warmup", self.warmup, 0)
        self.coef = float(self.entropy_coef)
        self.steps = 0

    @property
    def clamp(self) -> dict[str, Any]:
        return {"clamp_p": self.clamp_p}

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(penalty=-self.coef * tokens.clamped_entropy) if self.coef > 0 else Effect()

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        used = self.coef
        entropy = finite_mean(self.name, means, "updated/clamped_entropy")
        self.steps += 1
        if self.adaptive and self.steps > self.warmup:
            outside = min(0.0, entropy - self.entropy_low) + max(0.0, entropy - self.entropy_high)
            self.coef = float(min(max(self.coef - self.coef_lr * outside, self.coef_min), self.coef_max))
        return {"actor/entropy_coef": used}
