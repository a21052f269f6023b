"""The local ops of the clamped entropy: exact selection by value, in four steps that shards can take together on the
CPU. What shards do on CUDA is in entcov/clamp_rounds.py.

Conventions, shapes and errors are those of entcov/ops.py; the algorithm is told in csrc/clamp.h, the formulas are
docs/math.md (10) to (12). `stats` are merged row statistics; rows to ignore give zeros, rows with a NaN give NaN.

clamped_stats(logits, target, kept, vocab_size, temperature, moments, ignore_index) -> ([T, 4 | 7], [T, 4])
    for rows that are whole: merged row statistics, and clamp_finish's result. On the CPU it is the four steps below in
    turn; on CUDA one kernel that reads the row about once (twice with moments)

order_statistics(logits, target, ranks, vocab_start, vocab_size, ignore_index) -> [T, m]
    the ranks[i]-th largest logit of each row, raw; ranks [m] int64 ascending, 1-based, within the shard's columns
    (all 0 for a shard without columns, whose statistics are -inf)
clamp_bracket(sketches [R, T, m], ranks [R, m], target, stats, kept, ignore_index) -> [T, 3]
    lo, hi with lo <= threshold <= hi, and how many values can lie strictly between them on one shard
clamp_collect(logits, target, stats, bracket, capacity, vocab_start, vocab_size, temperature, ignore_index)
    -> [T, PART_FIELDS + capacity]: the shard's sums above hi, its counts, and its values between lo and hi
clamp_finish(parts [R, T, ...], target, stats, bracket, kept, temperature, ignore_index) -> [T, 4]
    threshold (raw), weight of the logits equal to it, L_k = log(sum of kept e^y), H_k: what logits_grad calls `clamp`

Sketches with a NaN give a bracket of NaN, and parts that contradict themselves a clamp of NaN, for their row alone.
`bracket` is [T, 2 or 3], lo and hi first; on an unsharded row both are the order statistic of rank `kept`.
None of them mutates an argument or has a derivative: the gradient of the clamped entropy is in logits_grad.
"""

import torch

from entcov import _cpu, cuda_ops, ops
from entcov.op_registry import (
    DTYPES,
    MAX_COLUMNS,
    check_columns,
    check_logits,
    check_rows,
    check_shard,
    check_temperature,
    num_columns,
    register,
)

PART_FIELDS = 7
_DERIVATIVE_ERROR = "{} is a building block without a derivative; entcov.token_stats has one"


def _check_stats(stats, target, like) -> None:
    if stats.dim() != 2 or stats.shape[1] not in (4, 7):
        raise ValueError(f"stats must be [T, 4 or 7] as merge_row_stats returns them, got {tuple(stats.shape)}")
    check_rows(stats, "stats", torch.float32, (target.shape[0], stats.shape[1]), like)


def _check_bracket(bracket, target, like) -> None:
    if bracket.dim() != 2 or bracket.shape[1] not in (2, 3):
        raise ValueError(f"bracket must be [T, 2 or 3], got {tuple(bracket.shape)}")
    check_rows(bracket, "bracket", torch.float32, (target.shape[0], bracket.shape[1]), like)


# ---- clamped_stats --------------------------------------------------------------------------------------------------


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


def _merged_stats(logits, target, vocab_size, temperature, moments, ignore_index):
    stats = ops.row_stats(logits, target, 0, vocab_size, temperature, moments, ignore_index)
    return ops.merge_row_stats(stats[None], target, temperature, ignore_index)


def _clamped_stats_cpu(logits, target, kept, vocab_size, temperature, moments, ignore_index):
    _clamped_stats_fake(logits, target, kept, vocab_size, temperature, moments, ignore_index)
    stats = _merged_stats(logits, target, vocab_size, temperature, moments, ignore_index)
    ranks = torch.full((2,), kept, dtype=torch.int64)  # both ends of the bracket
    bracket = order_statistics(logits, target, ranks, 0, vocab_size, ignore_index)
    part = clamp_collect(logits, target, stats, bracket, 0, 0, vocab_size, temperature, ignore_index)
    return stats, clamp_finish(part[None], target, stats, bracket, kept, temperature, ignore_index)


def _clamped_stats_cuda(logits, target, kept, vocab_size, temperature, moments, ignore_index):
    stats, clamp = _clamped_stats_fake(logits, target, kept, vocab_size, temperature, False, ignore_index)
    cuda_ops.clamped_stats(stats, clamp, logits, target, kept, vocab_size, temperature, ignore_index)
    if moments:
        stats = _merged_stats(logits, target, vocab_size, temperature, moments, ignore_index)
    return stats, clamp


clamped_stats = register(
    "clamped_stats",
    "(Tensor logits, Tensor target, SymInt kept, SymInt vocab_size, float temperature, bool moments, int ignore_index) "
    "-> (Tensor, Tensor)",
    _clamped_stats_cpu,
    _clamped_stats_fake,
    cuda=_clamped_stats_cuda,
    derivative_error=_DERIVATIVE_ERROR.format("clamped_stats"),
)


# ---- order_statistics -----------------------------------------------------------------------------------------------


def _order_statistics_fake(logits, target, ranks, vocab_start, vocab_size, ignore_index):
    check_logits(logits)
    check_columns(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    if ranks.dim() != 1 or ranks.shape[0] < 1:
        raise ValueError(f"ranks must be [m >= 1], got {tuple(ranks.shape)}")
    check_rows(ranks, "ranks", torch.int64, ranks.shape, logits)
    check_shard(vocab_start, vocab_size)
    return logits.new_empty((logits.shape[0], ranks.shape[0]), dtype=torch.float32)


def _order_statistics_cpu(logits, target, ranks, vocab_start, vocab_size, ignore_index):
    out = _order_statistics_fake(logits, target, ranks, vocab_start, vocab_size, ignore_index)
    columns = num_columns(logits, vocab_start, vocab_size)
    if columns and not (1 <= ranks[0] and ranks[-1] <= columns and bool((ranks[1:] >= ranks[:-1]).all())):
        raise ValueError(f"ranks must ascend within [1, {columns}] (the columns of this shard), got {ranks.tolist()}")
    _cpu.order_statistics(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0], columns, target.data_ptr(),
        ignore_index, ranks.data_ptr(), ranks.shape[0], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


order_statistics = register(
    "order_statistics",
    "(Tensor logits, Tensor target, Tensor ranks, SymInt vocab_start, SymInt vocab_size, int ignore_index) -> Tensor",
    _order_statistics_cpu,
    _order_statistics_fake,
    derivative_error=_DERIVATIVE_ERROR.format("order_statistics"),
)


# ---- clamp_bracket --------------------------------------------------------------------------------------------------


def _clamp_bracket_fake(sketches, ranks, target, stats, kept, ignore_index):
    if sketches.dim() != 3 or sketches.shape[0] < 1 or sketches.shape[2] < 1 or sketches.stride(2) != 1:
        raise ValueError(
            f"sketches must be [R >= 1, T, m >= 1] with stride 1 along m, got {tuple(sketches.shape)} with strides "
            f"{tuple(sketches.stride())}"
        )
    if sketches.dtype != torch.float32:
        raise TypeError(f"sketches must be float32, got {sketches.dtype}")
    R, T, m = sketches.shape
    check_rows(ranks, "ranks", torch.int64, (R, m), sketches)
    check_rows(target, "target", torch.int64, (T,), sketches)
    _check_stats(stats, target, sketches)
    return sketches.new_empty((T, 3))


def _clamp_bracket_cpu(sketches, ranks, target, stats, kept, ignore_index):
    out = _clamp_bracket_fake(sketches, ranks, target, stats, kept, ignore_index)
    within = (ranks[:, 0] >= 1) & (ranks[:, -1] <= MAX_COLUMNS) & (ranks[:, 1:] >= ranks[:, :-1]).all(1)
    sound = within | (ranks == 0).all(1)
    if not bool(sound.all()):
        shard = int((~sound).nonzero()[0])
        raise ValueError(
            f"ranks must ascend within [1, {MAX_COLUMNS}], or be 0 for a shard without columns; shard {shard} has "
            f"{ranks[shard].tolist()}"
        )
    columns = int(ranks[:, -1].sum())
    if not 1 <= kept <= columns:
        raise ValueError(f"kept must be in [1, {columns}] (the columns of all shards), got {kept}")
    R, T, m = sketches.shape
    _cpu.clamp_bracket(
        sketches.data_ptr(), sketches.stride(0), sketches.stride(1), R, T, m, ranks.data_ptr(), stats.data_ptr(),
        stats.shape[1], target.data_ptr(), ignore_index, kept, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


clamp_bracket = register(
    "clamp_bracket",
    "(Tensor sketches, Tensor ranks, Tensor target, Tensor stats, SymInt kept, int ignore_index) -> Tensor",
    _clamp_bracket_cpu,
    _clamp_bracket_fake,
    derivative_error=_DERIVATIVE_ERROR.format("clamp_bracket"),
)


# ---- clamp_collect --------------------------------------------------------------------------------------------------


def _clamp_collect_fake(logits, target, stats, bracket, capacity, vocab_start, vocab_size, temperature, ignore_index):
    check_logits(logits)
    check_columns(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    _check_stats(stats, target, logits)
    _check_bracket(bracket, target, logits)
    if not 0 <= capacity <= MAX_COLUMNS:
        raise ValueError(f"capacity must be in [0, {MAX_COLUMNS}] (values that a shard may send), got {capacity}")
    check_temperature(temperature)
    check_shard(vocab_start, vocab_size)
    return logits.new_empty((logits.shape[0], PART_FIELDS + capacity), dtype=torch.float32)


def _clamp_collect_cpu(logits, target, stats, bracket, capacity, vocab_start, vocab_size, temperature, ignore_index):
    part = _clamp_collect_fake(
        logits, target, stats, bracket, capacity, vocab_start, vocab_size, temperature, ignore_index
    )
    _cpu.clamp_collect(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        num_columns(logits, vocab_start, vocab_size), target.data_ptr(), ignore_index, stats.data_ptr(),
        stats.shape[1], bracket.data_ptr(), bracket.shape[1], capacity, 1.0 / temperature, part.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return part


clamp_collect = register(
    "clamp_collect",
    "(Tensor logits, Tensor target, Tensor stats, Tensor bracket, SymInt capacity, SymInt vocab_start, "
    "SymInt vocab_size, float temperature, int ignore_index) -> Tensor",
    _clamp_collect_cpu,
    _clamp_collect_fake,
    derivative_error=_DERIVATIVE_ERROR.format("clamp_collect"),
)


# ---- clamp_finish ---------------------------------------------------------------------------------------------------


def _clamp_finish_fake(parts, target, stats, bracket, kept, temperature, ignore_index):
    if parts.dim() != 3 or parts.shape[0] < 1 or parts.shape[2] < PART_FIELDS:
        raise ValueError(f"parts must be [R >= 1, T, {PART_FIELDS} + capacity], got {tuple(parts.shape)}")
    check_rows(parts, "parts", torch.float32, parts.shape, parts)
    check_rows(target, "target", torch.int64, parts.shape[1:2], parts)
    _check_stats(stats, target, parts)
    _check_bracket(bracket, target, parts)
    if kept < 1:
        raise ValueError(f"kept must be at least 1, got {kept}")
    check_temperature(temperature)
    return parts.new_empty((parts.shape[1], 4))


def _clamp_finish_cpu(parts, target, stats, bracket, kept, temperature, ignore_index):
    clamp = _clamp_finish_fake(parts, target, stats, bracket, kept, temperature, ignore_index)
    R, T, width = parts.shape
    _cpu.clamp_finish(
        parts.data_ptr(), R, T, width - PART_FIELDS, bracket.data_ptr(), bracket.shape[1], stats.data_ptr(),
        stats.shape[1], target.data_ptr(), ignore_index, kept, 1.0 / temperature, clamp.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return clamp


clamp_finish = register(
    "clamp_finish",
    "(Tensor parts, Tensor target, Tensor stats, Tensor bracket, SymInt kept, float temperature, int ignore_index) "
    "-> Tensor",
    _clamp_finish_cpu,
    _clamp_finish_fake,
    derivative_error=_DERIVATIVE_ERROR.format("clamp_finish"),
)
