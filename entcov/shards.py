"""Who holds which columns of the vocabulary, and the all-gather that every sharded statistic goes through.

A shard's part of the statistics travels behind a few header rows that say what the shard is and how its rank was
called. So ranks that were called differently find out from the collective they have to enter anyway, where a plain
gather would return numbers that are wrong on every rank alike. On the CPU all of them raise the same error. On a GPU
the host would have to wait to see the headers, so the GPU compares them itself and turns what was gathered into NaN.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import shard_ops


@dataclass(frozen=True)
class Shard:
    """The columns of one rank: `width` of them, of which the first `columns` exist (the rest is padding)."""

    start: int  # global id of column 0
    width: int
    vocab_size: int  # of the whole row

    @property
    def columns(self) -> int:
        return min(max(self.vocab_size - self.start, 0), self.width)


def resolve_shard(width: int, group, vocab_start: int | None, vocab_size: int | None) -> Shard:
    """Fills in the defaults of `vocab_start` and `vocab_size`, and refuses what cannot be meant."""
    if group is None:
        if vocab_start not in (None, 0):
            raise ValueError(f"vocab_start must be 0 or None without a group (all columns are here), got {vocab_start}")
        if vocab_size is None:
            vocab_size = width
        elif not 1 <= vocab_size <= width:
            raise ValueError(f"vocab_size must be in [1, {width}] (the columns of logits, no group), got {vocab_size}")
        return Shard(0, width, vocab_size)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group must contain the calling rank, and does not")
    if vocab_start is None:
        vocab_start = rank * width
        vocab_size = world * width if vocab_size is None else vocab_size
    elif vocab_size is None:
        raise ValueError("vocab_size must be given with vocab_start: shards may be uneven, so it cannot be inferred")
    if not (0 <= vocab_start < 2**63 and 1 <= vocab_size < 2**63):
        raise ValueError(
            "vocab_start must be >= 0 and vocab_size >= 1, and both must fit 64 bits, got "
            f"{vocab_start} and {vocab_size}"
        )
    return Shard(vocab_start, width, vocab_size)


def eager(function: Callable) -> Callable:
    """`function` under torch.compiler.disable: collectives, and checks of what they bring, are not traced.

    Decided at the call and not by a decorator, which would import the compiler, and double the time to import entcov.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def gather(
    op: str,
    payload: Tensor,
    group: dist.ProcessGroup,
    shard: Shard,
    call: dict[str, float | int | str],
    checksums: dict[str, Tensor | int],
    failure: Exception | None,
) -> tuple[Tensor, Tensor]:
    """All-gathers `payload` [T, F] fp32. One collective; on CUDA nothing waits for the GPU.

    Args:
        op: public name of the caller, for messages.
        payload: this rank's rows. Those of a failed rank are sent, but not looked at.
        call: what every rank must agree on, by the argument's name. Strings: 8 ASCII characters at most.
        checksums: the same for a tensor, at most one, by `shard_ops.checksum`; a number where a rank has none.
        failure: the exception that this rank has to raise for its values. It enters the collective nevertheless, so
            that the others do not wait for it, and raises afterwards.

    Returns:
        What all ranks sent [R, T, F], and (start, width) of their shards [R, 2] int64; both in rank order, on the
        payload's device.

    Raises:
        RuntimeError: the same on every rank: ranks differ in `call`, `checksums`, T, F or vocab_size; or their shards
            overlap or leave a hole; or another rank failed. On CUDA all of that shows as NaN in all of [R, T, F]
            instead, on every rank, unless TORCH_DISTRIBUTED_DEBUG=DETAIL: then the host reads the headers there too,
            waits for the GPU in every call, and raises.
            Also when the all-gather itself fails. Different T or F are different message sizes, which a backend may
            not survive: gloo ends the process of a rank that gets more than it expects, its peers get this error, and
            NCCL does not notice. TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch compare the sizes first, and every rank
            gets it.
    """
    T, F = payload.shape
    world = dist.get_world_size(group)
    call = {"tokens": T, "values a token": F, "vocab_size": shard.vocab_size, **call}
    failed = int(failure is not None)
    words = [failed, _signed(_piece(shard) + failed), shard.start, shard.width, *map(_to_word, call.values())]
    hashes = [value for value in checksums.values() if isinstance(value, Tensor)]  # one at most
    words += [value for value in checksums.values() if not isinstance(value, Tensor)]
    local = shard_ops.shard_message(payload, words, *(hashes or [None]))
    shards = payload.new_empty((world, *local.shape))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    try:
        all_gather(shards.view(-1, F), local, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: the all-gather of [T = {T}, {F}] statistics failed. Every rank of the group must make the call, "
            "with equally many tokens and the same outputs (moments, clamp). The backend says: " + str(error)
        ) from error
    n = len(words) + len(hashes)
    headers = shard_ops.headers_of(shards, n)
    if _host_may_read(payload):
        _raise_disagreement(op, headers.tolist(), call, checksums, shard.vocab_size, failure)
        parts = shards[:, local.shape[0] - T :]
    else:
        whole = _signed(_piece(Shard(0, shard.vocab_size, shard.vocab_size)))
        parts = shard_ops.accept_shards(shards, n, 4, whole)
    if failure is not None:
        raise failure
    return parts, headers[:, 2:4]


def _host_may_read(payload: Tensor) -> bool:
    """Whether the host looks at gathered values: on a GPU it would wait for them."""
    return payload.device.type == "cpu" or dist.get_debug_level() == dist.DebugLevel.DETAIL


def _raise_disagreement(
    op: str, headers: list[list[int]], call: dict, checksums: dict, vocab_size: int, failure: Exception | None
) -> None:
    """The errors of `gather`, but for `failure` itself."""
    for i, (name, value) in enumerate(call.items(), start=4):
        for rank, header in enumerate(headers):
            if header[i] != headers[0][i]:
                raise RuntimeError(
                    f"{op}: all ranks of the group must be called with the same {name}: rank 0 has "
                    f"{_from_word(headers[0][i], value)}, rank {rank} has {_from_word(header[i], value)}"
                ) from failure
    for i, name in enumerate(checksums, start=4 + len(call)):
        for rank, header in enumerate(headers):
            if header[i] != headers[0][i]:
                raise RuntimeError(
                    f"{op}: all ranks of the group must be called with the same {name}: the values on rank {rank} "
                    "are not those on rank 0"
                ) from failure
    _check_cover(op, [Shard(start, width, vocab_size) for _, _, start, width, *_ in headers])
    failed = [rank for rank, header in enumerate(headers) if header[0]]
    if failed and failure is None:
        raise RuntimeError(f"{op}: rank {failed[0]} of the group refused its arguments; its own error says why")


def _piece(shard: Shard) -> int:
    """A number for a shard's columns. Over shards that cover the vocabulary once the numbers add up to that of the
    whole, since ends and starts cancel; over others they do so with a chance of 2^-64."""
    return _mixed(shard.start + shard.columns) - _mixed(shard.start)


def _mixed(value: int) -> int:
    """A hash of 64 bits (splitmix64)."""
    mask = 2**64 - 1
    value = (value + 1) * 0x9E3779B97F4A7C15 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


def _signed(value: int) -> int:
    """As int64, which wraps around."""
    return (value + 2**63) % 2**64 - 2**63


def _to_word(value: float | int | str) -> int:
    """64 bits that are equal exactly when the values are."""
    if isinstance(value, str):
        value = value.encode("ascii")
        return int.from_bytes(value.ljust(8, b"\0"), "little", signed=True)
    return struct.unpack("<q", struct.pack("<d", value))[0] if isinstance(value, float) else int(value)


def _from_word(word: int, like: float | int | str) -> float | int | str:
    if isinstance(like, str):
        return word.to_bytes(8, "little", signed=True).rstrip(b"\0").decode("ascii", "replace")
    return struct.unpack("<d", struct.pack("<q", word))[0] if isinstance(like, float) else word


def _check_cover(op: str, layout: list[Shard]) -> None:
    """The shards' existing columns must cover [0, vocab_size) exactly once, in any order of ranks."""
    at = 0
    for rank, shard in sorted(enumerate(layout), key=lambda item: item[1].start):
        if shard.columns == 0:
            continue
        if shard.start != at:
            raise RuntimeError(
                f"{op}: the shards must cover the vocabulary exactly once; rank {rank} starts at {shard.start}, "
                + (f"leaving a hole from {at}" if shard.start > at else f"overlapping what ends at {at}")
            )
        at += shard.columns
    if at != layout[0].vocab_size:
        raise RuntimeError(
            f"{op}: the shards must cover the vocabulary exactly once; they end at {at}, vocab_size is "
            f"{layout[0].vocab_size}"
        )
