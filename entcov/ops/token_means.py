"""token_means: means over the tokens of all ranks from their sums in fixed point (csrc/token_select.h)."""

import torch
from torch import Tensor

from entcov.ops.core import check_rows, define, launch


def _prepare(sums, count, eps, refused):
    check_rows(sums, "sums", torch.int64, (2 * count + 2,), sums)
    check_rows(refused, "refused", torch.bool, (), sums, optional=True)
    return sums.new_empty(count, dtype=torch.float64)


def _fill(out, sums, count, eps, refused):
    launch("token_means", sums.device, sums, count, eps, refused, out)


_token_means = define("token_means", "(Tensor sums, int count, float eps, Tensor? refused) -> Tensor", _prepare, _fill)


def token_means(sums: Tensor, eps: float = 0.0, refused: Tensor | None = None) -> Tensor:
    """[k] float64: sum / (number of tokens + eps) of each value.

    sums: [2 k + 2] int64, the first of what `token_sums` returns, added up over all ranks. refused: 0-d bool or None.
    All means are NaN if a value is bad or `refused`.
    """
    return _token_means(sums, len(sums) // 2 - 1, eps, refused)
