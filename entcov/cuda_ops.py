"""How the ops reach their CUDA kernels: the device guard, the current stream, raw pointers.

The kernels are entcov._cuda, built from csrc/cuda where a CUDA compiler was to be had (setup.py). It knows nothing of
torch; csrc/cuda/entcov_cuda.h is its contract. Nothing here or there waits for the GPU.
"""

import importlib.util

import torch
from torch import Tensor

from entcov.op_registry import DTYPES, num_columns, pointer

_cuda = None
_load_error = None
if importlib.util.find_spec("entcov._cuda") is not None:
    try:
        from entcov import _cuda  # needs no driver
    except ImportError as error:  # built for another Python or libc: the CPU ops work all the same
        _load_error = error


def _launch(name: str, device: torch.device, *args) -> None:
    if _cuda is None:
        why = f"its kernels cannot be loaded: {_load_error}" if _load_error else "it was built without CUDA kernels"
        raise RuntimeError(f"entcov::{name}: the tensors are on {device}, but {why}; rebuild entcov with ENTCOV_CUDA=1")
    with torch.cuda.device(device):
        getattr(_cuda, name)(*args, torch.cuda.current_stream(device).cuda_stream)


def _workspace(columns: int, stats: Tensor) -> Tensor | None:
    """Room for the statistics of the parts that long rows are cut into."""
    parts = _cuda.segments(columns) if _cuda is not None else 1
    return stats.new_empty((parts, *stats.shape)) if parts > 1 else None


def row_stats(stats, logits, target, vocab_start, vocab_size, temperature, moments, ignore_index) -> None:
    columns = num_columns(logits, vocab_start, vocab_size)
    workspace = _workspace(columns, stats)  # has to live until the launch
    _launch(
        "row_stats", logits.device, DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0], columns,
        target.data_ptr(), vocab_start, vocab_size, ignore_index, 1.0 / temperature, stats.data_ptr(), stats.shape[1],
        pointer(workspace),
    )  # fmt: skip


def merge_row_stats(out, shards, target, temperature, ignore_index) -> None:
    R, T, fields = shards.shape
    _launch(
        "merge_row_stats", shards.device, shards.data_ptr(), shards.stride(0), R, T, fields, target.data_ptr(),
        ignore_index, 1.0 / temperature, out.data_ptr(),
    )  # fmt: skip


def logits_grad(
    out, logits, target, stats, grad_logprob, grad_entropy, grad_clamped, clamp, vocab_start, vocab_size, temperature,
    ignore_index,
) -> None:  # fmt: skip
    _launch(
        "logits_grad", logits.device, DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        num_columns(logits, vocab_start, vocab_size), logits.shape[1], target.data_ptr(), vocab_start, ignore_index,
        stats.data_ptr(), stats.shape[1], pointer(grad_logprob), pointer(grad_entropy), pointer(grad_clamped),
        pointer(clamp), 1.0 / temperature, out.data_ptr(), out.stride(0),
    )  # fmt: skip


def covariance_stats(stats, logits_old, logits_new, vocab_start, vocab_size, temperature, row_mask) -> None:
    columns = num_columns(logits_new, vocab_start, vocab_size)
    workspace = _workspace(columns, stats)
    _launch(
        "covariance_stats", logits_new.device, DTYPES[logits_new.dtype], logits_old.data_ptr(), logits_old.stride(0),
        logits_new.data_ptr(), logits_new.stride(0), logits_new.shape[0], columns, pointer(row_mask), 1.0 / temperature,
        stats.data_ptr(), pointer(workspace),
    )  # fmt: skip


def merge_covariance_stats(out, shards, row_mask, temperature) -> None:
    R, T, _ = shards.shape
    _launch(
        "merge_covariance_stats", shards.device, shards.data_ptr(), shards.stride(0), R, T, pointer(row_mask),
        1.0 / temperature, out.data_ptr(),
    )  # fmt: skip


def logit_covariance_grad(
    out, logits_old, logits_new, stats, grad_covariance, grad_entropy_change, grad_kl, row_mask, vocab_start,
    vocab_size, temperature,
) -> None:  # fmt: skip
    _launch(
        "logit_covariance_grad", logits_new.device, DTYPES[logits_new.dtype], logits_old.data_ptr(),
        logits_old.stride(0), logits_new.data_ptr(), logits_new.stride(0), logits_new.shape[0],
        num_columns(logits_new, vocab_start, vocab_size), logits_new.shape[1], pointer(row_mask), stats.data_ptr(),
        pointer(grad_covariance), pointer(grad_entropy_change), pointer(grad_kl), 1.0 / temperature, out.data_ptr(),
        out.stride(0),
    )  # fmt: skip


def checksum(out, values) -> None:
    _launch("checksum", values.device, values.data_ptr(), values.numel(), out.data_ptr())


def shard_message(message, payload, words, hash) -> None:
    _launch(
        "shard_message", payload.device, list(words), pointer(hash), payload.data_ptr(), payload.numel(),
        message.numel() - payload.numel(), message.data_ptr(),
    )  # fmt: skip


def accept_shards(parts, shards, words, alike_from, pieces) -> None:
    R, rows, F = shards.shape
    _launch(
        "accept_shards", shards.device, shards.data_ptr(), R, rows * F, (rows - parts.shape[1]) * F, words, alike_from,
        pieces, parts.data_ptr(),
    )  # fmt: skip
