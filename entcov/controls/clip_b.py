"""Clip_B: negative tokens whose entropy score is far below the batch's mean leave the loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Progress, Shaping
from entcov.objective.tokens import Tokens

SMALLEST_SPREAD = 1e-12  # of the scores; below it nothing is dropped, as in the published code


@dataclass
class ClipB(Control):
    """Drops every token with A < 0 and S - mean(S) < -mu * std(S), batch-centred, from the loss and its denominators.

    S = p (H + log p) is the entropy discriminant of the sampled token: dH/dz = -S for its logit. Mean and population
    standard deviation are over all tokens of the rollout, under the policy that scored it. Tokens with A >= 0 stay.
    To first order a dropped token's own update changes its entropy by eta r A (N - S), N = E_{i~p}[S_i], negative where
    S < N: it lowers the entropy if S is below its own distribution's mean, which the batch's mean stands for.

    It is the published code's rule, which treats negative advantages and the lower side alone; the paper describes a
    mask of outliers of the entropy change. The code takes p from the sampler's log-probability and H from the trainer;
    here both are the trainer's.
    Composition: a token that any control drops is dropped. It shapes no advantage.
    Source: Wang et al., "On the Entropy Dynamics in RFT", arXiv 2602.03392; code: Trinity-RFT,
    trinity/algorithm/advantage_fn/clipb_advantage.py (mu 2.5; swept from 2 to 3).
    """

    name: ClassVar[str] = "clip_b"

    mu: float = 2.5

    def __post_init__(self) -> None:
        check.number("mu", self.mu, 0.0)

    @torch.no_grad()
    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        logprob = rollout.logprob.double()
        score = logprob.exp() * (rollout.entropy + logprob)
        spread = score.std(correction=0)
        low = (score - score.mean() < -self.mu * spread) & (spread >= SMALLEST_SPREAD)
        drop = low & (rollout.advantage < 0)
        return Shaping(drop=drop, metrics={"actor/clip_b_frac": float(drop.double().mean())})
