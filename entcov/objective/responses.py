"""The responses of a rollout as one table: what advantage estimators and controls know of whole responses."""

from __future__ import annotations

from collections.abc import Callable
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
    baseline: Tensor | None = None  # float, the score of a greedy response to the same prompt
    components: dict[str, Tensor] | None = None  # float, by name, where the reward function returns several; sum: score

    def __post_init__(self) -> None:
        for field in fields(self)[:6]:
            dtypes = _FLOAT if field.name in ("reward", "score") else (torch.int64,)
            check.vector(field.name, getattr(self, field.name), dtypes, self.reward)
        if self.baseline is not None:
            check.vector("baseline", self.baseline, _FLOAT, self.reward)
        for name, value in (self.components or {}).items():
            check.vector(f"components.{name}", value, _FLOAT, self.reward)

    @classmethod
    def of(cls, reward: Tensor, group: Tensor, length: Tensor) -> Responses:
        """A table of fresh responses without reward shaping, numbered in their order."""
        return cls(reward, reward, group, length, torch.arange(len(reward)), torch.zeros_like(group))

    def at(self, index: Any) -> Responses:
        """The responses that `index` (a mask or indices) takes."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Responses:
        return self._map(lambda value: value.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Responses:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.components is not None:
            changed["components"] = {name: change(value) for name, value in self.components.items()}
        return replace(self, **changed)
