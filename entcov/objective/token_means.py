"""Means over the tokens of the optimizer's mini-batch, bit-identical for every split, every order and number of ranks.

Sums are integers (csrc/token_select.h): each value is written in fixed point as coarse * 2^-10 + fine * 2^-41, and the
two integers are added in int64, where addition is associative. A floating sum depends on its order in the last bit,
which would decide about tokens at a threshold. A value is off by at most 2^-42; 2^32 - 1 tokens of |value| <= 2^20 fit.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.ops import token_means as means_op
from entcov.ops import token_scores as scores_op
from entcov.ops import token_sums as sums_op
from entcov.stats.ranks import AllReduces, attempt

COARSE, FINE = 2.0**10, 2.0**31  # kCoarse and kFine of csrc/token_select.h


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
        values: at most 8 of [T] float32 or float64, by the name that messages use; not used outside the mask.
        mask: [T] bool.
        group: data-parallel group that shares the mini-batch. None: all of it is here (not torch's default group).
        empty_ok: no unmasked token anywhere is no error.
    Not differentiable. Nothing is mutated.
    Collectives: 1 all-reduce of 16 bytes a name and 16 more, and 8 for each rank; every rank must call.
    Raises: TypeError, ValueError for dtypes and shapes; ValueError on every rank (CPU) if any unmasked value of any
        rank is not finite or exceeds 2^20, or no token is unmasked on any rank. RuntimeError where another rank failed
        or was called differently; on an accelerator the means are NaN there instead.
    """
    sums, refused = _sums_of_group(values, mask, group, empty_ok)
    mean = means_op.token_means(sums, refused=refused)
    return TokenMeans(dict(zip(values, mean, strict=True)), sums[-2])


@torch.no_grad()
def token_scores(
    name: str, value: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None, empty_ok: bool = False
) -> TokenScores:
    """The scores `value` [T], rounded to float32. Arguments, collectives and errors as `token_means`."""
    sums, refused = _sums_of_group({name: value}, mask, group, empty_ok)
    score, _ = scores_op.token_scores(mask.contiguous(), [value.contiguous()], sums, refused=refused)
    return TokenScores(score, mask, sums[-2])


def _sums_of_group(
    values: dict[str, Tensor], mask: Tensor, group: dist.ProcessGroup | None, empty_ok: bool
) -> tuple[Tensor, Tensor | None]:
    """`sums_over` of unchecked arguments, and whether the ranks do not agree (None: they do)."""

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
    sums = sums_over(ranks, values, mask, empty_ok)
    ranks.finish()
    return sums, ranks.refused


def sums_over(ranks: AllReduces, values: dict[str, Tensor], mask: Tensor, empty_ok: bool) -> Tensor:
    """[2 k + 2] int64, the sums of entcov/ops/token_sums.py over all ranks, the number of tokens the last but one; of
    checked arguments, by the all-reduce of a call that `ranks` has opened."""
    own = sums_op.token_sums(mask.contiguous(), [value.contiguous() for value in values.values()])
    at = 2 * len(values) + 2  # behind it: how many of each value are bad on this rank
    sums = ranks.sum(own[:at])
    if check.readable(sums):
        num_tokens, num_bad = sums[-2:].tolist()
        if num_bad > 0:
            here = [f"{bad} in {name}" for name, bad in zip(values, own[at:].tolist(), strict=True)]
            raise ValueError(
                f"{' and '.join(values)} must be finite and at most 2^20 in size under the mask: {num_bad} of "
                f"{len(values) * num_tokens} values over all ranks are not, {' and '.join(here)} on this rank"
            )
        if num_tokens == 0 and not empty_ok:
            raise ValueError("mask must have a True token on at least one rank, got none in the whole mini-batch")
    return sums


# Sums over parts of the tokens, as responses, have no kernel: the same fixed point in torch operations.


def fixed_point(x: Tensor) -> Tensor:
    """float64 [..., T], at most 2^20 in size -> int64 [..., 2, T]: coarse and fine part."""
    coarse = (x * COARSE).round()
    fine = ((x * COARSE - coarse) * FINE).round()
    return torch.stack([coarse, fine], dim=-2).long()


def from_fixed_point(sums: Tensor) -> Tensor:
    """int64 [..., 2], sums of coarse and fine parts -> float64 [...]."""
    return sums[..., 0].double() / COARSE + sums[..., 1].double() / (COARSE * FINE)
