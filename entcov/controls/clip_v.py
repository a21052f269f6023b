"""Clip_V: the negative tokens that cost the most entropy leave the loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Progress, Shaping
from entcov.controls.clip_b import SMALLEST_SPREAD
from entcov.objective.tokens import Tokens


@dataclass
class ClipV(Control):
    """Drops tokens with A <= 0 and N - S > mu * std(N - S), vocabulary-centred, from the loss and its denominators.

    S = p (H + log p) of the sampled token and N = E_{i~p}[S_i], its mean over the vocabulary. N - S is the
    `entropy_drift` of `token_stats`, dH/dalpha of the token's own update (theorem 3.3), so that with A < 0 a dropped
    token's update lowers the entropy. The population standard deviation is over all tokens of the rollout, under the
    policy that scored it; the threshold is not centred by the mean.
    At most max(int(max_frac * tokens), 1) tokens with A < 0 are dropped, those with the largest N - S. Tokens with
    A = 0 have no gradient: to drop them changes the denominators alone, and the cap does not count them.

    It is the published code's rule; the paper describes a mask of outliers of the entropy change, without the limit to
    A <= 0 and without a cap.
    Composition: a token that any control drops is dropped. It shapes no advantage.
    Source: Wang et al., "On the Entropy Dynamics in RFT", arXiv 2602.03392; code: Trinity-RFT,
    trinity/algorithm/advantage_fn/clipv_advantage.py (mu 8.5 by default_args; swept from 7.5 to 8.5).
    """

    name: ClassVar[str] = "clip_v"

    mu: float = 8.5
    max_frac: float = 1e-4

    def __post_init__(self) -> None:
        check.number("mu", self.mu, 0.0)
        check.fraction("max_frac", self.max_frac)

    @torch.no_grad()
    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        drift = rollout.entropy_drift.double()
        spread = drift.std(correction=0)
        high = (drift > self.mu * spread) & (spread >= SMALLEST_SPREAD)
        drop = high & (rollout.advantage == 0)
        negative = (high & (rollout.advantage < 0)).nonzero().flatten()
        most = max(int(self.max_frac * len(drift)), 1)
        drop[negative[drift[negative].argsort(descending=True, stable=True)[:most]]] = True
        return Shaping(drop=drop, metrics={"actor/clip_v_frac": float(drop.double().mean())})
