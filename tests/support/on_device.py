"""Runs the tests of the ops on a GPU as they are: ENTCOV_TEST_DEVICE=cuda.

Every op in `entcov.ops` that a GPU has a kernel for is wrapped: its tensors are copied to the device with their strides
and their place in memory, the op runs there, and its results come back. Tests and oracles go on in CPU tensors.
ENTCOV_TEST_DEVICE=cpu does the same with a copy on the CPU, which rehearses the wrapping.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from entcov import ops

DEVICE = os.environ.get("ENTCOV_TEST_DEVICE")
OPS = ("row_stats", "merge_row_stats", "logits_grad", "logits_grad_", "covariance_stats", "merge_covariance_stats",
       "logit_covariance_grad")  # fmt: skip
# Parts of the names of tests that the CPU alone can pass, and why.
CPU_ONLY = {
    "is_an_error_that_counts": "raises on the CPU; no kernel can: NaN on a GPU (tests/gpu/test_public_functions.py)",
    "is_an_error_that_names_the_side": "raises on the CPU, NaN on a GPU",
    "some_empty_rows_are_counted": "raises on the CPU, NaN on a GPU",
    "rows have no finite logit": "raises on the CPU, NaN on a GPU",
    "are not, first 99 at row 2": "raises on the CPU, NaN on a GPU",
    "fullgraph_compile": "traces the wrapper; tests/gpu/test_public_functions.py compiles a function on the device",
}


def install() -> None:
    """Wraps the ops, if a device is asked for."""
    if DEVICE is None:
        return
    if DEVICE not in ("cuda", "cpu"):
        raise pytest.UsageError(f"ENTCOV_TEST_DEVICE must be cuda or cpu, got {DEVICE!r}")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("ENTCOV_TEST_DEVICE=cuda, but torch sees no GPU")
    for name in OPS:
        setattr(ops, name, on_device(getattr(ops, name), DEVICE, in_place=name.endswith("_")))


def skip_what_only_the_cpu_does(items: list[pytest.Item]) -> None:
    if DEVICE is not None:
        for item in items:
            for part, reason in CPU_ONLY.items():
                if part in item.name:
                    item.add_marker(pytest.mark.skip(reason=reason))


def on_device(op: Callable, device: str, in_place: bool = False) -> Callable:
    """`op` on copies of its tensors on `device`; its results, and what it wrote, on the CPU."""

    def call(*args):
        if any(isinstance(a, FakeTensor) or (isinstance(a, Tensor) and a.device.type != "cpu") for a in args):
            return op(*args)
        memory: dict[tuple[int, int], Tensor] = {}
        there = [moved(a, device, memory) if isinstance(a, Tensor) else a for a in args]
        before = None if there[0].is_inference() else there[0]._version
        result = op(*there)
        if in_place:
            _bytes_of(args[0]).copy_(memory[_key(args[0])])
            if before is not None and not args[0].is_inference():  # what the op told autograd
                for _ in range(there[0]._version - before):
                    torch.autograd.graph.increment_version(args[0])
        return result if result is None else result.to("cpu")

    return call


def moved(tensor: Tensor, device: str, memory: dict[tuple[int, int], Tensor]) -> Tensor:
    """A copy with the same strides and offset, one of memory that tensors share once more shared by their copies."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return tensor.to(device, copy=True)  # keeps the link; the op is about to refuse it
    key = _key(tensor)
    if key not in memory:
        memory[key] = _bytes_of(tensor).to(device, copy=True)
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    return there.set_(memory[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _key(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _bytes_of(tensor: Tensor) -> Tensor:
    """All the memory that the tensor lies in."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
