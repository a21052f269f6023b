"""token_scores: the numbers that tokens are chosen by: a value of each token, or the covariance of two."""

from collections.abc import Sequence

import torch
from torch import Tensor

from entcov.ops.core import check_rows, define, launch
from entcov.ops.token_sums import check_values, values_view


def _prepare(mask, values, sums, eps, refused):
    check_values(values, mask, most=2)
    check_rows(sums, "sums", torch.int64, (2 * len(values) + 2,), mask)
    check_rows(refused, "refused", torch.bool, (), mask, optional=True)
    return [mask.new_empty(mask.shape, dtype=torch.float32), mask.new_empty(len(values), dtype=torch.float64)]


def _fill(out, mask, values, sums, eps, refused):
    launch("token_scores", mask.device, values_view(values), mask, len(mask), sums, eps, refused, *out)


_token_scores = define(
    "token_scores",
    "(Tensor mask, Tensor[] values, Tensor sums, float eps, Tensor? refused) -> Tensor[]",
    _prepare,
    _fill,
)


def token_scores(
    mask: Tensor, values: Sequence[Tensor], sums: Tensor, eps: float = 0.0, refused: Tensor | None = None
) -> list[Tensor]:
    """[scores [T] float32, means [k] float64].

    Args:
        mask: [T] bool.
        values: one or two of [T] float32 or float64. The score is the one value, or (x - mean x) (y - mean y) of two,
            in float64 and rounded once; 0 outside the mask.
        sums, eps, refused: as in `token_means`. Where a mean is NaN the scores are.
    """
    return _token_scores(mask, values, sums, eps, refused)
