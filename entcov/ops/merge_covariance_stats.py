"""merge_covariance_stats: the messages of all ranks -> the covariance statistics and outputs of whole rows."""

import torch
from torch import Tensor

from entcov.ops.core import RowSpec, addresses, check_messages, check_rows, check_spec, define, launch, messages_view
from entcov.ops.covariance_stats import FIELDS, OUTPUTS, allocate, check_values


def _prepare(messages, row_mask, T, spec):
    check_rows(row_mask, "row_mask", torch.bool, (T,), messages, optional=True)
    check_messages(messages, T, FIELDS)
    check_spec(spec)
    return allocate(messages, T, whole=True)


def _fill(out, messages, row_mask, T, spec):
    stats, *outputs = out
    nan = launch(
        "merge_covariance_stats", messages.device, messages_view(messages, T), row_mask, spec, stats,
        addresses(outputs, OUTPUTS),
    )  # fmt: skip
    if nan:
        check_values(stats)


_merge_covariance_stats = define(
    "merge_covariance_stats",
    "(Tensor messages, Tensor? row_mask, SymInt T, RowSpec[:3] spec) -> Tensor[]",
    _prepare,
    _fill,
)


def merge_covariance_stats(messages: Tensor, row_mask: Tensor | None, T: int, spec: RowSpec) -> list[Tensor]:
    """Statistics and outputs of whole rows.

    Args:
        messages: [R, T * width + 4] fp32, width >= 8, the messages of all ranks: the first 8 floats of every row are
            the CovarianceStats of a shard.
        row_mask: [T] bool or None. Rows that are False get zeros.

    Returns:
        [stats [T, 8], covariance, predicted entropy change, entropy change, kl], fp32, outputs [T] in nats. All
        rows that are not masked are NaN if the ranks do not agree (csrc/signature.h).

    Raises:
        ValueError: on the CPU, a row has no finite logit in one of the tensors. On CUDA such a row is NaN.
    """
    return _merge_covariance_stats(messages, row_mask, T, spec)
