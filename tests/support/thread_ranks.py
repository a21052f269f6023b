"""Ranks as threads of one process: sharded calls without process groups, thousands of cases a second.

Only what the given modules use of torch.distributed is replaced, by default entcov.stats.shards and entcov.stats.ranks;
stats/test_vocab_parallel.py, objective/test_selection_splits.py and integrations/ run the same code over gloo.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor

from entcov.stats import ranks, shards


class ThreadRanks:
    """A `group` of `world` threads. Counts the collectives and the bytes that each rank sends."""

    def __init__(self, world: int, monkeypatch, modules: tuple[ModuleType, ...] = (shards, ranks)):
        self.world, self.collectives, self.bytes_sent = world, 0, 0
        self.largest = 0  # bytes of a broadcast
        self._rank, self._slots = threading.local(), [None] * world
        self._barrier = threading.Barrier(world)
        for module in modules:
            monkeypatch.setattr(module, "dist", self)

    def get_rank(self, group) -> int:
        return self._rank.value

    def get_world_size(self, group) -> int:
        return self.world

    DebugLevel = torch.distributed.DebugLevel

    def get_debug_level(self) -> torch.distributed.DebugLevel:
        return self.DebugLevel.OFF

    def all_gather_single(self, output: Tensor, tensor: Tensor, group) -> None:
        rank = self._rank.value
        self._slots[rank] = tensor.clone()
        self._barrier.wait(timeout=60)
        if len({x.shape for x in self._slots}) > 1:
            raise RuntimeError("sizes differ")
        output.copy_(torch.cat(self._slots))
        self._barrier.wait(timeout=60)
        if rank == 0:
            self.collectives += 1
            self.bytes_sent += tensor.nbytes

    def all_gather(self, outputs: list[Tensor], tensor: Tensor, group) -> None:
        joined = torch.empty(self.world * len(tensor), *tensor.shape[1:], dtype=tensor.dtype)
        self.all_gather_single(joined, tensor, group)
        for output, part in zip(outputs, joined.chunk(self.world), strict=True):
            output.copy_(part)

    def all_reduce(self, tensor: Tensor, group) -> None:
        self._slots[self._rank.value] = tensor.clone()
        self._barrier.wait(timeout=60)
        if len({x.shape for x in self._slots}) > 1:
            raise RuntimeError("sizes differ")
        tensor.copy_(torch.stack(self._slots).sum(0))
        self._barrier.wait(timeout=60)
        if self._rank.value == 0:
            self.collectives += 1
            self.bytes_sent += tensor.nbytes

    def get_process_group_ranks(self, group) -> list[int]:
        return [*range(self.world)]

    def broadcast(self, tensor: Tensor, src: int, group) -> None:
        self._slots[self._rank.value] = tensor.clone()
        self._barrier.wait(timeout=60)
        if len({x.shape for x in self._slots}) > 1:
            raise RuntimeError("sizes differ")
        tensor.copy_(self._slots[src])
        self._barrier.wait(timeout=60)
        if self._rank.value == 0:
            self.collectives += 1
            self.largest = max(self.largest, tensor.nbytes)

    def all_gather_object(self, output: list, value: object, group) -> None:
        self._slots[self._rank.value] = value
        self._barrier.wait(timeout=60)
        output[:] = self._slots
        self._barrier.wait(timeout=60)
        if self._rank.value == 0:
            self.collectives += 1

    def run(self, call: Callable[[int], object]) -> list:
        """[call(rank) for each rank], at the same time. An exception of one rank is raised here."""

        def one(rank):
            self._rank.value = rank
            try:
                return call(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.world)]
        errors = [f.exception() for f in futures if f.exception() is not None]
        if errors:  # the first cause, not the broken barrier it left to the others
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [f.result() for f in futures]
