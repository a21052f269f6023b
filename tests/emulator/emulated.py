"""Puts the emulated CUDA kernels in the place of the ops: the same dispatch code, CPU tensors, no GPU."""

import contextlib
import ctypes
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from entcov import clamp_ops, clamp_rounds, cuda_ops, ops, shard_ops

OPS = ("row_stats", "merge_row_stats", "logits_grad", "covariance_stats", "merge_covariance_stats")
OPS += ("logit_covariance_grad",)
CLAMP_OPS = ("clamp_sketch", "clamp_guess", "clamp_part", "clamp_narrow")


def load(extension: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_seed(extension: Path, seed: int) -> None:
    """0: threads run in order, 1: in reverse, others: shuffled at every barrier and warp collective."""
    ctypes.CDLL(str(extension)).cuda_emu_set_seed(seed)


def loaded_bytes(extension: Path) -> int:
    """What the kernels have loaded by __ldg and __ldcs since the last call."""
    count = ctypes.CDLL(str(extension)).cuda_emu_loaded_bytes
    count.restype = ctypes.c_uint64
    return count()


def install(monkeypatch, module: ModuleType) -> None:
    """Until `monkeypatch` is undone, entcov.ops are what they are on a GPU."""
    monkeypatch.setattr(cuda_ops, "_cuda", module)
    monkeypatch.setattr(ops, "_cpu", None)  # nothing may fall back to it
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    for name in OPS:
        check = _filled_with_nan(getattr(ops, f"_{name}_fake"))
        monkeypatch.setattr(ops, name, ops._on_cuda(check, getattr(cuda_ops, name)))
    monkeypatch.setattr(ops, "logits_grad_", ops._logits_grad_inplace_cuda)
    for name in ("checksum", "shard_message", "accept_shards"):
        monkeypatch.setattr(shard_ops, name, getattr(shard_ops, f"_{name}_cuda"))
    for module, names in ((clamp_ops, ("clamped_stats",)), (clamp_rounds, CLAMP_OPS)):
        monkeypatch.setattr(module, "launch", cuda_ops._launch)
        for name in names:
            check = getattr(module, f"_{name}_fake")
            monkeypatch.setattr(module, name, getattr(module, f"_{name}"))
            if name != "clamp_narrow":  # which fills copies of what it is given
                monkeypatch.setattr(module, f"_{name}_fake", _filled_with_nan(check))


def _filled_with_nan(check):
    """What new_empty returns may happen to be right."""

    def filled(*args):
        out = check(*args)
        for tensor in out if isinstance(out, tuple) else (out,):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        return out

    return filled
