"""Common code of the ops: registration, the launch of a kernel on CPU or CUDA, RowSpec, and checks of arguments.

The kernels are in the extension modules entcov._cpu and, if a CUDA compiler was found at build time (setup.py),
entcov._cuda. Both contain the launchers of csrc/kernels.h with the same signatures, and neither depends on torch.

To add an op `name`:
1. Declare its launcher in csrc/kernels.h, implement it in csrc/cpu/ and csrc/cuda/, and bind it by one line in
   csrc/bindings.cpp.
2. Write entcov/ops/name.py with
   - `_prepare(*arguments)`, which checks the arguments (the check_* functions below) and returns empty results;
   - `_fill(results, *arguments)`, which calls `launch("name", device, ...)` with the launcher's arguments in order:
     tensors and None for pointers, and `logits_view`, `messages_view`, `addresses` or a RowSpec for structs;
   - `_name = define("name", schema, _prepare, _fill)`;
   - the public wrapper `name(...)`, which has the docstring.
entcov/ops/clamp_bracket.py is a short example. Fake tensors run `_prepare` alone, so torch.compile reports the same
argument errors as eager code.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from entcov import _cpu  # after torch: the extension shares torch's OpenMP runtime
except ImportError as error:
    raise ImportError(
        "entcov's C++ core cannot be loaded; in a source tree, build it with `pip install -e .`"
    ) from error

KERNELS = {"cpu": _cpu}  # by device type
_why_no_cuda = "it was built without CUDA kernels"
if importlib.util.find_spec("entcov._cuda") is not None:
    try:
        from entcov import _cuda  # needs no driver

        KERNELS["cuda"] = _cuda
    except ImportError as error:  # built for another Python or libc; the CPU ops still work
        _why_no_cuda = f"its kernels cannot be loaded: {error}"

LIBRARY = torch.library.Library("entcov", "DEF")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the values of DType in csrc/kernels.h
SIGNATURE = 4  # floats that end a message: csrc/signature.h

if (_wanted := os.environ.get("ENTCOV_ISA")) and not _cpu.set_isa(_wanted):
    raise ValueError(f"ENTCOV_ISA must be avx512, avx2 or baseline and supported by this CPU, got {_wanted!r}")


class RowSpec(NamedTuple):
    """The range of columns of a shard, and how its rows are read: RowSpec of csrc/row_stats.h."""

    vocab_start: int  # token id of column 0
    vocab_size: int  # of the whole row; columns of tokens >= vocab_size are padding
    temperature: float = 1.0
    ignore_index: int = -100  # rows with this target are not read and get zeros


_MEMBERS = ("SymInt vocab_start", "SymInt vocab_size", "float temperature", "int ignore_index")


def hash_text(text: str) -> int:
    """64-bit hash of a string as a signed integer; never 0."""
    return _cpu.hash(text.encode()) | 1


def isa() -> str:
    """The instruction set of the CPU kernels: "avx512", "avx2" or "baseline". The environment's ENTCOV_ISA overrides
    the choice at import."""
    return _cpu.isa()


def define(name: str, schema: str, prepare: Callable, fill: Callable) -> Callable:
    """Registers entcov::`name` for CPU, CUDA and fake tensors, and returns it as a callable.

    Args:
        schema: in place of the members of a RowSpec, which PyTorch gets one by one, it may have "RowSpec spec", or
            "RowSpec[:3] spec" if the op ignores no rows. `prepare`, `fill` and the callable get the RowSpec.
        prepare: takes the schema's arguments, returns the result with its memory uninitialised. Raises TypeError or
            ValueError for invalid arguments.
        fill: takes (result, *arguments) and launches the kernel that writes the result.

    Returns:
        A callable with the schema's arguments. It calls the kernel directly if PyTorch's dispatcher has nothing to do.

    An op has no derivative: calling it with a tensor that requires a gradient, in grad mode, is a RuntimeError.
    """
    if found := re.search(r"RowSpec(\[:3\])? spec", schema):
        at, count = schema[: found.start()].count(","), 3 if found[1] else 4
        schema = schema.replace(found[0], ", ".join(_MEMBERS[:count]))
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))

    def packed(function):
        return lambda *args: function(*args[:at], RowSpec(*args[at : at + count]), *args[at + count :])

    def run(*args):
        _refuse_derivative(name, args)
        out = prepare(*args)
        fill(out, *args)
        return out

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, packed(run) if found else run, device)
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"entcov::{name}", packed(prepare) if found else prepare, lib=LIBRARY)
    dispatched = getattr(torch.ops.entcov, name).default

    def call(*args):
        if _may_skip_dispatcher(args[0]):
            return run(*args)
        return dispatched(*args[:at], *args[at][:count], *args[at + 1 :]) if found else dispatched(*args)

    return call


def _may_skip_dispatcher(tensor: Tensor | None) -> bool:
    """Whether PyTorch's dispatcher would only call the CPU or CUDA kernel: no compiler, subclass, dispatch mode,
    functorch transform or profiler is active. Skipping it saves 10 to 20 microseconds per call."""
    return not (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.device.type not in ("cpu", "cuda")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def _refuse_derivative(name: str, args: Sequence) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        raise RuntimeError(
            f"entcov::{name} has no derivative, and an argument requires one; call entcov.token_stats, or the op under "
            "torch.no_grad()"
        )


def launch(name: str, device: torch.device, *args) -> bool:
    """Calls a launcher of csrc/kernels.h: on the CPU with torch's number of threads, on CUDA on the current stream
    without synchronising.

    Args:
        args: the launcher's arguments except the last (`Device`). A Tensor or None stands for a pointer, a tuple of
            members for a struct.

    Returns:
        On the CPU, whether a row is NaN. On CUDA always False: to know, the host would have to wait.

    Raises:
        RuntimeError: the launcher failed, or entcov was built without CUDA kernels.
    """
    args = [_address(x) if x is None or isinstance(x, Tensor) else x for x in args]
    if device.type == "cpu":
        return getattr(KERNELS["cpu"], name)(*args, torch.get_num_threads())
    with torch.cuda.device(device):
        return getattr(kernels_of(device), name)(*args, torch.cuda.current_stream(device).cuda_stream)


def kernels_of(device: torch.device):
    """The extension module with the kernels for this device. RuntimeError if there is none."""
    if device.type not in KERNELS:
        raise RuntimeError(
            f"entcov: the tensors are on {device}, but {_why_no_cuda}; rebuild entcov with ENTCOV_CUDA=1"
        )
    return KERNELS[device.type]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor | None], count: int) -> tuple[int, ...]:
    """A struct of `count` pointers: those of `tensors` (None: null), then nulls."""
    return (*map(_address, tensors), *[0] * (count - len(tensors)))


def logits_view(logits: Tensor) -> tuple[int, int, int, int, int]:
    """The struct Logits of csrc/kernels.h: dtype, address, row stride, T, width."""
    return DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), *logits.shape


def messages_view(messages: Tensor, T: int) -> tuple[int, int, int, int]:
    """The struct Messages of csrc/signature.h: address, ranks, rows, floats per row."""
    return messages.data_ptr(), len(messages), T, (messages.shape[1] - SIGNATURE) // max(T, 1)


def workspace(columns: int, like: Tensor) -> Tensor | None:
    """[segments, *like.shape] like `like`, for the statistics of the segments of long rows (csrc/cuda/launch.h); None
    if rows with this many columns are not cut into segments, as on the CPU."""
    segments = kernels_of(like.device).segments(columns)
    return like.new_empty((segments, *like.shape)) if segments > 1 else None


def with_huge_pages(fresh: Tensor) -> Tensor:
    """Returns `fresh`, a tensor that is not written yet; on the CPU, advises the system to use huge pages for it."""
    if fresh.device.type == "cpu":
        _cpu.advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def num_columns(width: int, spec: RowSpec) -> int:
    """The number of columns out of `width` that are not padding."""
    return min(max(spec.vocab_size - spec.vocab_start, 0), width)


# ---- checks of arguments --------------------------------------------------------------------------------------------


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Requires [T, V_local] float32, bfloat16 or float16 with stride 1 along the vocabulary."""
    if logits is None:
        raise TypeError(f"{name} must be a tensor, got None")
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"{name} must be [T, V_local], got shape {tuple(logits.shape)}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {tuple(logits.stride())}")


def check_rows(
    tensor: Tensor | None, name: str, dtype: torch.dtype, shape: tuple, like: Tensor, optional: bool = False
) -> None:
    """Requires a contiguous tensor with this dtype and shape on the device of `like`; None is allowed if `optional`."""
    if tensor is None:
        if optional:
            return
        raise TypeError(f"{name} must be a tensor, got None")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} (one row a token), got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the logits, got {tensor.device}")


def check_messages(messages: Tensor, T: int, fields: int) -> None:
    """Requires [R >= 1, T * width + 4] float32, contiguous, with width >= fields."""
    if messages is None:
        raise TypeError("messages must be a tensor, got None")
    if messages.dtype != torch.float32:
        raise TypeError(f"messages must be float32, got {messages.dtype}")
    if messages.dim() != 2 or messages.shape[0] < 1 or not messages.is_contiguous():
        raise ValueError(
            f"messages must be [R >= 1, T * width + {SIGNATURE}] and contiguous, got {tuple(messages.shape)} with "
            f"strides {tuple(messages.stride())}"
        )
    floats = messages.shape[1] - SIGNATURE
    if floats < T * fields or (floats % T if T else floats):
        raise ValueError(
            f"messages must be [R, T * width + {SIGNATURE}] with T = {T} and width >= {fields}, got "
            f"{tuple(messages.shape)}"
        )


def check_stats(stats: Tensor, T: int, like: Tensor) -> None:
    """Requires [T, 4 or 7] float32: the statistics of whole rows."""
    if stats is None:
        raise TypeError("stats must be a tensor, got None")
    if stats.dim() != 2 or stats.shape[1] not in (4, 7):
        raise ValueError(f"stats must be [T, 4 or 7] as row_stats returns them, got {tuple(stats.shape)}")
    check_rows(stats, "stats", torch.float32, (T, stats.shape[1]), like)


def check_spec(spec: RowSpec) -> None:
    check_temperature(spec.temperature)
    if not 0 <= spec.vocab_start < 2**31:
        raise ValueError(f"vocab_start must be in [0, 2^31), got {spec.vocab_start}")
    if not 1 <= spec.vocab_size < 2**31:
        raise ValueError(f"vocab_size must be in [1, 2^31), got {spec.vocab_size}")


def check_temperature(temperature: float) -> None:
    # The kernels multiply by 1 / temperature in fp32, so both must be in the range of fp32.
    if not (1e-30 <= temperature <= 1e30):
        raise ValueError(f"temperature must be positive and finite (1e-30 to 1e30), got {temperature}")


def constant_temperature(temperature: float) -> float:
    """The temperature as a float. ValueError if it is a tensor that requires a gradient: it would silently get none."""
    if isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError("temperature must not require a gradient (it is a constant and would get none): detach it")
    temperature = float(temperature)
    check_temperature(temperature)
    return temperature
