"""covariance_stats: two logit tensors -> CovarianceStats of every row (csrc/logit_covariance.h), which are sums over
the vocabulary, for entcov.logit_covariance. The covariance over tokens is entcov.objective.token_covariance."""

import torch
from torch import Tensor

from entcov.ops.core import (
    RowSpec,
    addresses,
    check_logits,
    check_rows,
    check_spec,
    define,
    launch,
    logits_view,
    num_columns,
    workspace,
)

FIELDS = 8
OUTPUTS = 4  # covariance, predicted entropy change, entropy change, kl


def allocate(rows: Tensor, T: int, whole: bool) -> list[Tensor]:
    """Uninitialised fp32 tensors like `rows`: statistics [T, 8] and, if the rows are whole, the four outputs [T]."""
    return [
        rows.new_empty((T, FIELDS), dtype=torch.float32),
        *(rows.new_empty((T,), dtype=torch.float32) for _ in range(OUTPUTS if whole else 0)),
    ]


def check_pair(logits_old, logits_new, row_mask, spec: RowSpec) -> None:
    check_logits(logits_old, "logits_old")
    check_logits(logits_new, "logits_new")
    if logits_old.dtype != logits_new.dtype:
        raise TypeError(f"logits_old must have the dtype of logits_new, got {logits_old.dtype} and {logits_new.dtype}")
    if logits_old.shape != logits_new.shape:
        raise ValueError(
            f"logits_old must have the shape of logits_new, got {tuple(logits_old.shape)} and {tuple(logits_new.shape)}"
        )
    if logits_old.device != logits_new.device:
        raise ValueError(f"logits_old must be on {logits_new.device} like logits_new, got {logits_old.device}")
    check_rows(row_mask, "row_mask", torch.bool, logits_new.shape[:1], logits_new, optional=True)
    check_spec(spec)


def check_values(stats: Tensor) -> None:
    """ValueError if a whole row has no finite logit in one of the two tensors. It is called on the CPU only; on CUDA
    such rows are NaN, and the check would make the host wait."""
    # A row with only -inf and NaN is excluded: its sum_xexp is NaN.
    old, new = ((stats[:, column] == -torch.inf) & (stats[:, column + 2] == 0) for column in (0, 3))
    empty = old | new
    if empty.any():
        sides = " and ".join(name for name, rows in (("logits_old", old), ("logits_new", new)) if rows.any())
        raise ValueError(
            f"{sides}: {int(empty.sum())} rows have no finite logit (first: row {int(empty.nonzero()[0])})"
        )


def _prepare(logits_old, logits_new, row_mask, spec, whole):
    check_pair(logits_old, logits_new, row_mask, spec)
    return allocate(logits_new, logits_new.shape[0], whole)


def _fill(out, logits_old, logits_new, row_mask, spec, whole):
    stats, *outputs = out
    room = workspace(num_columns(logits_new.shape[1], spec), stats)  # a variable, so that it lives until the launch
    nan = launch(
        "covariance_stats", logits_new.device, logits_view(logits_old), logits_view(logits_new), row_mask, spec, stats,
        addresses(outputs, OUTPUTS), room,
    )  # fmt: skip
    if nan and whole:
        check_values(stats)


_covariance_stats = define(
    "covariance_stats",
    "(Tensor logits_old, Tensor logits_new, Tensor? row_mask, RowSpec[:3] spec, bool whole) -> Tensor[]",
    _prepare,
    _fill,
)


def covariance_stats(logits_old: Tensor, logits_new: Tensor, row_mask: Tensor | None, spec: RowSpec, whole=False):
    """CovarianceStats of the rows of a shard.

    Args:
        logits_old, logits_new: [T, V_local] of one dtype: float32, bfloat16 or float16.
        row_mask: [T] bool or None. Rows that are False are not read and get zeros.
        whole: the rows are not sharded: compute the outputs too.

    Returns:
        [T, 8] fp32; with `whole` the list [stats, covariance, predicted entropy change, entropy change, kl], outputs
        [T] fp32 in nats.

    Raises:
        ValueError: on the CPU and with `whole`, a row has no finite logit in one of the tensors. On CUDA it is NaN.
    """
    out = _covariance_stats(logits_old, logits_new, row_mask, spec, whole)
    return out if whole else out[0]
