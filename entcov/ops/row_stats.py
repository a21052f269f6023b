"""row_stats: logits -> RowStats of every row (csrc/row_stats.h), and for whole rows logprob, entropy and moments."""

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

FIELDS = ("max", "sum_exp_m1", "sum_xexp", "target", "sum_exp2_m1", "sum_xexp2", "sum_x2exp")
OUTPUTS = 5  # RowOutputs of csrc/row_stats.h


def allocate(rows: Tensor, T: int, moments: bool, whole: bool) -> list[Tensor]:
    """Uninitialised fp32 tensors like `rows`: statistics [T, 4 | 7] and, if the rows are whole, the outputs [T]:
    logprob, entropy[, collision, varentropy, entropy_drift]."""
    outputs = (5 if moments else 2) if whole else 0
    return [
        rows.new_empty((T, 7 if moments else 4), dtype=torch.float32),
        *(rows.new_empty((T,), dtype=torch.float32) for _ in range(outputs)),
    ]


def _prepare(logits, target, spec, moments, whole):
    check_logits(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    check_spec(spec)
    return allocate(logits, logits.shape[0], moments, whole)


def _fill(out, logits, target, spec, moments, whole):
    stats, *outputs = out
    room = workspace(num_columns(logits.shape[1], spec), stats)  # a variable, so that it lives until the launch
    nan = launch(
        "row_stats", logits.device, logits_view(logits), target, spec, stats.shape[1], stats,
        addresses(outputs, OUTPUTS), room,
    )  # fmt: skip
    if nan:
        check_values(stats, target, spec, whole)


_row_stats = define(
    "row_stats", "(Tensor logits, Tensor target, RowSpec spec, bool moments, bool whole) -> Tensor[]", _prepare, _fill
)


def row_stats(logits: Tensor, target: Tensor, spec: RowSpec, moments: bool = False, whole: bool = False):
    """RowStats of the rows of a shard.

    Args:
        logits: [T, V_local] float32, bfloat16 or float16.
        target: [T] int64, global token ids. Rows with ignore_index are not read and get zeros.
        whole: the rows are not sharded: compute the outputs too.

    Returns:
        [T, 4 | 7] fp32, the members of RowStats in the order of FIELDS; with `whole` the list [stats, logprob,
        entropy[, collision, varentropy, entropy_drift]], outputs [T] fp32 in nats.

    Raises:
        ValueError: on the CPU, a target is not a token, or a whole row has no finite logit. On CUDA such a row is NaN.
    """
    out = _row_stats(logits, target, spec, moments, whole)
    return out if whole else out[0]


def check_values(stats: Tensor, target: Tensor, spec: RowSpec, whole: bool) -> None:
    """ValueError if a target is not a token, or a whole row has no finite logit. It is called on the CPU only; on CUDA
    such rows are NaN, and the check would make the host wait."""
    check_target(target, spec)
    empty = (stats[:, 0] == -torch.inf) & (stats[:, 2] == 0)  # with a NaN in the row, sum_xexp is NaN
    if whole and empty.any():
        raise ValueError(f"logits: {int(empty.sum())} rows have no finite logit (first: row {int(empty.nonzero()[0])})")


def check_target(target: Tensor, spec: RowSpec) -> None:
    """ValueError unless every element of target ([T] int64, on the CPU) is a token or ignore_index."""
    bad = ((target < 0) | (target >= spec.vocab_size)) & (target != spec.ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"target must be ignore_index ({spec.ignore_index}) or in [0, vocab_size = {spec.vocab_size}): "
            f"{int(bad.sum())} of {target.numel()} are not, first {int(target[row])} at row {row}"
        )
