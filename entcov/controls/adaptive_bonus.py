"""Entropy bonus whose coefficient steps up while entropy is below a target and down while it is above."""

from dataclasses import dataclass
from typing import ClassVar

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection, finite_mean
from entcov.objective.tokens import Tokens

# rule: (entropy it reads, whether an entropy on the target counts as below it, delta, coef_max)
RULES = {"skywork": ("scored/sampled_entropy", False, 1e-4, 5e-3), "trl": ("updated/entropy", True, 5e-3, 1.0)}


@dataclass
class AdaptiveBonus(Control):
    """Adds -coef * H to every token's loss; after each step coef moves by delta towards keeping H at the target.

    below = H < target ("skywork") or H <= target ("trl")
    coef  = clip(coef + delta if below else coef - delta, coef_min, coef_max)
    The bonus is applied in the next step only if `below` held after this one; in the first step it is applied.

    rule "skywork" reads the sampled estimate of entropy, the mean of -old_logprob; "trl" the analytic one. `delta`
    and `coef_max` default to the rule's own: 1e-4 and 5e-3, or 5e-3 and 1.0. TRL adapts after each optimizer update,
    this control after each training step: the same with one update per rollout.
    Source: Skywork-OR1, arXiv 2505.22312 (its EntController); TRL 1.16 GRPOConfig.use_adaptive_entropy.
    """

    name: ClassVar[str] = "adaptive_bonus"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the entropy bonus"})
    state: ClassVar[tuple[str, ...]] = ("coef", "enabled")

    rule: str = "skywork"
    target: float = 0.2  # nats
    entropy_coef: float = 0.0  # initial
    delta: float | None = None
    coef_min: float = 0.0
    coef_max: float | None = None

    def __post_init__(self) -> None:
        check.one_of("rule", self.rule, RULES)
        _, _, delta, coef_max = RULES[self.rule]
        self.delta = delta if self.delta is None else self.delta
        self.coef_max = coef_max if self.coef_max is None else self.coef_max
        check.positive("target", self.target)
        check.positive("delta", self.delta)
        check.number("coef_min", self.coef_min, 0.0)
        check.number("coef_max", self.coef_max, self.coef_min, hint="the lower end is coef_min")
        check.number("entropy_coef", self.entropy_coef, self.coef_min, self.coef_max, "the ends are coef_min, coef_max")
        self.coef = float(self.entropy_coef)
        self.enabled = True

    @property
    def applied(self) -> float:
        """The coefficient of the coming step."""
        return self.coef if self.enabled else 0.0

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(penalty=-self.applied * tokens.entropy) if self.applied > 0 else Effect()

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        used = self.applied
        name, on_target_is_below, _, _ = RULES[self.rule]
        entropy = finite_mean(self.name, means, name)
        self.enabled = entropy < self.target or (on_target_is_below and entropy == self.target)
        moved = self.coef + (self.delta if self.enabled else -self.delta)
        self.coef = float(min(max(moved, self.coef_min), self.coef_max))
        return {"actor/entropy_coef": used, "actor/entropy_target": float(self.target)}
