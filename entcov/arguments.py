"""Checks of arguments, and the pieces of their messages: each names the argument, the rule and the value."""

import difflib
import math
import sys
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor


def one_line(text: object, most: int = 160) -> str:
    """`text` for a message: white space becomes single blanks, and what is longer than `most` characters is cut."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def shown(value: object) -> str:
    """`repr(value)` for a message, cut to 80 characters."""
    try:
        return one_line(repr(value), 80)
    except ValueError:  # Python does not spell integers of more than some thousand digits
        return "a number of thousands of digits"


def suggestion(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean X?" where one of `known` is close to it, else ""."""
    close = difflib.get_close_matches(str(name), [str(one) for one in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf, hint: str = "") -> None:
    """`value` is a real number (no bool, no NaN) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= float(value) <= high:  # False for NaN as well
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}{'; ' + hint if hint else ''}")


def fraction(name: str, value: object, most: float = 1.0) -> None:
    """`value` is a fraction in [0, most]; the message knows that a larger one is usually a percent."""
    number(name, value, 0.0, most, hint="it is a fraction, not a percent (2e-3 means 0.2 percent)")


def positive(name: str, value: object, high: float = math.inf, hint: str = "") -> None:
    number(name, value, 0.0, high, hint)
    if value == 0:
        raise ValueError(f"{name} must be greater than 0, got {value!r}{'; ' + hint if hint else ''}")


def integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}{suggestion(value, allowed)}")


def vector(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """`tensor` is a 1-D tensor of one of `dtypes`, with the shape and device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    local(
        "the loss is that of a rank's own tokens, with the Totals of all ranks; group= goes to select()",
        **{name: tensor},
    )
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension (packed tokens, [T]), got shape {tuple(tensor.shape)}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)} as the others, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the others, got {tensor.device}")


def local(hint: str, **tensors: Tensor | None) -> None:
    """None of `tensors` is a DTensor. hint: what else the caller has to pass, for the message."""
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    if module is None:  # there is no DTensor where nobody has imported it
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, module.DTensor):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor with the placements {tensor.placements}; pass "
                f"{name}.to_local(): {hint}"
            )


def readable(tensor: Tensor) -> bool:
    """Whether the host can read the values at no cost. On an accelerator it would wait for them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def finite(name: str, tensor: Tensor, mask: Tensor | None = None) -> None:
    """Every value (under `mask`) is finite. Looked at on the CPU only; elsewhere NaN runs into the result."""
    if not readable(tensor):
        return
    bad = ~torch.isfinite(tensor.detach())
    if mask is not None:
        bad = bad & mask
    count = int(bad.sum())
    if count:
        first = int(bad.nonzero()[0])
        where, of = ("", len(bad)) if mask is None else (" under the mask", int(mask.sum()))
        raise ValueError(
            f"{name} must be finite{where}: {count} of {of} values are not (first: [{first}] is {tensor[first].item()})"
        )
