"""ERC: a token whose entropy has moved too far since the rollout has no policy gradient."""

from dataclasses import dataclass
from typing import ClassVar

from entcov import arguments as check
from entcov.controls.base import Control, Effect, Selection
from entcov.objective.tokens import Tokens

EPS = 1e-8  # nats, of the published code


@dataclass
class EntropyRatioClip(Control):
    """Keeps the tokens with 1 - low < (H + 1e-8) / (H_old + 1e-8) < 1 + high; the others have no policy gradient.

    H is the entropy of the whole next-token distribution under the current policy, H_old under the policy that scored
    the rollout. The ratio r of PPO's clip sees the sampled token alone; this one sees what moved elsewhere too. On the
    first update after a rollout every ratio is 1 up to rounding, so with one update per rollout the control does
    nothing. Where both entropies are near 0 (below about 1e-7 nats, the rounding of float32) the ratio is noise, and so
    is the gradient that it stops.

    Entropies are at the temperature of the loss. Composition: on top of the objective's own clip; a stopped token still
    counts in every denominator. Published with PPO's clip (0.2, 0.28) and with CE-GPPO.
    Source: Su et al., Entropy Ratio Clipping, arXiv 2512.05591 (0.05 both ways; about 20 % of the tokens are stopped);
        code: Kwai-Klear/ERC, compute_policy_loss_grpo_erc (entropy_mask_low 0.95, entropy_mask_high 1.05).
    """

    name: ClassVar[str] = "entropy_ratio_clip"
    needs: ClassVar[frozenset[str]] = frozenset({"entropy", "old_entropy"})

    entropy_ratio_low: float = 0.05
    entropy_ratio_high: float = 0.05

    def __post_init__(self) -> None:
        check.fraction("entropy_ratio_low", self.entropy_ratio_low)
        check.number("entropy_ratio_high", self.entropy_ratio_high, 0.0)

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        # Rounding can make an entropy of 0 negative, and the denominator 0.
        ratio = (tokens.entropy.detach().clamp(min=0) + EPS) / (tokens.old_entropy.clamp(min=0) + EPS)
        keep = (ratio > 1 - self.entropy_ratio_low) & (ratio < 1 + self.entropy_ratio_high)
        return Effect(keep=keep, metrics={"actor/entropy_ratio_clipfrac": ~keep})
