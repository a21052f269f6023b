"""The responses of a rollout as one table: what advantage estimators and controls know of whole responses."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from entcov import arguments as check

_FLOAT = (torch.float32, torch.float64)


@dataclass
class Responses:
    """All responses of a rollout; every field is [B]."""

    reward: Tensor  # float, what the advantage is computed from: the score after reward shaping
    score: Tensor  # float, as scored
    group: Tensor  # int64, responses to the same prompt share it; any values, any order
    length: Tensor  # int64, loss tokens of the response
    number: Tensor  # int64, of the response in the rollout, from 0
    lag: Tensor  # int64, training steps by which the policy is newer than the one that sampled

    def __post_init__(self) -> None:
        for field in fields(self):
            dtypes = _FLOAT if field.name in ("reward", "score") else (torch.int64,)
            check.vector(field.name, getattr(self, field.name), dtypes, self.reward)

    @classmethod
    def of(cls, reward: Tensor, group: Tensor, length: Tensor) -> Responses:
        """A table of fresh responses without reward shaping, numbered in their order."""
        return cls(reward, reward, group, length, torch.arange(len(reward)), torch.zeros_like(group))

    def at(self, index: Any) -> Responses:
        """The responses that `index` (a mask or indices) takes."""
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self, device: torch.device | str) -> Responses:
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})
