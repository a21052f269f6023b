"""SENT's token level: a KL penalty on low-entropy tokens, a larger one where their covariance is high."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Selection
from entcov.controls.clip_cov import SEMANTICS
from entcov.objective.objectives import UNCLIPPED
from entcov.objective.selection import select_largest
from entcov.objective.token_covariance import token_covariance
from entcov.objective.token_means import token_scores
from entcov.objective.tokens import LOG_RATIO_BOUND, PolicyLossConfig, Tokens

PPO_KL_COEF = {"reference": 0.1, "paper": 1e-3}


@dataclass
class SENT(Control):
    """Penalises tokens among T_low, the int(low_entropy_ratio * N) tokens of the mini-batch with the lowest entropy.

    With Cov_i as in Cui et al., its means over T_low, and k = int(kl_cov_ratio * |T_low|):
    semantics  "reference" (default), the code's loss mode low_entropy_kl_cov_v2: the k (at least 1) tokens of T_low
               with the largest covariance get ppo_kl_coef * high_cov_coef * |logprob - old_logprob|, the k with the
               smallest ppo_kl_coef * low_cov_coef times it; no PPO clip on any token.
               "paper": the k of T_low with the largest covariance get ppo_kl_coef * high_cov_coef times an estimate of
               KL(policy || reference policy) (k3), all others of T_low ppo_kl_coef * low_cov_coef times it; the
               loss's own clip stays. The paper's thresholds tau_H and tau_cov are these two ratios here.
    Why this default: all its constants are public, and it needs no second model. ppo_kl_coef is 0.1, which verl's
    configuration gives to the authors' scripts (the code falls back to 1), or 1e-3 under "paper", where beta_high and
    beta_low are unpublished: the KL coefficient of their scripts, our reading.

    Not reproduced: the code indexes advantages and log-probabilities with an integer mask, which takes whole rows, so
    that its covariances belong to other tokens; and it selects in each micro-batch (scope="micro_batch" does).
    The scripts add loss.kl_coef 0.001 with k3 on all tokens.
    Composition: "reference" drops the clip for the whole loss, as kl_cov's "reference" does; both together penalise the
    top covariances twice. "paper" with loss.kl_coef > 0 penalises T_low twice, as the scripts do.
    Source: SENT, arXiv 2512.04359; code: zldscr0/SENT, verl/trainer/ppo/core_algos.py (0.8, 2e-4, 2.0, 0.5). Its data
    level, the ordering of prompts by semantic entropy, is no control.
    """

    name: ClassVar[str] = "sent"
    reads: ClassVar[tuple[str, ...]] = ("token_id", "entropy")
    sets: ClassVar[frozenset[str]] = frozenset(
        {"the loss of low-entropy tokens", "the penalty on log-ratios", "the clip of the ratio"}
    )

    low_entropy_ratio: float = 0.8
    kl_cov_ratio: float = 2e-4
    ppo_kl_coef: float | None = None
    high_cov_coef: float = 2.0
    low_cov_coef: float = 0.5
    semantics: str = "reference"
    scope: str = "global"
    seed: int = 0  # of the hash that decides ties

    def __post_init__(self) -> None:
        check.one_of("semantics", self.semantics, SEMANTICS)
        check.one_of("scope", self.scope, ("global", "micro_batch"))
        self.ppo_kl_coef = PPO_KL_COEF[self.semantics] if self.ppo_kl_coef is None else self.ppo_kl_coef
        check.fraction("low_entropy_ratio", self.low_entropy_ratio)
        check.fraction("kl_cov_ratio", self.kl_cov_ratio, 0.5)
        check.number("ppo_kl_coef", self.ppo_kl_coef, 0.0)
        check.number("low_cov_coef", self.low_cov_coef, 0.0)
        check.number("high_cov_coef", self.high_cov_coef, self.low_cov_coef, hint="the lower end is low_cov_coef")
        check.integer("seed", self.seed, 0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"selection", "entropy"} | ({"ref_logprob"} if self.semantics == "paper" else set()))

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
        reference = self.semantics == "reference"
        empty_ok = self.scope == "micro_batch"
        by_hash = {"seed": self.seed, "step": step, "at_least": int(reference), "group": group}
        entropy = token_scores("entropy", tokens.entropy, tokens.loss_mask, group=group, empty_ok=empty_ok)
        low = select_largest(-entropy, tokens.token_id, ratio=self.low_entropy_ratio, **by_hash).mask
        covariance = token_covariance(tokens.logprob, tokens.advantage, low, group=group, empty_ok=True)
        top = select_largest(covariance, tokens.token_id, ratio=self.kl_cov_ratio, **by_hash).mask
        if reference:
            low = select_largest(-covariance, tokens.token_id, ratio=self.kl_cov_ratio, **by_hash).mask
            top = top & ~low  # the code writes the smaller penalty last
        high, small = self.ppo_kl_coef * self.high_cov_coef, self.ppo_kl_coef * self.low_cov_coef
        return Selection(weight=torch.where(top, high, torch.where(low, small, 0.0)))

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        reference, weight = self.semantics == "reference", selection.weight
        effect = Effect(unclipped=reference, metrics={"actor/sent_klfrac": weight > 0})
        if self.ppo_kl_coef > 0:
            # Set to 0 before, not multiplied by 0 after: an infinite ratio elsewhere must not become NaN.
            other = tokens.old_logprob if reference else tokens.ref_logprob
            d = torch.where(weight > 0, other - tokens.logprob, 0.0)
            if not reference:
                d = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
            effect.penalty = weight * (d.abs() if reference else d.exp() - d - 1)
        return effect
