"""An entropy bonus for hard prompts, whose coefficient steers towards a share of the initial entropy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection, Shaping, finite_mean
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import Tokens


@dataclass
class DifficultyBonus(Control):
    """Adds -coef * w_q * H to the loss of the tokens of prompt q, w_q = 1 - acc_q if acc_q <= rho, else 0.

    acc_q is the mean reward, as scored, of the prompt's responses in the rollout; rewards must be in [0, 1]. With H_0
    the mean entropy of the first step's rollout and H that of this step's, both under the policy that scored it, after
    each step
        coef = clip(coef + coef_lr * (tau * H_0 - H), coef_min, coef_max)

    It has the three parts that AER (adaptive entropy regularization) names: a coefficient for each prompt by its
    difficulty, a target anchored at the initial entropy, a global coefficient. AER's formulas are not available to us,
    so this is NOT AER: the form of w_q, the update and all constants but tau = 0.4 are ours.
    Composition: a second entropy controller (adaptive_bonus, aent, entropic) pulls at the same entropy.
    Idea: Zhang et al., "Revisiting Entropy Regularization", arXiv 2510.10959.
    """

    name: ClassVar[str] = "difficulty_bonus"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the entropy bonus", "the target of the entropy"})
    state: ClassVar[tuple[str, ...]] = ("coef", "initial_entropy", "anchored")

    entropy_coef: float = 0.0  # initial
    rho: float = 0.5  # prompts with a higher accuracy get no bonus
    tau: float = 0.4  # the target is this share of the initial entropy
    coef_lr: float = 1e-3
    coef_min: float = 0.0
    coef_max: float = 0.01

    def __post_init__(self) -> None:
        check.fraction("rho", self.rho)
        check.fraction("tau", self.tau)
        check.positive("coef_lr", self.coef_lr)
        check.number("coef_min", self.coef_min, 0.0)
        check.number("coef_max", self.coef_max, self.coef_min, hint="the lower end is coef_min")
        check.number("entropy_coef", self.entropy_coef, self.coef_min, self.coef_max, "the ends are coef_min, coef_max")
        self.coef = float(self.entropy_coef)
        self.initial_entropy, self.anchored = 0.0, False
        self._weights: tuple[Tensor, Tensor] | None = None  # the rollout's prompts [P] in order, and their weights [P]

    @torch.no_grad()
    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        if not bool(((rollout.reward >= 0) & (rollout.reward <= 1)).all()):
            worst = float(rollout.reward[(rollout.reward - 0.5).abs().argmax()])
            raise ValueError(f"reward must be in [0, 1] for control difficulty_bonus, it is an accuracy; got {worst:g}")
        responses = SequenceIndex.of(rollout.sequence)
        group = torch.zeros(responses.count, dtype=torch.int64, device=rollout.group.device)
        group[responses.index] = rollout.group
        prompts = SequenceIndex.of(group)
        accuracy = prompts.means(responses.means(rollout.reward))
        weight = torch.where(accuracy <= self.rho, 1 - accuracy, 0.0)
        self._weights = group.unique(), weight.float()
        return Shaping(metrics={"actor/difficulty_weight": float(weight.mean())})

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        if self._weights is None:
            raise ValueError("begin must have been called with the rollout before control difficulty_bonus applies")
        if self.coef == 0:
            return Effect()
        prompts, weights = self._weights
        place = torch.searchsorted(prompts, tokens.group).clamp(max=len(prompts) - 1)
        if check.readable(place) and bool((tokens.loss_mask & (prompts[place] != tokens.group)).any()):
            raise ValueError("group must be of the rollout that begin was shown, control difficulty_bonus got others")
        return Effect(penalty=-self.coef * weights[place] * tokens.entropy)

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        used, entropy = self.coef, finite_mean(self.name, means, "scored/entropy")
        if not self.anchored:
            self.initial_entropy, self.anchored = entropy, True
        target = self.tau * self.initial_entropy
        self.coef = float(min(max(self.coef + self.coef_lr * (target - entropy), self.coef_min), self.coef_max))
        return {"actor/entropy_coef": used, "actor/entropy_target": target}
