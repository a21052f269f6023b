"""Shard: the column range of a rank in the vocabulary. gather: the all-gather of every sharded statistic.

A rank sends its statistics and a signature: its column range, and a hash of the arguments it was called with. So ranks
that were called differently, and ranks that failed, are detected in the same collective (entcov/stats/ranks.py). A
plain all-gather would return wrong numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments
from entcov.ops.core import SIGNATURE
from entcov.ops.message import hash_values, message, signatures
from entcov.stats import ranks


@dataclass(frozen=True)
class Shard:
    """The column range of one rank: `width` columns, of which the first `columns` are not padding."""

    start: int  # global token id of column 0
    width: int
    vocab_size: int  # of the whole row

    @property
    def columns(self) -> int:
        return min(max(self.vocab_size - self.start, 0), self.width)


def resolve_shard(width: int, group, vocab_start: int | None, vocab_size: int | None) -> Shard:
    """Fills in the defaults of `vocab_start` and `vocab_size` (see `token_stats`). ValueError for impossible values."""
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
    if not (0 <= vocab_start < 2**31 and 1 <= vocab_size < 2**31):
        raise ValueError(
            "vocab_start must be >= 0 and vocab_size >= 1, and both must be below 2^31, got "
            f"{vocab_start} and {vocab_size}"
        )
    return Shard(vocab_start, width, vocab_size)


def check_local(**tensors: Tensor | None) -> None:
    """TypeError for a DTensor: the statistics take this rank's part of it and the group that it is divided over."""
    arguments.local(
        "the columns of this rank, with group=, vocab_start= and vocab_size=, which "
        "entcov.integrations.dtensor.vocab_shard gives; what all ranks have whole needs no group",
        **tensors,
    )


class Partial(NamedTuple):
    """The contribution of one rank to `gather`."""

    payload: Tensor  # [T, width] fp32
    shard: Shard
    call: dict[str, Any]  # the arguments that must be equal on all ranks, by name
    values: dict[str, Tensor]  # [n] int64 each: tensors that must be equal on all ranks, by name


def gather(
    op: str, group: dist.ProcessGroup, shape: tuple[int, int], device: torch.device, prepare: Callable[[], Partial]
) -> Tensor:
    """All-gathers the messages of all ranks: payloads [T, width] with signatures. One collective.

    On CUDA the host does not wait.

    Args:
        op: public name of the caller, for messages.
        shape, device: of the payload. They are known before `prepare` runs, which may fail.
        prepare: computes this rank's partial. If it raises, this rank still enters the collective, with zeros, so that
            the others do not wait for it, and raises afterwards.

    Returns:
        [R, T * width + 4] fp32 in the order of the ranks (`entcov.ops.message`).

    Raises:
        The exception of `prepare`, on the ranks where it raised.
        RuntimeError: on all other ranks, if `prepare` raised on a rank (the error names it and its message), if ranks
            differ in `call`, `values`, T, width or vocab_size, or if shards overlap or leave a hole. On CUDA there is
            no such error: the merge of the messages returns NaN on every rank. With TORCH_DISTRIBUTED_DEBUG=DETAIL the
            host waits for the GPU in every call, reads the signatures, and raises.
        RuntimeError: the all-gather failed. If T or width differ, so do the sizes of the messages, which backends
            handle badly: gloo ends the process of a rank that receives too much, its peers get this error, and NCCL
            does not notice. With TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares the sizes first, and every rank gets
            this error.
    """
    T, width = shape
    ranks.check_member(group)
    failure, vocab_size, call, values = None, 1, {}, {}
    try:
        payload, shard, call, values = prepare()
        vocab_size = shard.vocab_size
        call = {"tokens": T, "values a token": width, "vocab_size": vocab_size, **call}
        alike = torch.cat(list(values.values())) if len(values) > 1 else next(iter(values.values()), None)
        local = message(payload, alike, ranks.digest(op, call), shard.start if shard.columns else 0, shard.columns)
    except Exception as error:  # other ranks may have succeeded and wait in the all-gather
        failure = error
        local = torch.zeros(T * width + SIGNATURE, dtype=torch.float32, device=device)
    messages = local.new_empty((dist.get_world_size(group), len(local)))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    try:
        all_gather(messages.view(-1), local, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: the all-gather of [T = {T}, {width}] statistics failed. Every rank of the group must make the call"
            ", with equally many tokens and the same outputs (moments, clamp). The backend says: " + str(error)
        ) from (failure or error)
    if ranks.host_may_read(device):
        seen = signatures(messages).tolist()
        if any(word != seen[0][0] or word == 0 for word, _ in seen):
            ranks.raise_together(op, group, failure, call, {name: int(hash_values(x)) for name, x in values.items()})
        _check_cover(op, [(place & 0xFFFFFFFF, place >> 32) for _, place in seen], vocab_size)
    elif failure is not None:
        raise failure
    return messages


def _check_cover(op: str, layout: list[tuple[int, int]], vocab_size: int) -> None:
    """RuntimeError unless the shards (start, columns) of all ranks cover [0, vocab_size) exactly once, in any order."""
    at = 0
    for rank, (start, columns) in sorted(enumerate(layout), key=lambda item: item[1]):
        if columns == 0:
            continue
        if start != at:
            raise RuntimeError(
                f"{op}: the shards must cover the vocabulary exactly once; rank {rank} starts at {start}, "
                + (f"leaving a hole from {at}" if start > at else f"overlapping what ends at {at}")
            )
        at += columns
    if at != vocab_size:
        raise RuntimeError(
            f"{op}: the shards must cover the vocabulary exactly once; they end at {at}, vocab_size is {vocab_size}"
        )
