"""Which response each token of a micro-batch belongs to, and sums over whole responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.objective.token_means import fixed_point, from_fixed_point


@dataclass(frozen=True)
class SequenceIndex:
    """The responses of one micro-batch.

    index: [T] int64, the number of each token's response in the micro-batch, from 0
    count: responses in the micro-batch
    group: the ranks that the tokens of these responses are divided over (context parallelism), which have the same
        numbers; None: this process has whole responses
    """

    index: Tensor
    count: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        check.vector("index", self.index, (torch.int64,))
        check.integer("count", self.count, 0)
        if check.readable(self.index) and self.index.numel():
            low, high = (int(x) for x in self.index.aminmax())
            if not 0 <= low <= high < self.count:
                raise ValueError(f"index must be in [0, {self.count}), got {low} to {high}")

    @classmethod
    def of(cls, sequence: Tensor) -> SequenceIndex:
        """From numbers that are equal for the tokens of one response; whole responses. The host waits for the count."""
        check.vector("sequence", sequence, (torch.int64,))
        numbers, index = sequence.unique(return_inverse=True)
        return cls(index, len(numbers))

    @torch.no_grad()
    def totals(self, value: Tensor) -> Tensor:
        """[count] float64: the sum of `value` [T] over each response. Not differentiable.

        Collectives: 1 all-reduce of 8 bytes a response where there is a group; every rank of it must call.
        """
        check.vector("value", value, (torch.float32, torch.float64, torch.bool, torch.int64), self.index)
        sums = torch.zeros(self.count, dtype=torch.float64, device=value.device)
        sums.index_add_(0, self.index, value.detach().double())
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums

    @torch.no_grad()
    def means(self, value: Tensor) -> Tensor:
        """[count] float64: the mean of `value` [T] over each response, at most 2^20 in size; whole responses.

        The sums are integers (entcov/objective/token_means.py), so their bits do not depend on the order of the tokens,
        on a GPU too.
        """
        check.vector("value", value, (torch.float32, torch.float64), self.index)
        sums = torch.zeros(self.count, 2, dtype=torch.int64, device=value.device)
        sums.index_add_(0, self.index, fixed_point(value.detach().double()).T)
        return from_fixed_point(sums) / self.index.bincount(minlength=self.count)

    def sum(self, value: Tensor) -> Tensor:
        """[T] float64: for each token the sum of `value` [T] over its response. As `totals`."""
        return self.totals(value)[self.index]
