"""The local ops with every number as an argument of its own, for tests that compare them with an oracle. A merge takes
the shards' statistics [R, T, F] and sends the messages of ranks that agree."""

import torch
from torch import Tensor

from entcov.ops import covariance_stats as _covariance
from entcov.ops import logit_covariance_grad as _pair_grad
from entcov.ops import logits_grad as _grad
from entcov.ops import merge_covariance_stats as _merge_covariance
from entcov.ops import merge_row_stats as _merge
from entcov.ops import row_stats as _row
from entcov.ops.core import RowSpec
from entcov.ops.message import message

NAMES = ("row_stats", "merge_row_stats", "logits_grad", "logits_grad_", "covariance_stats", "merge_covariance_stats",
         "logit_covariance_grad")  # fmt: skip
ALL_COLUMNS = 2**31 - 1


def messages_of(shards: Tensor) -> Tensor:
    """Messages [R, n] of ranks that agree: shard r has column r, the last one the rest of ALL_COLUMNS."""
    last = len(shards) - 1
    sent = [message(x, None, 1, r, 1 if r < last else ALL_COLUMNS - r) for r, x in enumerate(shards)]
    return torch.stack(sent)


def row_stats(logits, target, vocab_start, vocab_size, temperature, moments, ignore_index):
    return _row.row_stats(logits, target, RowSpec(vocab_start, vocab_size, temperature, ignore_index), moments)


def merge_row_stats(shards, target, temperature, ignore_index):
    spec = RowSpec(0, ALL_COLUMNS, temperature, ignore_index)
    return _merge.merge_row_stats(messages_of(shards), target, spec, shards.shape[2] == 7)[0]


def logits_grad(
    logits, target, stats, grad_logprob, grad_entropy, grad_clamped, clamp, vocab_start, vocab_size, temperature,
    ignore_index,
):  # fmt: skip
    spec = RowSpec(vocab_start, vocab_size, temperature, ignore_index)
    return _grad.logits_grad(logits, target, stats, clamp, (grad_logprob, grad_entropy, grad_clamped), spec)


def logits_grad_(
    logits, target, stats, grad_logprob, grad_entropy, grad_clamped, clamp, vocab_start, vocab_size, temperature,
    ignore_index,
):  # fmt: skip
    spec = RowSpec(vocab_start, vocab_size, temperature, ignore_index)
    return _grad.logits_grad_(logits, target, stats, clamp, (grad_logprob, grad_entropy, grad_clamped), spec)


def covariance_stats(logits_old, logits_new, vocab_start, vocab_size, temperature, row_mask):
    return _covariance.covariance_stats(logits_old, logits_new, row_mask, RowSpec(vocab_start, vocab_size, temperature))


def merge_covariance_stats(shards, row_mask, temperature):
    spec = RowSpec(0, ALL_COLUMNS, temperature)
    return _merge_covariance.merge_covariance_stats(messages_of(shards), row_mask, shards.shape[1], spec)[0]


def logit_covariance_grad(
    logits_old, logits_new, stats, grad_covariance, grad_entropy_change, grad_kl, row_mask, vocab_start, vocab_size,
    temperature,
):  # fmt: skip
    spec = RowSpec(vocab_start, vocab_size, temperature)
    grads = (grad_covariance, grad_entropy_change, grad_kl)
    return _pair_grad.logit_covariance_grad(logits_old, logits_new, row_mask, stats, grads, spec)
