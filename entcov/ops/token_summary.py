"""token_summary: mean, largest value and quantile of scores, after the stages of a QUANTILE."""

import torch
from torch import Tensor

from entcov.ops.core import check_rows, define, launch
from entcov.ops.token_select import LAYOUT


def _prepare(workspace, num_tokens, own, mean_logprob, refused):
    check_rows(workspace, "workspace", torch.int64, workspace.shape[:1], workspace)
    check_rows(num_tokens, "num_tokens", torch.int64, (), workspace)
    check_rows(own, "own", torch.int64, (len(own), 2), workspace)
    check_rows(mean_logprob, "mean_logprob", torch.float64, (), workspace)
    check_rows(refused, "refused", torch.bool, (), workspace, optional=True)
    if len(workspace) < LAYOUT["words"]:
        raise ValueError(f"workspace must be what select_workspace returns, got {len(workspace)} words")
    return [workspace.new_empty(1, dtype=torch.float64), workspace.new_empty(2, dtype=torch.float32)]


def _fill(out, workspace, num_tokens, own, mean_logprob, refused):
    launch("token_summary", workspace.device, workspace, num_tokens, own, len(own), mean_logprob, refused, *out)


_token_summary = define(
    "token_summary",
    "(Tensor workspace, Tensor num_tokens, Tensor own, Tensor mean_logprob, Tensor? refused) -> Tensor[]",
    _prepare,
    _fill,
)


def token_summary(
    workspace: Tensor, num_tokens: Tensor, own: Tensor, mean_logprob: Tensor, refused: Tensor | None
) -> list[Tensor]:
    """[mean score [1] float64, (largest score, 99.9 percent quantile) [2] float32] after the stages of a QUANTILE.

    The quantile is the smallest score with at least 99.9 percent of the tokens at or below it. All are NaN if
    `refused`; the mean is too if `mean_logprob` (0-d float64) is.
    """
    return _token_summary(workspace, num_tokens, own, mean_logprob, refused)
