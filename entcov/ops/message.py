"""message: what one rank sends: its payload, followed by a signature of 16 bytes (csrc/signature.h)."""

import torch
from torch import Tensor

from entcov.ops.core import SIGNATURE, check_rows, define, kernels_of, launch


def _prepare(payload, values, call, start, columns):
    if payload is None or payload.dim() != 2:
        raise ValueError(f"payload must be [T, width], got {None if payload is None else tuple(payload.shape)}")
    check_rows(payload, "payload", torch.float32, payload.shape, payload)
    if values is not None:
        check_rows(values, "values", torch.int64, (values.numel(),), payload)
    for name, value in (("start", start), ("columns", columns)):
        if not 0 <= value < 2**31:
            raise ValueError(f"{name} must be in [0, 2^31), got {value}")
    return payload.new_empty(payload.numel() + SIGNATURE)


def _fill(out, payload, values, call, start, columns):
    count = 0 if values is None else values.numel()
    parts = kernels_of(payload.device).hash_parts(count)
    room = payload.new_empty(parts, dtype=torch.int64) if parts > 1 else None  # lives until the launch
    launch("message", payload.device, payload, payload.numel(), values, count, call, start, columns, out, room)


_message = define(
    "message", "(Tensor payload, Tensor? values, int call, SymInt start, SymInt columns) -> Tensor", _prepare, _fill
)


def message(payload: Tensor, values: Tensor | None, call: int, start: int, columns: int) -> Tensor:
    """[T * width + 4] fp32: the payload, flattened, and its signature.

    Args:
        payload: [T, width] fp32.
        values: [n] int64 or None; must be equal on all ranks.
        call: hash of the arguments that must be equal on all ranks; 0: this rank failed.
        start, columns: the column range of this rank's shard in the vocabulary.
    """
    return _message(payload, values, call, start, columns)


def signatures(messages: Tensor) -> Tensor:
    """The signatures of messages [R, n] as [R, 2] int64: the hash of call and values, and start + columns * 2^32."""
    ends = messages[:, -SIGNATURE:].clone(memory_format=torch.contiguous_format)  # aligned to 8 bytes
    return ends.view(torch.int64)


def hash_values(values: Tensor, call: int = 1) -> Tensor:
    """[] int64: hash of values [n] int64, including their order, computed on their device. Odd, so never 0."""
    empty = torch.empty((0, 0), dtype=torch.float32, device=values.device)
    return signatures(message(empty, values, call, 0, 0)[None])[0, 0]
