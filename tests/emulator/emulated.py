"""Puts the emulated CUDA kernels in the place of the ops: the same dispatch code, CPU tensors, no GPU."""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from entcov.ops import core


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


def launches(extension: Path) -> int:
    """How many kernels were launched since the last call."""
    count = ctypes.CDLL(str(extension)).cuda_emu_launches
    count.restype = ctypes.c_uint64
    return count()


def install(monkeypatch, module: ModuleType) -> None:
    """Until `monkeypatch` is undone, ops on CPU tensors run the kernels that they run on a GPU."""
    monkeypatch.setitem(core.KERNELS, "cpu", module)


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """What new_empty returns may happen to be right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
