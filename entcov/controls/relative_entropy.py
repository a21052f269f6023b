"""PREPO's rollout weights: responses with more entropy than the average weigh more."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from entcov.controls.base import Control, Progress, Shaping
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import Tokens


@dataclass
class RelativeEntropy(Control):
    """Multiplies the advantages of response i by w_i = H_i / mean(H), H_i its mean token entropy.

    The mean is over the responses of the rollout, so the weights average to 1; entropies are those of the policy that
    scored, and constants for the gradient. Where all entropies are 0 the weights are 1.

    Our reading, where the text that we have does not say: the batch mean is one of responses and not of tokens, the
    weights are detached, and the loss's own aggregation stays.
    The other half of PREPO, which chooses prompts by perplexity, is no control.
    Composition: a multiplier like any other.
    Source: Sun et al., "Efficient RL for LLMs with Intrinsic Exploration" (PREPO), arXiv 2511.00794, from secondary
    notes; no official code found.
    """

    name: ClassVar[str] = "relative_entropy"

    @torch.no_grad()
    def begin(self, rollout: Tokens, progress: Progress) -> Shaping:
        responses = SequenceIndex.of(rollout.sequence)
        entropy = responses.means(rollout.entropy)
        weight = torch.where(entropy.mean() > 0, entropy / entropy.mean(), 1.0)
        metrics = {"actor/relative_entropy_max": float(weight.max()), "actor/relative_entropy_min": float(weight.min())}
        return Shaping(weight[responses.index].to(rollout.advantage.dtype), metrics=metrics)
