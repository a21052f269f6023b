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
    RuntimeError where the target's logit in this shard is not the one in `stats`: the logits were written since.
logits_grad_(logits, ...)
    the same, written over the logits, which are not compared; returns nothing (PyTorch cannot functionalise an op that
    returns its argument).

covariance_stats(logits_old, logits_new, vocab_start, vocab_size, temperature, row_mask) -> [T, 8]
    columns max_old, rest_old, sum_xexp_old, max_new, rest_new, sum_xexp_new, sum_d, sum_xd, defined in
    csrc/covariance_stats.h with the formulas of covariance, KL and entropy change. row_mask [T] bool or None: rows
    that are False are not read and get zeros.
merge_covariance_stats(shards [R, T, 8], row_mask, temperature) -> [T, 8]
    the statistics of the whole row; ValueError where a row has no finite logit on one of the two sides.
logit_covariance_grad(logits_old, logits_new, stats, grad_covariance, grad_entropy_change, grad_kl, row_mask,
                      vocab_start, vocab_size, temperature) -> like logits_new
    d sum(grad_covariance * Cov + grad_entropy_change * (H_new - H_old) + grad_kl * KL(old || new)) / d logits_new.

None of them mutates an argument except logits_grad_. Their results depend on the row alone: not on T, the other rows,
the number of threads, strides or alignment. Errors: ValueError for shapes and values, TypeError for dtypes.

On CUDA they run on the current stream of the tensors' device and never wait for it, so they can be captured in a
graph. Values are not looked at from the host there. What the CPU raises for becomes NaN in every output of its row
instead, and in its gradient: a target outside [0, vocab_size), and a row without a finite logit. For logits that were
written since the forward pass it is the target's gradient that becomes NaN.
"""

from functools import partial

import torch
from torch import Tensor

from entcov import _cpu, cuda_ops
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


def _on_cuda(check, launch):
    """The CUDA side of an op: check the arguments, make the result, have it filled."""

    def run(*args):
        out = check(*args)
        launch(out, *args)
        return out

    return run


def with_huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, memory on the CPU that nobody has written yet, where the system may hand out large pages at once."""
    _cpu.advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


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
    check_target(target, vocab_size, ignore_index)
    _cpu.row_stats(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), T, num_columns(logits, vocab_start, vocab_size),
        target.data_ptr(), vocab_start, ignore_index, 1.0 / temperature,
        stats.data_ptr(), stats.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return stats


def check_target(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """ValueError unless each of these [T] int64 on the CPU is `ignore_index` or a token."""
    if _cpu.first_bad_target(target.data_ptr(), target.shape[0], vocab_size, ignore_index) < 0:
        return
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
    cuda=_on_cuda(_row_stats_fake, cuda_ops.row_stats),
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
    cuda=_on_cuda(_merge_row_stats_fake, cuda_ops.merge_row_stats),
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
    changed = _cpu.logits_grad(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        num_columns(logits, vocab_start, vocab_size), logits.shape[1], target.data_ptr(), vocab_start, ignore_index,
        stats.data_ptr(), stats.shape[1], pointer(grad_logprob), pointer(grad_entropy), pointer(grad_clamped),
        pointer(clamp), 1.0 / temperature, out.data_ptr(), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    if changed >= 0:
        raise RuntimeError(
            "logits must not be changed between forward and backward, which reads them again: in row "
            f"{changed} the target's logit was {float(stats[changed, 3])} and is "
            f"{float(logits[changed, target[changed] - vocab_start])}"
        )
    return out


def _logits_grad_cpu(logits, *args):
    return _write_logits_grad(with_huge_pages(_logits_grad_fake(logits, *args)), logits, *args)


def _logits_grad_inplace_fake(logits, *args):
    _check_logits_grad(logits, *args[:-1])
    if logits.shape[0] > 1 and abs(logits.stride(0)) < logits.shape[1]:
        raise ValueError(f"logits must not overlap themselves to be written, got strides {tuple(logits.stride())}")


def _logits_grad_inplace(write, logits, *args):
    _logits_grad_inplace_fake(logits, *args)
    if torch.is_grad_enabled() and logits.requires_grad:
        raise RuntimeError(
            "logits_grad_ writes over its logits, and these require grad; call it under torch.no_grad() or on "
            "logits.detach()"
        )
    write(logits, logits, *args)
    if not logits.is_inference():  # so that autograd notices if it had saved these logits
        torch.autograd.graph.increment_version(logits)


_logits_grad_inplace_cpu = partial(_logits_grad_inplace, _write_logits_grad)
_logits_grad_inplace_cuda = partial(_logits_grad_inplace, cuda_ops.logits_grad)


_LOGITS_GRAD_ARGUMENTS = (
    "Tensor target, Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_clamped, Tensor? clamp, "
    "SymInt vocab_start, SymInt vocab_size, float temperature, int ignore_index"
)
logits_grad = register(
    "logits_grad",
    f"(Tensor logits, {_LOGITS_GRAD_ARGUMENTS}) -> Tensor",
    _logits_grad_cpu,
    _logits_grad_fake,
    cuda=_on_cuda(_logits_grad_fake, cuda_ops.logits_grad),
    derivative_error="token_stats has no second derivative; call backward without create_graph=True",
)
logits_grad_ = register(
    "logits_grad_",
    f"(Tensor(a!) logits, {_LOGITS_GRAD_ARGUMENTS}) -> ()",
    _logits_grad_inplace_cpu,
    _logits_grad_inplace_fake,
    cuda=_logits_grad_inplace_cuda,
)


# ---- covariance -----------------------------------------------------------------------------------------------------


def _check_logit_pair(logits_old, logits_new, row_mask, vocab_start, vocab_size, temperature):
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
    check_rows(row_mask, "row_mask", torch.bool, logits_new.shape[:1], logits_new)
    check_temperature(temperature)
    check_shard(vocab_start, vocab_size)


def _covariance_stats_fake(logits_old, logits_new, vocab_start, vocab_size, temperature, row_mask):
    _check_logit_pair(logits_old, logits_new, row_mask, vocab_start, vocab_size, temperature)
    return logits_new.new_empty((logits_new.shape[0], 8), dtype=torch.float32)


def _covariance_stats_cpu(logits_old, logits_new, vocab_start, vocab_size, temperature, row_mask):
    stats = _covariance_stats_fake(logits_old, logits_new, vocab_start, vocab_size, temperature, row_mask)
    _cpu.covariance_stats(
        DTYPES[logits_new.dtype], logits_old.data_ptr(), logits_old.stride(0), logits_new.data_ptr(),
        logits_new.stride(0), logits_new.shape[0], num_columns(logits_new, vocab_start, vocab_size),
        pointer(row_mask), 1.0 / temperature, stats.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return stats


covariance_stats = register(
    "covariance_stats",
    "(Tensor logits_old, Tensor logits_new, SymInt vocab_start, SymInt vocab_size, float temperature, "
    "Tensor? row_mask) -> Tensor",
    _covariance_stats_cpu,
    _covariance_stats_fake,
    cuda=_on_cuda(_covariance_stats_fake, cuda_ops.covariance_stats),
    derivative_error="covariance_stats is a building block without a derivative; entcov.logit_covariance has one",
)


def _merge_covariance_stats_fake(shards, row_mask, temperature):
    check_shards(shards, (8,))
    check_rows(row_mask, "row_mask", torch.bool, shards.shape[1:2], shards)
    check_temperature(temperature)
    return shards.new_empty(shards.shape[1:])


def _merge_covariance_stats_cpu(shards, row_mask, temperature):
    out = _merge_covariance_stats_fake(shards, row_mask, temperature)
    R, T, _ = shards.shape
    first_empty = _cpu.merge_covariance_stats(
        shards.data_ptr(), shards.stride(0), R, T, pointer(row_mask), 1.0 / temperature, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if first_empty >= 0:
        empty = ((out[:, [0, 3]] == -torch.inf) & (out[:, [1, 4]] == 0)).any(0).tolist()
        sides = " and ".join(name for name, one in zip(("logits_old", "logits_new"), empty, strict=True) if one)
        rows = int(((out[:, [0, 3]] == -torch.inf) & (out[:, [1, 4]] == 0)).any(1).sum())
        raise ValueError(f"{sides}: {rows} rows have no finite logit (first: row {first_empty})")
    return out


merge_covariance_stats = register(
    "merge_covariance_stats",
    "(Tensor shards, Tensor? row_mask, float temperature) -> Tensor",
    _merge_covariance_stats_cpu,
    _merge_covariance_stats_fake,
    cuda=_on_cuda(_merge_covariance_stats_fake, cuda_ops.merge_covariance_stats),
    derivative_error="merge_covariance_stats is a building block without a derivative; entcov.logit_covariance has one",
)


def _logit_covariance_grad_fake(
    logits_old, logits_new, stats, grad_covariance, grad_entropy_change, grad_kl, row_mask, vocab_start, vocab_size,
    temperature,
):  # fmt: skip
    _check_logit_pair(logits_old, logits_new, row_mask, vocab_start, vocab_size, temperature)
    T = logits_new.shape[0]
    check_rows(stats, "stats", torch.float32, (T, 8), logits_new)
    check_rows(grad_covariance, "grad_covariance", torch.float32, (T,), logits_new)
    check_rows(grad_entropy_change, "grad_entropy_change", torch.float32, (T,), logits_new)
    check_rows(grad_kl, "grad_kl", torch.float32, (T,), logits_new)
    return logits_new.new_empty(logits_new.shape)


def _logit_covariance_grad_cpu(
    logits_old, logits_new, stats, grad_covariance, grad_entropy_change, grad_kl, row_mask, vocab_start, vocab_size,
    temperature,
):  # fmt: skip
    out = with_huge_pages(_logit_covariance_grad_fake(
        logits_old, logits_new, stats, grad_covariance, grad_entropy_change, grad_kl, row_mask, vocab_start,
        vocab_size, temperature,
    ))  # fmt: skip
    _cpu.logit_covariance_grad(
        DTYPES[logits_new.dtype], logits_old.data_ptr(), logits_old.stride(0), logits_new.data_ptr(),
        logits_new.stride(0), logits_new.shape[0], num_columns(logits_new, vocab_start, vocab_size),
        logits_new.shape[1], pointer(row_mask), stats.data_ptr(), pointer(grad_covariance),
        pointer(grad_entropy_change), pointer(grad_kl), 1.0 / temperature, out.data_ptr(), out.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


logit_covariance_grad = register(
    "logit_covariance_grad",
    "(Tensor logits_old, Tensor logits_new, Tensor stats, Tensor? grad_covariance, Tensor? grad_entropy_change, "
    "Tensor? grad_kl, Tensor? row_mask, SymInt vocab_start, SymInt vocab_size, float temperature) -> Tensor",
    _logit_covariance_grad_cpu,
    _logit_covariance_grad_fake,
    cuda=_on_cuda(_logit_covariance_grad_fake, cuda_ops.logit_covariance_grad),
    derivative_error="logit_covariance has no second derivative; call backward without create_graph=True",
)
