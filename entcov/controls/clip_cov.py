"""Clip-Cov: some random tokens of those with high covariance take no part in the policy gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Selection
from entcov.objective.selection import select_clip_cov
from entcov.objective.token_covariance import token_covariance
from entcov.objective.tokens import LOG_RATIO_BOUND, PolicyLossConfig, Tokens

SEMANTICS = ("paper", "reference")
SCOPES = ("global", "micro_batch", "rollout")


@dataclass
class ClipCov(Control):
    """Drops floor(clip_cov_ratio * N) tokens, drawn uniformly among those with covariance in [lb, ub].

    semantics  "paper" (default): the draw as above. "reference", as verl and the authors' code: at least one token
               (max(int(ratio N), 1)), open interval, tokens that the PPO clip stops are no candidates, 1e-8 in the
               means' denominators. The draw is by hash in both; the reference's own depends on the global generator.
    scope      "global" (default): N and the means are those of the mini-batch. "micro_batch": of each micro-batch on
               each rank alone, as the reference code computes them. "rollout": of the whole rollout under the policy
               that scored it, drawn once and the same in all updates, as eq. 10 says of the rollout batch.
    Why these defaults: the paper's count is a fraction of the batch for every batch size, while the reference's floor
    of one token a micro-batch makes the strength depend on how the batch is split, and one sequence a micro-batch
    selects nothing, because its advantage is constant. Zero strength is clip_cov_ratio=0 with semantics "paper".

    In both, a dropped token's loss is 0 in value and gradient and it still counts in the denominators. The authors
    train with clip_low = clip_high = 1; those belong to PolicyLossConfig.
    Source: Cui et al., arXiv 2505.22617, eq. 10-12, sec. 4.3 (ratio 2e-4, bounds 1 and 5); verl loss mode "clip_cov".
    """

    name: ClassVar[str] = "clip_cov"
    reads: ClassVar[tuple[str, ...]] = ("token_id",)
    needs: ClassVar[frozenset[str]] = frozenset({"selection"})

    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    semantics: str = "paper"
    scope: str = "global"
    seed: int = 0

    def __post_init__(self) -> None:
        # Published values are about 1e-4; more than half of all tokens is a mistake.
        check.fraction("clip_cov_ratio", self.clip_cov_ratio, 0.5)
        check.number("clip_cov_lb", self.clip_cov_lb, -math.inf, math.inf)
        check.number("clip_cov_ub", self.clip_cov_ub, self.clip_cov_lb, hint="the lower end is clip_cov_lb")
        check.one_of("semantics", self.semantics, SEMANTICS)
        check.one_of("scope", self.scope, SCOPES)
        check.integer("seed", self.seed, 0)

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """The reference form leaves out the tokens that PPO's clip stops."""
        return ("ppo",) if self.semantics == "reference" else None

    @torch.no_grad()
    def select(
        self, tokens: Tokens, *, step: int, config: PolicyLossConfig, group: dist.ProcessGroup | None = None
    ) -> Selection:
        reference = self.semantics == "reference"
        covariance = token_covariance(
            tokens.logprob,
            tokens.advantage,
            tokens.loss_mask,
            group=group,
            denominator_eps=1e-8 if reference else 0.0,
            empty_ok=self.scope == "micro_batch",
        )
        chosen = select_clip_cov(
            covariance,
            tokens.token_id,
            ratio=self.clip_cov_ratio,
            low=self.clip_cov_lb,
            high=self.clip_cov_ub,
            seed=self.seed,
            step=step,
            at_least=1 if reference else 0,
            strict=reference,
            exclude=_ppo_clipped(tokens, config) if reference else None,
            group=group,
        )
        return Selection(chosen.mask)

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(keep=~selection.mask, metrics={"actor/cov_clipfrac": selection.mask})


def _ppo_clipped(tokens: Tokens, config: PolicyLossConfig) -> Tensor:
    ratio = (tokens.logprob - tokens.old_logprob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -tokens.advantage * bounded > -tokens.advantage * ratio
