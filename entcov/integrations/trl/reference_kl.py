"""The KL term of TRL's loss (`beta`), as a penalty that every token has."""

from dataclasses import dataclass
from typing import ClassVar

from entcov.controls.base import Control, Effect, Selection
from entcov.objective.tokens import Tokens


@dataclass
class ReferenceKL(Control):
    """Adds beta * k3, k3 = exp(d) - d - 1 with d = ref_logprob - logprob, to every token's loss.

    With `corrected` (use_bias_correction_kl), k3 times the token's ratio exp(logprob - old_logprob), differentiable.
    Source: TRL 1.16, grpo_trainer.py `_compute_loss`; no bound on d and k3, unlike `entcov.objective.kl_estimate`.
    """

    name: ClassVar[str] = "beta"  # in entcov.json
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprob"})

    beta: float
    corrected: bool

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        d = tokens.given("ref_logprob", "beta") - tokens.logprob
        kl = d.exp() - d - 1
        return Effect(penalty=self.beta * (kl * (tokens.logprob - tokens.old_logprob).exp() if self.corrected else kl))
