"""logits_grad, logits_grad_: the gradient of logprob, entropy and clamped entropy with respect to the logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from entcov.ops.core import (
    RowSpec,
    addresses,
    check_logits,
    check_rows,
    check_spec,
    check_stats,
    define,
    launch,
    logits_view,
    with_huge_pages,
)

_NAMES = ("grad_logprob", "grad_entropy", "grad_clamped")


def _check(logits, target, stats, clamp, grads, spec):
    check_logits(logits)
    T = logits.shape[0]
    check_rows(target, "target", torch.int64, (T,), logits)
    check_stats(stats, T, logits)
    if len(grads) != len(_NAMES):
        raise ValueError(f"grads must be {len(_NAMES)} ({', '.join(_NAMES)}), got {len(grads)}")
    for name, grad in zip(_NAMES, grads, strict=True):
        check_rows(grad, name, torch.float32, (T,), logits, optional=True)
    check_rows(clamp, "clamp", torch.float32, (T, 4), logits, optional=grads[2] is None)
    check_spec(spec)


def _prepare(logits, target, stats, clamp, grads, spec):
    _check(logits, target, stats, clamp, grads, spec)
    return logits.new_empty(logits.shape)


def _fill(out, *args):
    _write(with_huge_pages(out), *args)


def _write(out, logits, target, stats, clamp, grads, spec):
    launch(
        "logits_grad", logits.device, logits_view(logits), target, spec, stats, stats.shape[1],
        addresses(grads, len(_NAMES)), clamp, out, out.stride(0),
    )  # fmt: skip


def _prepare_in_place(logits, target, stats, clamp, grads, spec):
    _check(logits, target, stats, clamp, grads, spec)
    if logits.shape[0] > 1 and abs(logits.stride(0)) < logits.shape[1]:
        raise ValueError(f"logits must not overlap themselves to be written, got strides {tuple(logits.stride())}")


def _fill_in_place(_, logits, *args):
    _write(logits, logits, *args)
    if not logits.is_inference():  # autograd then raises if it has saved these logits
        torch.autograd.graph.increment_version(logits)


_ARGUMENTS = "Tensor target, Tensor stats, Tensor? clamp, Tensor?[] grads, RowSpec spec"
_logits_grad = define("logits_grad", f"(Tensor logits, {_ARGUMENTS}) -> Tensor", _prepare, _fill)
_logits_grad_ = define("logits_grad_", f"(Tensor(a!) logits, {_ARGUMENTS}) -> ()", _prepare_in_place, _fill_in_place)


def logits_grad(
    logits: Tensor, target: Tensor, stats: Tensor, clamp: Tensor | None, grads: Sequence[Tensor | None], spec: RowSpec
) -> Tensor:
    """d sum(grads[0] * logprob + grads[1] * entropy + grads[2] * clamped_entropy) / d logits.

    Args:
        logits: [T, V_local] float32, bfloat16 or float16, as in the forward pass.
        target: [T] int64, global token ids.
        stats: [T, 4 | 7] fp32, RowStats of the whole rows.
        clamp: [T, 4] fp32: threshold as a raw logit, weight of its ties, L_K, H_K. Required with grads[2].
        grads: three of [T] fp32 or None (0).

    Returns:
        [T, V_local], contiguous, in the dtype of logits. Padding columns, ignored rows and rows whose gradients are all
        0 get zeros. Columns of NaN rows are NaN.

    Raises:
        RuntimeError: on the CPU, a target's logit differs from the one in stats: the logits were written after the
            forward pass. On CUDA the gradient of the target's column is NaN instead.
    """
    return _logits_grad(logits, target, stats, clamp, grads, spec)


def logits_grad_(logits, target, stats, clamp, grads, spec: RowSpec) -> None:
    """Overwrites logits with the result of `logits_grad`. The logits are not compared with stats. Returns None, because
    PyTorch cannot functionalise an op that returns its argument."""
    _logits_grad_(logits, target, stats, clamp, grads, spec)
