"""clamped_stats: the clamped entropy of rows whose columns are all here. Rows that are split over ranks take rounds
(entcov/clamp_rounds.py). The algorithm of both is told in csrc/clamp.h, the formulas are docs/math.md (10) to (12).

clamped_stats(logits, target, kept, vocab_size, temperature, moments, ignore_index) -> ([T, 4 | 7], [T, 4])
    merged row statistics, and what logits_grad calls `clamp`: threshold (raw), weight of the logits equal to it,
    L_k = log(sum of kept e^y), H_k. One kernel that reads the row about once; twice with moments

Rows to ignore give zeros, rows with a NaN a clamp of NaN. Shapes and errors are those of entcov/ops.py. It mutates no
argument and has no derivative: the gradient of the clamped entropy is in logits_grad.
"""

import torch

from entcov import _cpu, cuda_ops, ops
from entcov.op_registry import DTYPES, check_columns, check_logits, check_rows, check_temperature, register

DERIVATIVE_ERROR = "{} is a building block without a derivative; entcov.token_stats has one"


def launch(name: str, device: torch.device, *args) -> None:
    """The kernel of this name on either device."""
    if device.type == "cuda":
        cuda_ops._launch(name, device, *args)
    else:
        getattr(_cpu, name)(*args, torch.get_num_threads())


def _clamped_stats_fake(logits, target, kept, vocab_size, temperature, moments, ignore_index):
    check_logits(logits)
    check_columns(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    check_temperature(temperature)
    if not 1 <= vocab_size <= logits.shape[1]:
        raise ValueError(f"vocab_size must be in [1, {logits.shape[1]}] (the columns of logits), got {vocab_size}")
    if not 1 <= kept <= vocab_size:
        raise ValueError(f"kept must be in [1, vocab_size = {vocab_size}], got {kept}")
    T = logits.shape[0]
    return tuple(logits.new_empty((T, fields), dtype=torch.float32) for fields in (7 if moments else 4, 4))


def _clamped_stats(logits, target, kept, vocab_size, temperature, moments, ignore_index):
    stats, clamp = _clamped_stats_fake(logits, target, kept, vocab_size, temperature, False, ignore_index)
    launch(
        "clamped_stats", logits.device, DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        vocab_size, target.data_ptr(), kept, ignore_index, 1.0 / temperature, stats.data_ptr(), clamp.data_ptr(),
    )  # fmt: skip
    if moments:
        stats = ops.row_stats(logits, target, 0, vocab_size, temperature, True, ignore_index)
        stats = ops.merge_row_stats(stats[None], target, temperature, ignore_index)
    return stats, clamp


def _clamped_stats_cpu(logits, target, kept, vocab_size, temperature, moments, ignore_index):
    _clamped_stats_fake(logits, target, kept, vocab_size, temperature, moments, ignore_index)
    ops.check_target(target, vocab_size, ignore_index)
    stats, clamp = _clamped_stats(logits, target, kept, vocab_size, temperature, moments, ignore_index)
    # Of one shard the merge changes nothing; it raises where a row has no finite logit.
    return ops.merge_row_stats(stats[None], target, temperature, ignore_index), clamp


clamped_stats = register(
    "clamped_stats",
    "(Tensor logits, Tensor target, SymInt kept, SymInt vocab_size, float temperature, bool moments, int ignore_index) "
    "-> (Tensor, Tensor)",
    _clamped_stats_cpu,
    _clamped_stats_fake,
    cuda=_clamped_stats,
    derivative_error=DERIVATIVE_ERROR.format("clamped_stats"),
)
