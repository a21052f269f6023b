"""token_sums: sums of values over tokens in fixed point (csrc/token_select.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from entcov.ops.core import check_rows, define, launch

MOST = 8  # values a call: kMostTokenValues of csrc/token_select.h


def check_values(values: Sequence[Tensor], mask: Tensor, most: int = MOST) -> None:
    """Requires mask [T] bool and 1 to `most` values [T], float32 or float64."""
    check_rows(mask, "mask", torch.bool, mask.shape[:1], mask)
    if not 1 <= len(values) <= most:
        raise ValueError(f"values must be 1 to {most} tensors, got {len(values)}")
    for k, value in enumerate(values):
        dtype = torch.float64 if value is not None and value.dtype == torch.float64 else torch.float32
        check_rows(value, f"values[{k}]", dtype, mask.shape, mask)


def values_view(values: Sequence[Tensor]) -> tuple[int, list[int]]:
    """The struct TokenValues of csrc/token_select.h: which are float64, addresses."""
    is_double = sum((value.dtype == torch.float64) << k for k, value in enumerate(values))
    return is_double, [value.data_ptr() for value in values]


def _prepare(mask, values):
    check_values(values, mask)
    return mask.new_zeros(3 * len(values) + 2, dtype=torch.int64)  # the kernel adds to it


def _fill(out, mask, values):
    launch("token_sums", mask.device, values_view(values), mask, len(mask), out)


_token_sums = define("token_sums", "(Tensor mask, Tensor[] values) -> Tensor", _prepare, _fill)


def token_sums(mask: Tensor, values: Sequence[Tensor]) -> Tensor:
    """[3 k + 2] int64: coarse and fine sum of each value, the number of tokens, the number of bad values, and how many
    of each value are bad: not finite or larger than 2^20. A bad value adds 0.

    mask: [T] bool. values: k of [T] float32 or float64, at most MOST; those outside the mask are not used.
    """
    return _token_sums(mask, values)
