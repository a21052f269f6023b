"""The local ops: one vocabulary shard, no process group, no autograd. `entcov.token_stats` is built from them.

Shapes: T rows (tokens) and V_local columns (the shard). `logits` are [T, V_local] float32 | bfloat16 | float16 with
stride 1 along the vocabulary and any row stride; everything else is contiguous. Column j is token `vocab_start + j`;
columns whose token is >= `vocab_size` are padding and do not exist. Rows whose target is `ignore_index` are not read:
zeros in the statistics, no gradient. All values are fp32, in nats, of softmax(logits / temperature).

row_stats(logits, target, vocab_start, vocab_size, temperature, moments, ignore_index) -> [T, 4 | 7]
    columns max, rest, sum_xexp, target (and rest2, sum_xexp2, sum_x2exp with moments), defined in csrc/row_stats.h:
    L = log1p(rest), logprob = (target - max) / temperature - L, entropy = L - sum_xexp / (1 + rest)
merge_row_stats(shards [R, T, 4 | 7], target, temperature, ignore_index) -> [T, 4 | 7]
    the statistics of the whole row; ValueError where a row has no finite logit. Call it with R = 1 too.
logits_grad(logits, target, stats, grad_logprob, grad_entropy, grad_clamped, clamp, vocab_start, vocab_size,
            temperature, ignore_index) -> like logits
    d sum(grad_logprob * logprob + grad_entropy * entropy + grad_clamped * clamped_entropy) / d logits. `stats` are the
    merged ones; the three gradients are [T] or None; `clamp` [T, 4] is (threshold as a raw logit, weight of its ties,
    L_k, H_k). Zeros in padding columns, ignored rows and rows whose gradients are all zero.
logits_grad_(logits, ...) -> logits
    the same, written over the logits.

None of them mutates an argument except logits_grad_. Their results depend on the row alone: not on T, the other rows,
the number of threads, strides or alignment. Errors: ValueError for shapes and values, TypeError for dtypes.
"""

import torch
from torch import Tensor

from entcov import _cpu
from entcov.op_registry import (
    DTYPES,
    check_logits,
    check_rows,
    check_shard,
    check_temperature,
    num_columns,
    pointer,
    register,
)

ROW_FIELDS = ("max", "rest", "sum_xexp", "target", "rest2", "sum_xexp2", "sum_x2exp")


def isa() -> str:
    """The instruction set of the CPU kernels: "avx512", "avx2" or "baseline". ENTCOV_ISA forces a lesser one."""
    return _cpu.isa()


# ---- row_stats ------------------------------------------------------------------------------------------------------


def _row_stats_fake(logits, target, vocab_start, vocab_size, temperature, moments, ignore_index):
    check_logits(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    check_temperature(temperature)
    check_shard(vocab_start, vocab_size)
    return logits.new_empty((logits.shape[0], 7 if moments else 4), dtype=torch.float32)


def _row_stats_cpu(logits, target, vocab_start, vocab_size, temperature, moments, ignore_index):
    stats = _row_stats_fake(logits, target, vocab_start, vocab_size, temperature, moments, ignore_index)
    T = logits.shape[0]
    if _cpu.first_bad_target(target.data_ptr(), T, vocab_size, ignore_index) >= 0:
        _raise_bad_target(target, vocab_size, ignore_index)
    _cpu.row_stats(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), T, num_columns(logits, vocab_start, vocab_size),
        target.data_ptr(), vocab_start, ignore_index, 1.0 / temperature,
        stats.data_ptr(), stats.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return stats


def _raise_bad_target(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    bad = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    row = int(bad.nonzero()[0])
    raise ValueError(
        f"target must be ignore_index ({ignore_index}) or in [0, vocab_size = {vocab_size}): "
        f"{int(bad.sum())} of {target.numel()} are not, first {int(target[row])} at row {row}"
    )


row_stats = register(
    "row_stats",
    "(Tensor logits, Tensor target, SymInt vocab_start, SymInt vocab_size, float temperature, bool moments, "
    "int ignore_index) -> Tensor",
    _row_stats_cpu,
    _row_stats_fake,
    derivative_error="row_stats is a building block without a derivative; entcov.token_stats has one",
)


# ---- merge_row_stats ------------------------------------------------------------------------------------------------


def _merge_row_stats_fake(shards, target, temperature, ignore_index):
    check_shards(shards, (4, 7))
    check_rows(target, "target", torch.int64, shards.shape[1:2], shards)
    check_temperature(temperature)
    return shards.new_empty(shards.shape[1:])


def check_shards(shards: Tensor, fields: tuple[int, ...]) -> None:
    if shards.dtype != torch.float32:
        raise TypeError(f"shards must be float32, got {shards.dtype}")
    if shards.dim() != 3 or shards.shape[2] not in fields or shards.shape[0] < 1:
        raise ValueError(f"shards must be [R >= 1, T, {' or '.join(map(str, fields))}], got {tuple(shards.shape)}")
    if not shards[0].is_contiguous():
        raise ValueError(f"shards must be contiguous within a shard, got strides {tuple(shards.stride())}")


def _merge_row_stats_cpu(shards, target, temperature, ignore_index):
    out = _merge_row_stats_fake(shards, target, temperature, ignore_index)
    R, T, fields = shards.shape
    first_empty = _cpu.merge_row_stats(
        shards.data_ptr(), shards.stride(0), R, T, fields, target.data_ptr(), ignore_index, 1.0 / temperature,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if first_empty >= 0:
        empty = (out[:, 0] == -torch.inf) & (out[:, 1] == 0)
        raise ValueError(f"logits: {int(empty.sum())} rows have no finite logit (first: row {first_empty})")
    return out


merge_row_stats = register(
    "merge_row_stats",
    "(Tensor shards, Tensor target, float temperature, int ignore_index) -> Tensor",
    _merge_row_stats_cpu,
    _merge_row_stats_fake,
    derivative_error="merge_row_stats is a building block without a derivative; entcov.token_stats has one",
)


# ---- logits_grad ----------------------------------------------------------------------------------------------------


def _check_logits_grad(
    logits, target, stats, grad_logprob, grad_entropy, grad_clamped, clamp, vocab_start, vocab_size, temperature
):
    check_logits(logits)
    T = logits.shape[0]
    check_rows(target, "target", torch.int64, (T,), logits)
    if stats.dim() != 2 or stats.shape[1] not in (4, 7):
        raise ValueError(f"stats must be [T, 4 or 7] as row_stats returns them, got {tuple(stats.shape)}")
    check_rows(stats, "stats", torch.float32, (T, stats.shape[1]), logits)
    check_rows(grad_logprob, "grad_logprob", torch.float32, (T,), logits)
    check_rows(grad_entropy, "grad_entropy", torch.float32, (T,), logits)
    check_rows(grad_clamped, "grad_clamped", torch.float32, (T,), logits)
    check_rows(clamp, "clamp", torch.float32, (T, 4), logits)
    if grad_clamped is not None and clamp is None:
        raise ValueError("clamp must be given with grad_clamped, got None")
    check_temperature(temperature)
    check_shard(vocab_start, vocab_size)


def _logits_grad_fake(logits, *args):
    _check_logits_grad(logits, *args[:-1])
    return logits.new_empty(logits.shape)


def _write_logits_grad(
    out, logits, target, stats, grad_logprob, grad_entropy, grad_clamped, clamp, vocab_start, vocab_size, temperature,
    ignore_index,
):  # fmt: skip
    _cpu.logits_grad(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        num_columns(logits, vocab_start, vocab_size), logits.shape[1], target.data_ptr(), vocab_start, ignore_index,
        stats.data_ptr(), stats.shape[1], pointer(grad_logprob), pointer(grad_entropy), pointer(grad_clamped),
        pointer(clamp), 1.0 / temperature, out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _logits_grad_cpu(logits, *args):
    return _write_logits_grad(_logits_grad_fake(logits, *args), logits, *args)


def _logits_grad_inplace_fake(logits, *args):
    _check_logits_grad(logits, *args[:-1])
    if logits.shape[0] > 1 and abs(logits.stride(0)) < logits.shape[1]:
        raise ValueError(f"logits must not overlap themselves to be written, got strides {tuple(logits.stride())}")
    return logits


def _logits_grad_inplace_cpu(logits, *args):
    return _write_logits_grad(_logits_grad_inplace_fake(logits, *args), logits, *args)


_LOGITS_GRAD_ARGUMENTS = (
    "Tensor target, Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_clamped, Tensor? clamp, "
    "SymInt vocab_start, SymInt vocab_size, float temperature, int ignore_index"
)
logits_grad = register(
    "logits_grad",
    f"(Tensor logits, {_LOGITS_GRAD_ARGUMENTS}) -> Tensor",
    _logits_grad_cpu,
    _logits_grad_fake,
    derivative_error="token_stats has no second derivative; call backward without create_graph=True",
)
logits_grad_ = register(
    "logits_grad_",
    f"(Tensor(a!) logits, {_LOGITS_GRAD_ARGUMENTS}) -> Tensor(a!)",
    _logits_grad_inplace_cpu,
    _logits_grad_inplace_fake,
)
