"""logits_grad, logits_grad_: the gradient of log-probability, entropy and clamped entropy with respect to the logits."""

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


def _prepare(logits, target, stats, clamp, grads, *spec):
    _check(logits, target, stats, clamp, grads, RowSpec(*spec))
    return logits.new_empty(logits.shape)


def _fill(out, *args):
    _write(with_huge_pages(out), *args)


def _write(out, logits, target, stats, clamp, grads, *spec):
    launch(
        "logits_grad", logits.device, logits_view(logits), target, RowSpec(*spec), stats, stats.shape[1],
        addresses(grads, len(_NAMES)), clamp, out, out.stride(0),
    )  # fmt: skip


def _prepare_in_place(logits, target, stats, clamp, grads, *spec):
    _check(logits, target, stats, clamp, grads, RowSpec(*spec))
    if logits.shape[0] > 1 and abs(logits.stride(0)) < logits.shape[1]:
        raise ValueError(f"logits must not overlap themselves to be written, got strides {tuple(logits.stride())}")


def _fill_in_place(_, logits, *args):
    _write(logits, logits, *args)
    if not logits.is_inference():  # so that autograd notices if it had saved these logits
        torch.autograd.graph.increment_version(logits)


_ARGUMENTS = (
    "Tensor target, Tensor stats, Tensor? clamp, Tensor?[] grads, SymInt vocab_start, SymInt vocab_size, "
    "float temperature, int ignore_index"
)
_logits_grad = define("logits_grad", f"(Tensor logits, {_ARGUMENTS}) -> Tensor", _prepare, _fill)
_logits_grad_ = define("logits_grad_", f"(Tensor(a!) logits, {_ARGUMENTS}) -> ()", _prepare_in_place, _fill_in_place)


def logits_grad(
    logits: Tensor, target: Tensor, stats: Tensor, clamp: Tensor | None, grads: Sequence[Tensor | None], spec: RowSpec
) -> Tensor:
    """d sum(grads[0] * logprob + grads[1] * entropy + grads[2] * clamped_entropy) / d logits, like logits.

    Args:
        stats: [T, 4 | 7] of the whole rows.
        clamp: [T, 4]: threshold as a raw logit, weight of its ties, L_k, H_k. Needed with grads[2].
        grads: three of [T] fp32 or None.

    Zeros in padding columns, ignored rows and rows whose gradients are all zero. If the logits were written since the
    forward pass (a target's logit is not the one in stats): RuntimeError on the CPU, NaN in that column on CUDA.
    """
    return _logits_grad(logits, target, stats, clamp, grads, *spec)


def logits_grad_(logits, target, stats, clamp, grads, spec: RowSpec) -> None:
    """The same, written over the logits, which are not compared with stats. Returns nothing, since PyTorch cannot
    functionalise an op that returns its argument."""
    _logits_grad_(logits, target, stats, clamp, grads, *spec)
