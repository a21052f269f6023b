"""Processes for the Megatron tests: cases in sequence, on layouts made and taken down again.

They come from a fork server that has imported this file, so that the imports (ten seconds) are paid once.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import socket
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_integration.process_groups import start_processes
from tests.support import (
    megatron_cases,
    megatron_prime,
    megatron_rl_cases,
    megatron_state_cases,
    nemo_rl_workers,
    slime_cases,
)
from tests.support.fused_adam import in_megatron

TASKS = {
    "parity": megatron_cases.parity,
    "refuses": megatron_cases.refuses,
    "adaptors": megatron_cases.adaptors,
    "prime": megatron_prime.prime,
    "resharding": megatron_state_cases.resharding,
    "wrong_load": megatron_state_cases.wrong_load,
    "export": megatron_state_cases.export,
    "rollouts": megatron_state_cases.rollouts,
    "agreement": megatron_state_cases.agreement,
    "slime": slime_cases.slime,
    "megatron_rl": megatron_rl_cases.megatron_rl,
    "nemo_rl": nemo_rl_workers.workers,
}


def worker(rank: int, world: int, port: int, folder: str, cases: list[dict[str, Any]], out) -> None:
    """One process: every case in turn; puts (rank, case number, what went wrong or None)."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    gc.freeze()  # the checkpoint code collects garbage often, and the imports alone are a million objects
    start_processes("cpu")
    for number, case in enumerate(cases):
        os.environ["GROUP_RANK"] = str(rank * case.get("nodes", 1) // world)
        try:
            with in_megatron() if case.get("fused_adam") else nullcontext():
                problem = TASKS[case.get("task", "parity")](Path(folder), case)
        except BaseException:
            out.put((rank, number, traceback.format_exc()))
            raise
        out.put((rank, number, problem))
    dist.destroy_process_group()


def run_cases(world: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, str]:
    """Starts `world` processes that run the cases, and returns what went wrong, by case."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = context.Queue()
    workers = [context.Process(target=worker, args=(r, world, port, str(folder), cases, out)) for r in range(world)]
    for process in workers:
        process.start()
    waiting = {(rank, number) for rank in range(world) for number in range(len(cases))}
    problems: dict[str, str] = {}
    while waiting:
        try:
            rank, number, problem = out.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in workers):  # one died, and the others wait for it
                break
            continue
        waiting.discard((rank, number))
        if problem is not None:
            problems[f"{cases[number]}, rank {rank}"] = problem
            if "Traceback" in problem:
                break
    for process in workers:
        if waiting:
            process.kill()
        process.join()
    if waiting and not problems:
        problems["exit codes"] = str([process.exitcode for process in workers])
    return problems
