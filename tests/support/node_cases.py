"""What tests/megatron/test_node.py runs in several processes, which count as one node or as several.

A case gets its rank and the group of all ranks, and returns what the test compares. They import torch and
megatron_integration/node.py, no Megatron-Core.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import proportional_bytes
from megatron_integration.node import Node, PeerError, ranks_by_node

TOKENS = 4_000_000


@dataclass
class Tree:
    """A value as the loop shares them: tensors of all kinds inside of other things."""

    columns: dict[str, Any]
    again: torch.Tensor  # the same tensor as columns["float"]


class Late:
    """Makes the processes that do not lead wait before they get to the tensors after it."""

    def __reduce__(self):
        return wait, ()


def wait() -> None:
    time.sleep(0.2 * (os.environ["RANK"] != "0"))


def tree() -> Tree:
    number = torch.arange(12, dtype=torch.float32)
    columns = {
        "late": Late(),
        "float": number,
        "half": number.bfloat16(),
        "mask": number > 3,
        "transposed": number.view(3, 4).t(),
        "number": torch.tensor(7),
        "nothing": torch.empty(0, 5, dtype=torch.int32),
        "made by": os.getpid(),
        "words": ("a", None),
    }
    return Tree(columns, number)


def own_node(group: dist.ProcessGroup) -> Node:
    for ranks in ranks_by_node(group):
        made = dist.new_group(ranks, backend="gloo")
        if dist.get_rank() in ranks:
            return Node(made)


def equal_values(node: Node) -> tuple[int, bool]:
    """(the process that made the value, whether it is the value)."""
    got, want = node.once(tree), tree()
    same = got.again is got.columns["float"] and got.columns.keys() == want.columns.keys()
    for name, value in want.columns.items():
        if isinstance(value, torch.Tensor):
            own = got.columns[name]
            same &= torch.equal(own, value) and own.dtype == value.dtype and own.shape == value.shape
    return got.columns["made by"], same and got.columns["words"] == want.columns["words"]


def a_write_stays_in_its_process(node: Node) -> float:
    column = node.once(lambda: torch.zeros(3))
    column[1] = dist.get_rank() + 1
    dist.barrier()
    return float(column.sum())


def errors(node: Node) -> list[str]:
    """What the leader's error is in each process, and that the next call is as any other."""
    found = []
    for make in (lambda: 1 / 0, lambda: lambda: None, too_large):
        try:
            node.once(make)
        except (ZeroDivisionError, PeerError, MemoryError, AttributeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return [*found, node.once(lambda: "well")]


def too_large() -> torch.Tensor:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    return torch.zeros(1 << 20)


def memory(node: Node) -> tuple[float, float, int]:
    """Bytes a token that this process holds more after a column of 4 bytes was shared and read, and after it was
    dropped; and the files that it has open more."""
    files, before = len(os.listdir("/proc/self/fd")), proportional_bytes()
    column = node.once(lambda: torch.ones(TOKENS))
    assert column.sum() == TOKENS
    dist.barrier()
    during = proportional_bytes()
    dist.barrier()
    del column
    dist.barrier()
    return (
        (during - before) / TOKENS,
        (proportional_bytes() - before) / TOKENS,
        len(os.listdir("/proc/self/fd")) - files,
    )


def after_a_kill(node: Node) -> float:
    """The sum of a column whose maker was killed after the others had it."""
    column = node.once(lambda: torch.ones(TOKENS))
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return float(column.sum())


def worker(rank: int, world: int, nodes: int, port: int, cases: list[Callable], out) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GROUP_RANK"] = str(rank * nodes // world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    node = own_node(dist.group.WORLD)
    for case in cases:
        try:
            out.put((rank, case.__name__, case(node)))
        except BaseException:
            out.put((rank, case.__name__, traceback.format_exc()))
            raise


def run(world: int, nodes: int, *cases: Callable) -> dict[str, dict[int, Any]]:
    """What every rank found in every case. A process may be killed in the last one: its findings are missing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = context.Queue()
    processes = [context.Process(target=worker, args=(r, world, nodes, port, cases, out)) for r in range(world)]
    for process in processes:
        process.start()
    found: dict[str, dict[int, Any]] = {case.__name__: {} for case in cases}
    while any(process.is_alive() for process in processes) or not out.empty():
        if out.empty():
            time.sleep(0.01)
            continue
        rank, name, value = out.get()
        found[name][rank] = value
    for process in processes:
        process.join()
    return found
