"""EntroPIC: a PI controller weighs the likely tokens of both signs so that the entropy stays at a target."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Progress, Selection, finite_mean
from entcov.controls.clip_cov import SEMANTICS
from entcov.objective.objectives import UNCLIPPED
from entcov.objective.token_means import token_means
from entcov.objective.tokens import LOG_RATIO_BOUND, PolicyLossConfig, Tokens


@dataclass
class EntroPIC(Control):
    """Weighs tokens with probability > prob_threshold by 1 + alpha where A > 0 and by 1 - alpha where A < 0.

    e = H - target; alpha = clip(kp e + ki I, -1, 1); then I += e. H is the mean entropy of the mini-batch under the
    policy that the update starts from; I sums over updates and survives a restart. H too low gives alpha < 0: likely
    tokens with A > 0, which sharpen the policy, weigh less, and those with A < 0, which flatten it, weigh more.

    semantics  "reference" (default), the authors' code: adds alpha * (mean of -r |A| over the N_high likely tokens),
               without the clip. Under token-mean a likely token's unclipped gradient weighs 1 +- alpha N / N_high.
               "paper": the advantage of a likely token times 1 + alpha (A > 0) or 1 - alpha (A < 0), inside the clip.
    Why this default: gains, target and results were found with the code, whose weights grow as likely tokens become
    fewer.
    The code takes H of each micro-batch on each rank and sums I over them, so alpha depends on the split; here H, N and
    N_high are those of the whole mini-batch, and one update adds one error, as with one micro-batch there. Under other
    aggregations than token-mean the added term takes part in the loss's own, scaled by N / N_high.

    Composition: the added term of "reference" uses A before the multipliers of other controls. Tokens that another
    control's `select` drops are in H but not in the mean that I adds up: do not pair it with high_entropy_tokens
    (denominator "kept"). A second entropy controller (adaptive_bonus, aent) pulls at the same entropy.
    Source: EntroPIC, arXiv 2511.15248; code: yk7333/EntroPIC, dp_actor.py and core_algos.py (kp 1, ki 0.01, threshold
    0.95; target 0.1 in run_entropic.sh).
    """

    name: ClassVar[str] = "entropic"
    reads: ClassVar[tuple[str, ...]] = ("entropy",)
    needs: ClassVar[frozenset[str]] = frozenset({"selection", "entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the weight of positive advantages", "the target of the entropy"})
    state: ClassVar[tuple[str, ...]] = ("integral",)

    target: float = 0.1  # nats
    kp: float = 1.0
    ki: float = 0.01
    prob_threshold: float = 0.95
    semantics: str = "reference"

    def __post_init__(self) -> None:
        check.positive("target", self.target)
        check.number("kp", self.kp, 0.0)
        check.number("ki", self.ki, 0.0)
        check.fraction("prob_threshold", self.prob_threshold)
        check.positive("prob_threshold", self.prob_threshold)
        check.one_of("semantics", self.semantics, SEMANTICS)
        self.integral = 0.0  # nats, of the errors of all updates

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """The term that the reference form adds has the ratios of single tokens, without a clip."""
        return UNCLIPPED if self.semantics == "reference" else None

    @torch.no_grad()
    def select(
        self, tokens: Tokens, *, step: int, config: PolicyLossConfig, group: dist.ProcessGroup | None = None
    ) -> Selection:
        likely = tokens.loss_mask & (tokens.logprob > math.log(self.prob_threshold))
        values = {"entropy": tokens.entropy, "likely": likely.double()}
        mean = token_means(values, tokens.loss_mask, group=group).mean
        alpha = (self.kp * (mean["entropy"] - self.target) + self.ki * self.integral).clamp(-1.0, 1.0)
        metrics = {"actor/entropic_alpha": alpha, "actor/entropic_share": mean["likely"]}
        return Selection(likely, scalars={"alpha": alpha, "share": mean["likely"]}, metrics=metrics)

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        likely, alpha = selection.mask, selection.scalars["alpha"]
        if self.semantics == "paper":
            return Effect(multiplier=1 + torch.where(likely, alpha * tokens.advantage.sign(), 0.0))
        # 0 before the exponential, not after: an infinite ratio elsewhere must not become NaN.
        log_ratio = torch.where(likely, tokens.logprob - tokens.old_logprob, 0.0)
        ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        strength = alpha / selection.scalars["share"].clamp(min=2**-40)  # no token is likely where the share is less
        return Effect(penalty=-strength * torch.where(likely, tokens.advantage.abs(), 0.0) * ratio)

    def after_update(self, means: dict[str, float], progress: Progress) -> None:
        self.integral += finite_mean(self.name, means, "entropy") - self.target
