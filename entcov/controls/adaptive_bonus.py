"""Entropy bonus whose coefficient steps up while entropy is below a target and down while it is above."""

from dataclasses import dataclass
from typing import ClassVar

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection, finite_mean
from entcov.objective.tokens import Tokens

# rule: (whether an entropy on the target counts as below it, whether the bonus acts before the first measurement,
# delta, coef_max)
RULES = {"skywork": (False, True, 1e-4, 5e-3), "trl": (True, False, 5e-3, 1.0)}


@dataclass
class AdaptiveBonus(Control):
    """Adds -coef * H to every token's loss; coef moves by delta towards keeping H at the target.

    below = H < target ("skywork") or H <= target ("trl")
    coef  = clip(coef + delta if below else coef - delta, coef_min, coef_max)
    The bonus acts only if `below` held at the last measurement.

    rule  "skywork": measures after each training step, and reads the sampled estimate of the entropy, the mean of
          -old_logprob over the rollout. Before the first measurement the bonus acts.
          "trl": measures after each optimizer update, and reads the analytic entropy of the tokens just trained on.
          Before the first measurement the bonus does not act.
    `delta` and `coef_max` default to the rule's own: 1e-4 and 5e-3, or 5e-3 and 1.0. TRL's bonus is a mean over tokens
    whatever the loss's aggregation is; here it takes part in the aggregation, the same under token-mean.
    Source: Skywork-OR1, arXiv 2505.22312 (its EntController); TRL 1.16, GRPOConfig.use_adaptive_entropy.
    """

    name: ClassVar[str] = "adaptive_bonus"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the entropy bonus", "the target of the entropy"})
    state: ClassVar[tuple[str, ...]] = ("coef", "enabled")

    rule: str = "skywork"
    target: float = 0.2  # nats
    entropy_coef: float = 0.0  # initial
    delta: float | None = None
    coef_min: float = 0.0
    coef_max: float | None = None

    def __post_init__(self) -> None:
        check.one_of("rule", self.rule, RULES)
        _, acts_at_first, delta, coef_max = RULES[self.rule]
        self.delta = delta if self.delta is None else self.delta
        self.coef_max = coef_max if self.coef_max is None else self.coef_max
        check.positive("target", self.target)
        check.positive("delta", self.delta)
        check.number("coef_min", self.coef_min, 0.0)
        check.number("coef_max", self.coef_max, self.coef_min, hint="the lower end is coef_min")
        check.number("entropy_coef", self.entropy_coef, self.coef_min, self.coef_max, "the ends are coef_min, coef_max")
        self.coef = float(self.entropy_coef)
        self.enabled = acts_at_first
        self._used = self.applied

    @property
    def reads_scored(self) -> bool:
        return self.rule == "skywork"

    @property
    def applied(self) -> float:
        """The coefficient of the coming update."""
        return self.coef if self.enabled else 0.0

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(penalty=-self.applied * tokens.entropy) if self.applied > 0 else Effect()

    def after_update(self, means: dict[str, float], progress: Progress) -> None:
        if self.rule == "trl":
            self._adapt(finite_mean(self.name, means, "entropy"))

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        """Returns the coefficient that the step's last update used."""
        if self.rule == "skywork":
            self._adapt(finite_mean(self.name, means, "scored/sampled_entropy"))
        return {"actor/entropy_coef": self._used, "actor/entropy_target": float(self.target)}

    def _adapt(self, entropy: float) -> None:
        self._used = self.applied
        self.enabled = entropy < self.target or (RULES[self.rule][0] and entropy == self.target)
        moved = self.coef + (self.delta if self.enabled else -self.delta)
        self.coef = float(min(max(moved, self.coef_min), self.coef_max))
