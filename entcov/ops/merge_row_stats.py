"""merge_row_stats: the messages of all ranks -> the statistics and outputs of whole rows."""

import torch
from torch import Tensor

from entcov.ops.core import RowSpec, addresses, check_messages, check_rows, check_spec, define, launch, messages_view
from entcov.ops.row_stats import OUTPUTS, allocate, check_values


def _prepare(messages, target, spec, moments):
    check_rows(target, "target", torch.int64, target.shape[:1], messages)
    check_messages(messages, len(target), 7 if moments else 4)
    check_spec(spec)
    return allocate(messages, len(target), moments, whole=True)


def _fill(out, messages, target, spec, moments):
    stats, *outputs = out
    nan = launch(
        "merge_row_stats", messages.device, messages_view(messages, len(target)), target, spec, stats.shape[1], stats,
        addresses(outputs, OUTPUTS),
    )  # fmt: skip
    if nan:
        check_values(stats, target, spec, whole=True)


_merge_row_stats = define(
    "merge_row_stats", "(Tensor messages, Tensor target, RowSpec spec, bool moments) -> Tensor[]", _prepare, _fill
)


def merge_row_stats(messages: Tensor, target: Tensor, spec: RowSpec, moments: bool = False) -> list[Tensor]:
    """Statistics and outputs of whole rows.

    Args:
        messages: [R, T * width + 4] fp32, the messages of all ranks: the first 4 (7 with moments) floats of every row
            are the RowStats of a shard.
        target: [T] int64. Rows with ignore_index get zeros.

    Returns:
        [stats [T, 4 | 7], logprob, entropy[, collision, varentropy, entropy_drift]], fp32, outputs [T] in nats. All
        rows that are not ignored are NaN if the ranks do not agree (csrc/signature.h).

    Raises:
        ValueError: on the CPU, a target is not a token or a row has no finite logit. On CUDA such a row is NaN.
    """
    return _merge_row_stats(messages, target, spec, moments)
