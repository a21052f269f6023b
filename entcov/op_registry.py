"""How an entcov op comes into being: one library, one `register` call an op, and the checks that all ops share.

An op is its schema, a `check` that raises on bad arguments and returns what the result looks like, and a kernel per
device. `check` runs under fake tensors too, so torch.compile reports the same errors as eager code.
"""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

try:
    from entcov import _cpu  # after torch: the extension shares torch's OpenMP runtime
except ImportError as error:
    raise ImportError(
        "entcov's C++ core cannot be loaded; in a source tree, build it with `pip install -e .`"
    ) from error

LIBRARY = torch.library.Library("entcov", "DEF")
MAX_COLUMNS = 2**24  # of a shard, with a clamp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the values of DType in csrc/entcov.h


def _select_isa() -> None:
    wanted = os.environ.get("ENTCOV_ISA")
    if wanted and not _cpu.set_isa(wanted):
        raise ValueError(f"ENTCOV_ISA must be avx512, avx2 or baseline and supported by this CPU, got {wanted!r}")


_select_isa()


def register(
    name: str,
    schema: str,
    cpu: Callable,
    fake: Callable,
    *,
    cuda: Callable | None = None,
    derivative_error: str | None = None,
) -> Callable:
    """Defines entcov::`name` and returns it as a callable.

    `cpu`, `cuda` and `fake` take the schema's arguments. `derivative_error`: the message of the RuntimeError that a
    backward pass through the op raises (every entcov op is a leaf of some autograd formula or a constant; none is
    differentiated by itself). None: the op writes into an argument, which autograd refuses by itself.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    op = getattr(torch.ops.entcov, name).default
    LIBRARY.impl(name, _without_none(op, cpu), "CPU")
    LIBRARY.impl(name, _without_none(op, cuda or _no_cuda(name)), "CUDA")
    torch.library.register_fake(f"entcov::{name}", _without_none(op, fake), lib=LIBRARY)
    if derivative_error is not None:

        def backward(ctx, *grads):
            raise RuntimeError(f"entcov: {derivative_error}")

        torch.library.register_autograd(f"entcov::{name}", backward, lib=LIBRARY)
    return op


def _without_none(op: torch._ops.OpOverload, kernel: Callable) -> Callable:
    """`kernel`, given tensors where the schema says Tensor: the dispatcher lets a None pass there."""
    tensors = [(i, a.name) for i, a in enumerate(op._schema.arguments) if isinstance(a.type, torch.TensorType)]

    @functools.wraps(kernel)
    def run(*args):
        for i, name in tensors:
            if args[i] is None:
                raise TypeError(f"{name} must be a tensor, got None")
        return kernel(*args)

    return run


def _no_cuda(name: str) -> Callable:
    def unavailable(*args, **kwargs):
        raise RuntimeError(f"entcov::{name} is a step of the clamped entropy on the CPU; its tensors must be there")

    return unavailable


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """2-D, a known dtype, unit stride along the vocabulary."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"{name} must be [T, V_local], got shape {tuple(logits.shape)}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {tuple(logits.stride())}")


def check_rows(tensor: Tensor | None, name: str, dtype: torch.dtype, shape: tuple, logits: Tensor) -> None:
    """A contiguous tensor of this dtype and shape on the logits' device (None passes)."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} (one row a token), got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if tensor.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like the logits, got {tensor.device}")


def check_temperature(temperature: float) -> None:
    # The kernels multiply by 1 / temperature in fp32, which has to exist there.
    if not (1e-30 <= temperature <= 1e30):
        raise ValueError(f"temperature must be positive and finite (1e-30 to 1e30), got {temperature}")


def check_columns(logits: Tensor) -> None:
    """Of the ops of the clamp, whose counts travel as fp32."""
    if logits.shape[1] > MAX_COLUMNS:
        raise ValueError(f"logits must have at most 2^24 columns on a rank for a clamp, got {logits.shape[1]}")


def constant_temperature(temperature: float) -> float:
    """As a number. It is a constant: a tensor that is to learn would get no gradient, and nobody would notice."""
    if isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError("temperature must not require a gradient (it is a constant and would get none): detach it")
    temperature = float(temperature)
    check_temperature(temperature)
    return temperature


def check_shard(vocab_start: int, vocab_size: int) -> None:
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be >= 0, got {vocab_start}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be >= 1, got {vocab_size}")


def num_columns(logits: Tensor, vocab_start: int, vocab_size: int) -> int:
    """Columns of this shard that exist; the rest is padding."""
    return min(max(vocab_size - vocab_start, 0), logits.shape[1])


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
