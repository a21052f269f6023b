"""Who holds which columns of the vocabulary, and the all-gather that every sharded statistic goes through.

A shard's part of the statistics travels behind a header that says what the shard is and how its rank was called. So
ranks that were called differently, or one that cannot do its part, find out from the collective they have to enter
anyway (entcov/stats/ranks.py), where a plain gather would return numbers that are wrong on every rank alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import shard_ops
from entcov.stats import ranks

WORDS = 5  # of a header: start, piece and width of the shard, digest of the call, checksum


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
    if vocab_start is None:
        vocab_start = rank * width
        vocab_size = world * width if vocab_size is None else vocab_size
        if vocab_size > world * width:
            raise ValueError(
                f"vocab_size must be at most {world * width} (the columns of logits, {width}, on each of the {world} "
                f"ranks of the group), got {vocab_size}"
            )
    elif vocab_size is None:
        raise ValueError("vocab_size must be given with vocab_start: shards may be uneven, so it cannot be inferred")
    if not (0 <= vocab_start < 2**63 and 1 <= vocab_size < 2**63):
        raise ValueError(
            "vocab_start must be >= 0 and vocab_size >= 1, and both must fit 64 bits, got "
            f"{vocab_start} and {vocab_size}"
        )
    return Shard(vocab_start, width, vocab_size)


class Part(NamedTuple):
    """What one rank puts into `gather`."""

    payload: Tensor  # [T, F] fp32
    shard: Shard
    call: dict[str, Any]  # what every rank must be called with, by the argument's name
    checksums: dict[str, Tensor]  # the same for the values of tensors: `shard_ops.checksum` of each


def gather(
    op: str, group: dist.ProcessGroup, shape: tuple[int, int], device: torch.device, prepare: Callable[[], Part]
) -> tuple[Tensor, Tensor]:
    """All-gathers the payloads [T, F] of all ranks. One collective; on CUDA nothing waits for the GPU.

    Args:
        op: public name of the caller, for messages.
        shape, device: of the payload. Known before `prepare`, which may fail.
        prepare: makes this rank's part. If it raises, this rank enters the collective all the same, with zeros and a
            mark, so that the others do not wait for it, and raises afterwards.

    Returns:
        What all ranks sent [R, T, F], and (start, width) of their shards [R, 2] int64; both in rank order, on the
        payload's device.

    Raises:
        The exception of `prepare`.
        RuntimeError: on every rank but those whose `prepare` raised: it raised on another one, which the error names
            with its message; ranks differ in `call`, the checksums, T, F or vocab_size; or their shards overlap or
            leave a hole. On CUDA all of that shows as NaN in all of [R, T, F] instead, on every rank, unless
            TORCH_DISTRIBUTED_DEBUG=DETAIL: then the host reads the headers there too, waits for the GPU in every call,
            and raises.
            Also when the all-gather itself fails. Different T or F are different message sizes, which a backend may
            not survive: gloo ends the process of a rank that gets more than it expects, its peers get this error, and
            NCCL does not notice. TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch compare the sizes first, and every rank
            gets it.
    """
    T, F = shape
    world = dist.get_world_size(group)
    ranks.check_member(group)
    failure, vocab_size, call, checksums = None, 1, {}, {}
    try:
        payload, shard, call, checksums = prepare()
        vocab_size = shard.vocab_size
        call = {"tokens": T, "values a token": F, "vocab_size": vocab_size, **call}
        words = [shard.start, _signed(_piece(shard)), shard.width, ranks.digest(op, call)]
        hashes = list(checksums.values())
        combined = shard_ops.checksum(torch.stack(hashes)) if len(hashes) > 1 else next(iter(hashes), None)
        local = shard_ops.shard_message(payload, words if hashes else [*words, 0], combined)
    except Exception as error:  # perhaps of this rank alone: the others must hear of it
        failure = error
        local = shard_ops.shard_message(torch.zeros(shape, dtype=torch.float32, device=device), [0] * WORDS, None)
    shards = local.new_empty((world, *local.shape))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    try:
        all_gather(shards.view(-1, F), local, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: the all-gather of [T = {T}, {F}] statistics failed. Every rank of the group must make the call, "
            "with equally many tokens and the same outputs (moments, clamp). The backend says: " + str(error)
        ) from (failure or error)
    headers = shard_ops.headers_of(shards, WORDS)
    if ranks.host_may_read(device):
        seen = headers.tolist()
        if any(header[3:] != seen[0][3:] or header[3] == 0 for header in seen):
            ranks.raise_together(op, group, failure, call, {name: int(x) for name, x in checksums.items()})
        _check_cover(op, [Shard(start, width, vocab_size) for start, _, width, *_ in seen])
        return shards[:, local.shape[0] - T :], headers[:, 0:3:2]
    if failure is not None:
        raise failure
    whole = _signed(_piece(Shard(0, vocab_size, vocab_size)))
    return shard_ops.accept_shards(shards, WORDS, 3, whole), headers[:, 0:3:2]


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
