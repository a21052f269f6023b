"""logit_covariance: how a change of the logits changes the entropy; the vocabulary may be split over ranks.

It has the structure of token_stats: one local op -> one all-gather -> one merge that also computes the outputs;
backward is one local op. Formulas: docs/math.md (13) to (16).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entcov.ops.core import RowSpec, constant_temperature
from entcov.ops.covariance_stats import FIELDS, covariance_stats
from entcov.ops.logit_covariance_grad import logit_covariance_grad
from entcov.ops.merge_covariance_stats import merge_covariance_stats
from entcov.stats import derivative
from entcov.stats.ranks import eager
from entcov.stats.shards import Partial, Shard, check_local, gather, resolve_shard
from entcov.stats.token_stats import check_leading_shape


class LogitCovariance(NamedTuple):
    """What `logit_covariance` returns: fp32, the leading shape of the logits, in nats."""

    covariance: Tensor
    predicted_entropy_change: Tensor
    entropy_change: Tensor
    kl: Tensor


def logit_covariance(
    logits_old: Tensor,
    logits_new: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    loss_mask: Tensor | None = None,
) -> LogitCovariance:
    """How a change of the logits changes the entropy of each row: as predicted by the covariance, and exactly.

    Equivalent to, in float64 and with all columns on one rank (entcov/verify/reference.py):

        old, new = (log_softmax(z[..., :vocab_size].double() / temperature, -1) for z in (logits_old, logits_new))
        p = old.exp();  change = (logits_new - logits_old)[..., :vocab_size].double() / temperature
        covariance = (p * old * change).sum(-1) - (p * old).sum(-1) * (p * change).sum(-1)     # Cov_{a~p}(log p, dz)
        predicted_entropy_change = -covariance                                                # to first order in dz
        entropy_change = entropy(new) - entropy(old)
        kl = (p * (old - new)).sum(-1)                                                        # KL(old || new)

    Args:
        logits_old, logits_new: [..., V_local] of one shape and dtype: float32, bfloat16 or float16, stride 1 along the
            vocabulary. This rank's columns, before and after. logits_old is a constant.
        group, vocab_start, vocab_size, temperature: as for `token_stats`.
        loss_mask: [...] bool. Rows that are False are not read: all their outputs and gradients are 0.

    Returns:
        LogitCovariance: fp32 [...], in nats; bit-identical on all ranks of the group.

    Differentiable: all outputs, with respect to logits_new, once.
    Mutated: nothing. Kept for backward: the two logits, the mask, and 32 bytes per token. The logits must not be
    written before backward. Autograd raises if they are, but does not detect writes inside a function compiled by
    torch.compile; there call `torch.compiler.disable(logit_covariance)`.
    Collectives: one all-gather of 32 bytes per token and rank plus 16 bytes in forward, which every rank of the group
    must enter; none in backward.

    Error against float64: 2e-5 absolute where the logits change by a few units. A logit that becomes -inf makes the kl
    +inf (and the covariance need not be finite); one that was -inf does not count. A NaN or +inf on either side makes
    its row NaN.

    Raises: as `token_stats`; on CUDA a row without a finite logit is NaN.

    Source: docs/math.md (13) to (16); Cui et al., arXiv 2505.22617, theorems 1 and 2.
    """
    arguments = (logits_old, logits_new, group, vocab_start, vocab_size, temperature, loss_mask)
    if group is None:
        old, new, mask, spec = _resolved_pair(*arguments)
        outputs = _LogitCovariance.apply(old, new, mask, *spec[:3], None)
    else:
        outputs = eager(_sharded)(*arguments)
    if logits_new.dim() != 2:
        outputs = (x.view(logits_new.shape[:-1]) for x in outputs)
    return LogitCovariance(*outputs)


def _resolved_pair(logits_old, logits_new, group, vocab_start, vocab_size, temperature, loss_mask):
    """(old logits [T, V_local], new logits [T, V_local], mask [T] or None, RowSpec)"""
    check_local(logits_old=logits_old, logits_new=logits_new, loss_mask=loss_mask)
    if logits_old.shape != logits_new.shape:
        raise ValueError(
            f"logits_old must have the shape of logits_new, got {tuple(logits_old.shape)} and {tuple(logits_new.shape)}"
        )
    leading = logits_new.shape[:-1]
    check_leading_shape("logits_old", logits_old, "logits_new", leading)
    check_leading_shape("logits_new", logits_new, "loss_mask", leading if loss_mask is None else loss_mask.shape)
    shard = resolve_shard(logits_new.shape[-1], group, vocab_start, vocab_size)
    old, new = (x.reshape(leading.numel(), shard.width) for x in (logits_old.detach(), logits_new))
    mask = None if loss_mask is None else loss_mask.reshape(leading.numel()).contiguous()
    return old, new, mask, RowSpec(shard.start, shard.vocab_size, constant_temperature(temperature))


def _sharded(logits_old, logits_new, group, *arguments):
    rows = None

    def prepare():
        nonlocal rows
        rows = old, new, mask, spec = _resolved_pair(logits_old, logits_new, group, *arguments)
        with torch.no_grad():
            payload = covariance_stats(old, new, mask, spec)
        call = {"dtype": str(new.dtype).removeprefix("torch."), "temperature": spec.temperature}
        call["loss_mask"] = None if mask is None else "given"
        values = {} if mask is None else {"loss_mask": mask.long()}
        return Partial(payload, Shard(spec.vocab_start, new.shape[1], spec.vocab_size), call, values)

    shape = (logits_new.shape[:-1].numel(), FIELDS)
    messages = gather("logit_covariance", group, shape, logits_new.device, prepare)
    old, new, mask, spec = rows
    return _LogitCovariance.apply(old, new, mask, *spec[:3], (messages,))


class _LogitCovariance(torch.autograd.Function):
    """Two logit tensors [T, V_local] -> the outputs. `gathered`: None, or over a group the 1-tuple of messages."""

    @staticmethod
    def forward(ctx, old, new, mask, vocab_start, vocab_size, temperature, gathered):
        spec = RowSpec(vocab_start, vocab_size, temperature)
        if gathered is None:
            stats, *outputs = covariance_stats(old, new, mask, spec, whole=True)
        else:
            stats, *outputs = merge_covariance_stats(*gathered, mask, len(new), spec)
        ctx.save_for_backward(old, new, mask, stats)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @derivative.first_only("logit_covariance")
    def backward(ctx, grad_covariance, grad_predicted, grad_entropy_change, grad_kl):
        old, new, mask, stats = ctx.saved_tensors
        if grad_predicted is not None:  # it is -covariance
            grad_covariance = -grad_predicted if grad_covariance is None else grad_covariance - grad_predicted
        grads = [None if g is None else g.contiguous() for g in (grad_covariance, grad_entropy_change, grad_kl)]
        return None, logit_covariance_grad(old, new, mask, stats, grads, ctx.spec), *[None] * 5
