"""Perplexity shaping: responses that the policy finds likely have larger advantages."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov import arguments as check
from entcov.controls.base import Control, Progress, Shaping
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import Tokens


@dataclass
class PerplexityShaping(Control):
    """A' = A * max(0, 1 - ppl_coef * w), w the response's log-perplexity, standardised over the rollout's responses.

    log PPL of a response is the mean of -logprob over its tokens, under the policy that scored it; w = (log PPL - mean)
    / population std, 0 where the std is 0. A response that the policy finds likely has w < 0 and so a larger |A|; the
    paper finds more to learn in those. The bound at 0 keeps the sign of A.

    The paper's formula and constants were not available to us: the form and ppl_coef are from an unverified note, the
    kind of std and the bound are ours.
    Composition: a multiplier like any other.
    Source: Deng et al., "Decomposing the Entropy-Performance Exchange", arXiv 2508.02260; no official code found.
    """

    name: ClassVar[str] = "perplexity_shaping"

    ppl_coef: float = 0.01

    def __post_init__(self) -> None:
        check.number("ppl_coef", self.ppl_coef, 0.0)

    @torch.no_grad()
    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        responses = SequenceIndex.of(rollout.sequence)
        log_ppl = -responses.means(rollout.logprob)
        centred, spread = log_ppl - log_ppl.mean(), log_ppl.std(correction=0)
        standard = torch.where(spread > 0, centred / spread, 0.0)
        multiplier = (1 - self.ppl_coef * standard).clamp(min=0.0)
        metrics = {"actor/log_ppl": float(log_ppl.mean()), "actor/log_ppl_std": float(spread)}
        return Shaping(multiplier[responses.index].to(rollout.advantage.dtype), metrics=metrics)
