"""80/20: only the tokens with the highest entropy are trained on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Selection
from entcov.objective.selection import select_largest
from entcov.objective.token_means import token_scores
from entcov.objective.tokens import PolicyLossConfig, Tokens


@dataclass
class HighEntropyTokens(Control):
    """Trains on the ceil(top_entropy_quantile * N) tokens of the mini-batch with the highest entropy.

    The entropy is the current policy's, the order is exact over the whole mini-batch, and a hash of (seed, step,
    token_id) decides between equal ones.

    denominator  "kept" (default), as the authors' code: the other tokens leave the loss, its penalties and its
                 denominators, so each kept token weighs 1 / quantile times more than in the plain loss. "all", as TRL's
                 top_entropy_quantile: they lose their policy-gradient term and stay in the denominators.
    scope        "global" (default): the mini-batch. "micro_batch": each micro-batch on each rank alone, as the
                 authors' code.
    Why this default: the published gains are the authors'; with "all" a learning rate means another step.
    TRL keeps every token at or above the quantile of all entropies, with ties and one token more or fewer for some N.

    Composition: a controller that steers by means of the mini-batch (adaptive_bonus, aent, entropic's integral) sees
    the kept tokens alone under "kept". Controls that select by covariance choose before tokens are dropped, so they
    spend part of their share on dropped ones.
    Source: Wang et al., "Beyond the 80/20 Rule", arXiv 2506.01939 (20 percent, on DAPO); code:
    Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR, verl/trainer/ppo/core_algos.py; TRL 1.16, GRPOConfig.top_entropy_quantile.
    """

    name: ClassVar[str] = "high_entropy_tokens"
    reads: ClassVar[tuple[str, ...]] = ("token_id", "entropy")
    needs: ClassVar[frozenset[str]] = frozenset({"selection", "entropy"})
    sets: ClassVar[frozenset[str]] = frozenset({"the loss of low-entropy tokens"})

    top_entropy_quantile: float = 0.2  # fraction that is kept; 1 keeps all
    denominator: str = "kept"
    scope: str = "global"
    seed: int = 0  # of the hash that decides ties

    def __post_init__(self) -> None:
        check.fraction("top_entropy_quantile", self.top_entropy_quantile)
        check.positive("top_entropy_quantile", self.top_entropy_quantile)
        check.one_of("denominator", self.denominator, ("kept", "all"))
        check.one_of("scope", self.scope, ("global", "micro_batch"))
        check.integer("seed", self.seed, 0)

    @torch.no_grad()
    def select(
        self, tokens: Tokens, *, step: int, config: PolicyLossConfig, group: dist.ProcessGroup | None = None
    ) -> Selection:
        empty_ok = self.scope == "micro_batch"
        entropy = token_scores("entropy", tokens.entropy, tokens.loss_mask, group=group, empty_ok=empty_ok)
        chosen = select_largest(
            entropy, tokens.token_id, ratio=self.top_entropy_quantile, seed=self.seed, step=step, at_least=1,
            round_up=True, group=group,
        )  # fmt: skip
        metrics = {"actor/entropy_threshold": chosen.threshold}
        if self.denominator == "all":
            return Selection(chosen.mask, metrics=metrics)
        return Selection(drop=tokens.loss_mask & ~chosen.mask, metrics=metrics)

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(keep=selection.mask)  # None where the others have left the mask
