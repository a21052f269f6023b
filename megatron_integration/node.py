"""The processes of one node, and values that exist once among them.

One process makes the value. It writes each tensor into a file in memory (memfd_create), and what is left of the value
into another; the others open these files by way of /proc, and all of them map the tensors. The files have no names, and
no place in /dev/shm, whose size does not matter: the kernel frees each with the last tensor that is mapped on it,
however the processes end. Mappings are copy-on-write, so that no process can change what the others see.
"""

import io
import math
import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank has failed; the message has its error."""


def from_first(make: Callable[[], T], group: dist.ProcessGroup) -> T:
    """`make()` of the group's first rank, on all its ranks. Collective; an error there is a PeerError on the others."""
    outcome: list[Any] = [None, None]  # the value, and what the error says
    failure: Exception | None = None
    first = dist.get_process_group_ranks(group)[0]
    if dist.get_rank() == first:
        try:
            outcome[0] = make()
        except Exception as error:
            failure, outcome[1] = error, str(error)
    dist.broadcast_object_list(outcome, src=first, group=group)
    if outcome[1] is not None:
        raise failure or PeerError(f"rank {first}: {outcome[1]}")
    return outcome[0]


def ranks_by_node(group: dist.ProcessGroup) -> list[list[int]]:
    """All ranks. Those of a node can map each other's memory, and torchrun has not started them as several nodes.

    Collective; `group` has all ranks.
    """
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text()
    place = kernel, os.readlink("/proc/self/ns/pid"), os.environ.get("GROUP_RANK")
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place, group=group)
    return [[rank for rank, own in enumerate(places) if own == one] for one in dict.fromkeys(places)]


@dataclass(frozen=True)
class Node:
    """The processes of this one's node; the first rank leads."""

    group: dist.ProcessGroup  # gloo

    @property
    def leads(self) -> bool:
        return dist.get_rank(self.group) == 0

    def once(self, make: Callable[[], T]) -> T:
        """`make()` of the leader, in all processes of the node, with every tensor in memory that they share.

        It may be written to, as any value: a process that does so gets the pages that it writes for itself.

        Args:
            make: returns a value that pickles, with tensors on the host, without gradient. Calls no collective.
        Collectives: a broadcast of some words and a barrier in the node.
        Raises: what `make` raises, in the leader; PeerError with its message in the others. MemoryError and PeerError:
            the node has no memory for a tensor.
        """
        with ExitStack() as files:
            place = from_first(lambda: _write(make(), files), self.group)
            value = _Reader(*place).load()
            dist.barrier(group=self.group)  # until all have mapped the files, they stay open
        return value


def _write(value: Any, files: ExitStack) -> tuple[int, int]:
    """Where the node's processes find the value until `files` ends: process id and descriptor."""
    rest = io.BytesIO()
    _Writer(rest, files).dump(value)
    return os.getpid(), _in_memory(rest.getbuffer(), files)


def _in_memory(content: memoryview | np.ndarray, files: ExitStack) -> int:
    """The descriptor of a file with this content, which `files` closes."""
    descriptor = os.memfd_create("entcov")
    files.callback(os.close, descriptor)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except OSError as error:
        raise MemoryError(f"the node has no memory for {content.nbytes} bytes to share: {error}") from error
    return descriptor


class _Writer(pickle.Pickler):
    """Pickles a value, and in place of its tensors what `_Reader` needs to map them."""

    def __init__(self, out: io.BytesIO, files: ExitStack):
        super().__init__(out, protocol=pickle.HIGHEST_PROTOCOL)
        self.files, self.known = files, {}

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(value, Tensor) or not value.numel():  # nothing cannot be mapped
            return None
        if value not in self.known:
            content = value.contiguous().flatten().view(torch.uint8).numpy()
            self.known[value] = _in_memory(content, self.files), value.dtype, tuple(value.shape)
        return self.known[value]


class _Reader(pickle.Unpickler):
    """Of what a `_Writer` of that process wrote."""

    def __init__(self, process: int, descriptor: int):
        self.folder, self.known = f"/proc/{process}/fd", {}
        super().__init__(io.BytesIO(Path(self.folder, str(descriptor)).read_bytes()))

    def persistent_load(self, stored: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        descriptor, dtype, shape = stored
        if descriptor not in self.known:
            size, path = math.prod(shape), f"{self.folder}/{descriptor}"
            self.known[descriptor] = torch.from_file(path, shared=False, size=size, dtype=dtype).view(shape)
        return self.known[descriptor]
