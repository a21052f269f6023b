"""logit_covariance_grad: the gradient of covariance, entropy change and KL with respect to the new logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from entcov.ops.core import RowSpec, addresses, check_rows, define, launch, logits_view, with_huge_pages
from entcov.ops.covariance_stats import FIELDS, check_pair

_NAMES = ("grad_covariance", "grad_entropy_change", "grad_kl")


def _prepare(logits_old, logits_new, row_mask, stats, grads, spec):
    check_pair(logits_old, logits_new, row_mask, spec)
    T = logits_new.shape[0]
    check_rows(stats, "stats", torch.float32, (T, FIELDS), logits_new)
    if len(grads) != len(_NAMES):
        raise ValueError(f"grads must be {len(_NAMES)} ({', '.join(_NAMES)}), got {len(grads)}")
    for name, grad in zip(_NAMES, grads, strict=True):
        check_rows(grad, name, torch.float32, (T,), logits_new, optional=True)
    return logits_new.new_empty(logits_new.shape)


def _fill(out, logits_old, logits_new, row_mask, stats, grads, spec):
    launch(
        "logit_covariance_grad", logits_new.device, logits_view(logits_old), logits_view(logits_new), row_mask,
        spec, stats, addresses(grads, len(_NAMES)), with_huge_pages(out), out.stride(0),
    )  # fmt: skip


_logit_covariance_grad = define(
    "logit_covariance_grad",
    "(Tensor logits_old, Tensor logits_new, Tensor? row_mask, Tensor stats, Tensor?[] grads, RowSpec[:3] spec) "
    "-> Tensor",
    _prepare,
    _fill,
)


def logit_covariance_grad(
    logits_old: Tensor, logits_new: Tensor, row_mask: Tensor | None, stats: Tensor, grads: Sequence, spec: RowSpec
) -> Tensor:
    """d sum(grads[0] * Cov + grads[1] * (H_new - H_old) + grads[2] * KL(old || new)) / d logits_new.

    Args:
        logits_old, logits_new: [T, V_local] of one dtype.
        row_mask: [T] bool or None, as in the forward pass.
        stats: [T, 8] fp32, CovarianceStats of the whole rows.
        grads: three of [T] fp32 or None (0).

    Returns:
        [T, V_local], contiguous, in the dtype of logits_new. Padding columns, masked rows and rows whose gradients are
        all 0 get zeros.
    """
    return _logit_covariance_grad(logits_old, logits_new, row_mask, stats, grads, spec)
