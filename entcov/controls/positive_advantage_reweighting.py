"""Positive-Advantage Reweighting: tokens with A > 0 weigh lambda in [0, 1], by stage, by epoch or by the entropy."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Progress, Shaping, finite_mean
from entcov.objective.tokens import Tokens

SCHEDULES = ("entropy", "stage", "epoch")


@dataclass
class PositiveAdvantageReweighting(Control):
    """Multiplies the advantages of tokens with A > 0 by lambda; those with A < 0 keep theirs.

    schedule  "entropy" (default): lambda starts at `weight`; after a step with mean entropy H, lambda goes down by
              delta if H < target and up by delta if not, within [0, 1].
              "stage": lambda = 0 in the first half of the run's steps, then linear, 1 in the last step.
              "epoch": lambda = (e - 1) / (E - 1) in epoch e of E.
    Likely tokens with A > 0 are what sharpens the policy, so a smaller lambda keeps entropy. lambda = 1 is the plain
    loss, lambda = 0 trains on negative tokens alone; with delta=0 "entropy" holds `weight`.
    Default: the schedule with the best in-domain score of the three.

    Our reading, where the text that we have does not say: the denominators stay those of all tokens, and H is the mean
    over the rollout under the policy that scored it, which acts from the next step on.
    Composition: the sign of A is the estimator's, before other controls shape it.
    Source: Jin et al., "Revisiting Entropy in RL for Large Reasoning Models", arXiv 2511.05993 (delta 0.2, step 0.05,
    lambda_0 = 0: our target, delta, weight), from secondary notes; the code is not public.
    """

    name: ClassVar[str] = "positive_advantage_reweighting"
    sets: ClassVar[frozenset[str]] = frozenset({"the weight of positive advantages"})
    state: ClassVar[tuple[str, ...]] = ("current",)

    schedule: str = "entropy"
    target: float = 0.2  # nats
    delta: float = 0.05
    weight: float = 0.0  # initial, of schedule "entropy"

    def __post_init__(self) -> None:
        check.one_of("schedule", self.schedule, SCHEDULES)
        check.number("target", self.target, 0.0)
        check.number("delta", self.delta, 0.0, 1.0)
        check.number("weight", self.weight, 0.0, 1.0)
        self.current = float(self.weight)

    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        if self.schedule == "stage":
            half = progress.steps / 2
            self.current = min(max((progress.step - half) / half, 0.0), 1.0)
        elif self.schedule == "epoch":
            if progress.epoch is None or progress.epochs < 2:
                raise ValueError(
                    "schedule epoch of positive_advantage_reweighting must have at least 2 epochs over the data, the "
                    f"run has {progress.epochs or 'none (its prompts are generated, or its trainer tells no epochs)'}"
                )
            self.current = min((progress.epoch - 1) / (progress.epochs - 1), 1.0)
        multiplier = torch.where(rollout.advantage > 0, self.current, 1.0).to(rollout.advantage.dtype)
        return Shaping(multiplier, metrics={"actor/positive_weight": self.current})

    def after_step(self, means: dict[str, float], progress: Progress) -> dict[str, float]:
        if self.schedule == "entropy":
            below = finite_mean(self.name, means, "scored/entropy") < self.target
            self.current = float(min(max(self.current + (-self.delta if below else self.delta), 0.0), 1.0))
        return {}
