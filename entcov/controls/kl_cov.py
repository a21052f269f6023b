"""KL-Cov: a KL penalty, towards the old policy, on the tokens with the highest covariance."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Selection
from entcov.controls.clip_cov import SCOPES, SEMANTICS
from entcov.objective.objectives import UNCLIPPED
from entcov.objective.selection import select_largest
from entcov.objective.token_covariance import token_covariance
from entcov.objective.tokens import LOG_RATIO_BOUND, PolicyLossConfig, Tokens


@dataclass
class KLCov(Control):
    """Adds ppo_kl_coef * penalty to the loss of the kl_cov_ratio * N tokens with the largest covariance.

    semantics  "reference" (default), as the authors' code and verl: max(int(ratio N), 1) tokens, penalty
               |logprob - old_logprob|, and no PPO clip on any token. "paper", the objective as an equation: floor(ratio
               N) tokens, penalty an estimate of KL(old || current), r - 1 - log r with r = exp(logprob - old_logprob)
               (unbiased in value and gradient for tokens sampled from the old policy), and the loss's own clip stays.
    scope      "global" (default): N and the means are those of the mini-batch. "micro_batch": of each micro-batch on
               each rank alone, as the reference code computes them. "rollout": of the whole rollout under the policy
               that scored it, chosen once and the same in all updates.
    Why these defaults: every published number comes from the reference penalty, which the paper's own listing prints
    too, and its coefficient of 1 means something else under "paper": near r = 1 the gradient of |log r| has size 1,
    that of r - 1 - log r has size |r - 1|. The scope is global because per micro-batch other tokens are chosen for
    every split. Zero strength is ppo_kl_coef=0, which keeps the selection's metrics and the missing clip.

    Where logprob == old_logprob both penalties have gradient 0: with one update per rollout KL-Cov is the plain policy
    gradient. The authors' own repository takes the ratio in percent (0.2), verl and this control as a fraction; verl's
    default ppo_kl_coef is 0.1, the paper's 1.
    Source: Cui et al., arXiv 2505.22617, sec. 4.2-4.3 (ratio 2e-3 at 7B, 2e-4 at 32B); verl loss mode "kl_cov".
    """

    name: ClassVar[str] = "kl_cov"
    reads: ClassVar[tuple[str, ...]] = ("token_id",)
    needs: ClassVar[frozenset[str]] = frozenset({"selection"})
    sets: ClassVar[frozenset[str]] = frozenset({"the penalty on log-ratios", "the clip of the ratio"})

    kl_cov_ratio: float = 2e-3
    ppo_kl_coef: float = 1.0
    semantics: str = "reference"
    scope: str = "global"
    seed: int = 0  # of the hash that decides ties

    def __post_init__(self) -> None:
        # 0.2 is legal here and is the percent that the authors' scripts pass: the message says so only above 0.5.
        check.fraction("kl_cov_ratio", self.kl_cov_ratio, 0.5)
        check.number("ppo_kl_coef", self.ppo_kl_coef, 0.0)
        check.one_of("semantics", self.semantics, SEMANTICS)
        check.one_of("scope", self.scope, SCOPES)
        check.integer("seed", self.seed, 0)

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """The reference form drops the clip of single tokens."""
        return UNCLIPPED if self.semantics == "reference" else None

    @property
    def baseline_knobs(self) -> dict[str, Any] | None:
        """Without its penalty, the reference form still drops the PPO clip."""
        return {"ppo_kl_coef": 0.0} if self.semantics == "reference" else None

    @torch.no_grad()
    def select(
        self, tokens: Tokens, *, step: int, config: PolicyLossConfig, group: dist.ProcessGroup | None = None
    ) -> Selection:
        covariance = token_covariance(
            tokens.logprob, tokens.advantage, tokens.loss_mask, group=group, empty_ok=self.scope == "micro_batch"
        )
        chosen = select_largest(
            covariance,
            tokens.token_id,
            ratio=self.kl_cov_ratio,
            seed=self.seed,
            step=step,
            at_least=1 if self.semantics == "reference" else 0,
            group=group,
        )
        return Selection(chosen.mask, metrics={"actor/cov_threshold": chosen.threshold})

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        reference = self.semantics == "reference"
        effect = Effect(unclipped=reference, metrics={"actor/cov_klfrac": selection.mask})
        if self.ppo_kl_coef > 0:
            # Set to 0 before, not multiplied by 0 after: an infinite ratio elsewhere must not become NaN.
            log_ratio = torch.where(selection.mask, tokens.logprob - tokens.old_logprob, 0.0)
            if reference:
                penalty = log_ratio.abs()
            else:
                log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
                penalty = log_ratio.exp() - 1 - log_ratio
            effect.penalty = self.ppo_kl_coef * penalty
        return effect
