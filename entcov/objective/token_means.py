"""Means over the tokens of the optimizer's mini-batch, bit-identical for every split, every order and number of ranks.

Sums are integers: each value is written in fixed point as coarse * 2^-10 + fine * 2^-41, and the two integers are added
in int64, where addition is associative. A floating sum depends on its order in the last bit, which would decide about
tokens at a threshold. A value is off by at most 2^-42; 2^32 tokens of |value| <= 2^20 fit.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.stats.ranks import AllReduces, attempt

COARSE = 2.0**10
FINE = 2.0**31  # of a remainder of at most 1/2: 2^30 a token
LARGEST = 2.0**20


@dataclass(frozen=True)
class TokenScores:
    """A number for every token of a mini-batch: what entcov/objective/selection.py chooses tokens by."""

    value: Tensor  # [T] float32, 0 outside the mask
    mask: Tensor  # [T] bool
    num_tokens: Tensor  # 0-d int64, under the mask, over all ranks

    def __neg__(self) -> Self:
        """The same scores with the other sign."""
        return replace(self, value=-self.value)


class TokenMeans(NamedTuple):
    mean: dict[str, Tensor]  # 0-d float64 each; NaN if no token is under the mask
    num_tokens: Tensor  # 0-d int64


@torch.no_grad()
def token_means(
    values: dict[str, Tensor], mask: Tensor, *, group: dist.ProcessGroup | None = None, empty_ok: bool = False
) -> TokenMeans:
    """The mean of each of `values` over all unmasked tokens of the mini-batch, exact up to 2^-42.

    Args:
        values: [T] float32 or float64 each, by the name that messages use. Values outside the mask are not used.
        mask: [T] bool.
        group: data-parallel group that shares the mini-batch. None: all of it is here (not torch's default group).
        empty_ok: no unmasked token anywhere is no error.
    Not differentiable. Nothing is mutated.
    Collectives: 1 all-reduce of 16 bytes a name and 16 more, and 8 for each rank; every rank must call.
    Raises: TypeError, ValueError for dtypes and shapes; ValueError on every rank (CPU) if any unmasked value of any
        rank is not finite or exceeds 2^20, or no token is unmasked on any rank. RuntimeError where another rank failed
        or was called differently; on an accelerator the means are NaN there instead.
    """

    def checked() -> None:
        check.vector("mask", mask, (torch.bool,))
        for name, value in values.items():
            check.vector(name, value, (torch.float32, torch.float64), mask)

    _, failure = attempt(checked, group)
    call = {"values": list(values), "empty_ok": empty_ok}
    device = mask.device if isinstance(mask, Tensor) else torch.device("cpu")
    ranks = AllReduces("token_means", group, device, call, failure=failure)
    if failure is not None:
        values = dict.fromkeys(values, torch.zeros(0, device=device))
        mask, empty_ok = torch.zeros(0, dtype=torch.bool, device=device), True
    _, mean, num_tokens = means_over(ranks, values, mask, 0.0, empty_ok)
    ranks.finish()
    return TokenMeans(dict(zip(values, mean, strict=True)), num_tokens)


def token_scores(
    name: str, value: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None, empty_ok: bool = False
) -> TokenScores:
    """The scores `value` [T], rounded to float32. Arguments, collectives and errors as `token_means`."""
    means = token_means({name: value}, mask, group=group, empty_ok=empty_ok)
    value = value.detach().float() + 0.0 * means.mean[name]  # NaN where the ranks do not agree
    return TokenScores(torch.where(mask, value, 0.0), mask, means.num_tokens)


def means_over(
    ranks: AllReduces, values: dict[str, Tensor], mask: Tensor, denominator_eps: float, empty_ok: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(the values as float64 [k, T], 0 outside the mask; their means [k]; number of tokens) of checked arguments, by
    the all-reduce of a call that `ranks` has opened."""
    stacked = torch.where(mask, torch.stack(list(values.values())).double(), 0.0)
    bad = ~(stacked.abs() <= LARGEST)  # NaN too
    sums = torch.cat(
        [fixed_point(torch.where(bad, 0.0, stacked)).sum(-1).flatten(), torch.stack([mask.sum(), bad.sum()])]
    )
    sums = ranks.sum(sums)
    num_tokens, num_bad = sums[-2], sums[-1]
    if check.readable(sums):
        if num_bad > 0:
            own = [f"{int(n)} in {name}" for name, n in zip(values, bad.sum(-1), strict=True)]
            raise ValueError(
                f"{' and '.join(values)} must be finite and at most 2^20 in size under the mask: {int(num_bad)} of "
                f"{len(values) * int(num_tokens)} values over all ranks are not, {' and '.join(own)} on this rank"
            )
        if num_tokens == 0 and not empty_ok:
            raise ValueError("mask must have a True token on at least one rank, got none in the whole mini-batch")
    mean = from_fixed_point(sums[:-2].reshape(-1, 2)) / (num_tokens + denominator_eps)
    bad_anywhere = num_bad > 0 if ranks.refused is None else (num_bad > 0) | ranks.refused
    return stacked, torch.where(bad_anywhere, torch.nan, mean), num_tokens


def fixed_point(x: Tensor) -> Tensor:
    """float64 [..., T], at most 2^20 in size -> int64 [..., 2, T]: coarse and fine part."""
    coarse = (x * COARSE).round()
    fine = ((x * COARSE - coarse) * FINE).round()
    return torch.stack([coarse, fine], dim=-2).long()


def from_fixed_point(sums: Tensor) -> Tensor:
    """int64 [..., 2], sums of coarse and fine parts -> float64 [...]."""
    return sums[..., 0].double() / COARSE + sums[..., 1].double() / (COARSE * FINE)
