"""What `ControlledLoss.begin` keeps of this rank's tokens for the updates on a rollout, by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.controls import Control, Shaped
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import Tokens


def decides(control: Control) -> bool:
    """Whether the control's `begin` does anything."""
    return type(control).begin is not Control.begin or control.scope == "rollout"


def reads_rollout(control: Control) -> bool:
    """Whether `begin` needs the rollout's tokens for the control."""
    return decides(control) or control.reads_scored or "old_entropy" in control.needs


@dataclass
class Remembered:
    """What is kept of this rank's tokens of the rollout for its updates, in the order of their ids; all [n]."""

    token_id: Tensor
    entropy: Tensor | None  # of the policy that scored them
    # What `begin` decided of them:
    advantage: Tensor | None = None
    drop: Tensor | None = None
    length: Tensor | None = None  # loss tokens of each token's response, without dropped ones
    chosen: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, own: Tokens, controls: Sequence[Control]) -> Remembered | None:
        """What the controls need before `begin` has decided; None where they need nothing of single tokens."""
        comparing = [control.name for control in controls if "old_entropy" in control.needs]
        if not comparing and not any(map(decides, controls)):
            return None
        if own.token_id is None:
            raise ValueError("tokens.token_id must be given, what begin remembers is kept by it; got None")
        ids, order = own.token_id[own.loss_mask].sort()
        entropy = own.given("entropy", f"control {comparing[0]}")[own.loss_mask][order] if comparing else None
        return cls(ids, entropy)

    def add(self, whole: Tokens, shaped: Shaped) -> None:
        """What the controls decided of the tokens of all ranks, which `whole` has in the order of their ids."""
        at = torch.searchsorted(whole.token_id, self.token_id)
        if shaped.drop is not None:
            responses = SequenceIndex.of(whole.given("sequence", "a control that drops tokens"))
            self.drop, self.length = shaped.drop[at], responses.sum(~shaped.drop).long()[at]
        self.advantage = shaped.advantage[at]
        self.chosen = {name: mask[at] for name, mask in shaped.selected.items()}

    def applied_to(self, tokens: Tokens) -> Tokens:
        """The tokens with all that is kept of them: old_entropy, advantage, mask, length of the response."""
        at, changed = self._places(tokens), {}
        if self.entropy is not None:
            changed["old_entropy"] = self.entropy[at].to(tokens.logprob.dtype)
        if self.advantage is not None:
            advantage = torch.where(tokens.loss_mask, self.advantage[at], 0.0)
            changed["advantage"] = advantage.to(tokens.advantage.dtype)
        if self.drop is not None:
            changed["loss_mask"] = tokens.loss_mask & ~self.drop[at]
            changed["sequence_length"] = tokens.sequence_length if tokens.sequence_length is None else self.length[at]
        return replace(tokens, **changed)

    def selected(self, name: str, tokens: Tokens) -> Tensor:
        """[T] bool: what the control `name` chose for all updates."""
        return tokens.loss_mask & self.chosen[name][self._places(tokens)]

    def _places(self, tokens: Tokens) -> Tensor:
        """[T]: where each loss token is in the order of the ids; others may be anywhere."""
        if tokens.token_id is None:
            raise ValueError("tokens.token_id must be given, what begin remembers is kept by it; got None")
        if not len(self.token_id):
            if check.readable(tokens.loss_mask) and tokens.loss_mask.any():
                raise ValueError("tokens must be of the rollout that begin was given, which had none on this rank")
            return torch.zeros_like(tokens.token_id)
        at = torch.searchsorted(self.token_id, tokens.token_id).clamp(max=len(self.token_id) - 1)
        strange = tokens.loss_mask & (self.token_id[at] != tokens.token_id)
        if check.readable(strange) and strange.any():
            raise ValueError(
                f"tokens must be of the rollout that this rank gave to begin: {int(strange.sum())} of "
                f"{int(tokens.loss_mask.sum())} have another token_id"
            )
        return at
