"""The host's way from rollouts to micro-batches: time and memory, and how they grow with the number of responses.

The data are the tokens (int32) and log-probabilities (float32) of all responses, 8 bytes a token. Memory is the growth
of the resident high-water mark during a call, the result included, in a process of its own for each size.

`--processes N` measures the batch of the last size in N processes of a node instead: made in every process, and made
once and mapped by the others (megatron_integration/node.py).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import measure
from entcov.rl.batch import Batch, micro_batches, mini_batches, pack
from entcov.rl.collect import pack_rollouts, unpack_rollouts
from entcov.rl.types import Example, Prompt, Rollout
from megatron_integration.node import Node

GROUP, PROMPT, UPDATES = 8, 256, 8  # responses and tokens of a prompt, mini-batches of a rollout batch
MICRO_BATCH = 16384  # tokens, or those of the longest sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--responses", type=int, nargs="+", default=[1000, 3162, 10_000, 31_623, 100_000])
    parser.add_argument("--mean", type=int, default=256, help="tokens of a response on average")
    parser.add_argument("--processes", type=int, help="of a node")
    parser.add_argument("--memory-of", action="store_true", help=argparse.SUPPRESS)
    measure.add_arguments(parser, repeats=5)


def run(args: argparse.Namespace) -> int:
    measure.set_threads(args.threads)
    if args.memory_of:
        print(json.dumps({name: measure.peak_resident_bytes(call) for name, call in calls(*data(args)).items()}))
        return 0
    if args.processes:
        return in_processes(args)
    rows = [row for count in args.responses for row in measured(count, args)]
    growth = {
        name: grown([row for row in rows if row["name"] == name]) for name in dict.fromkeys(r["name"] for r in rows)
    }
    about = measure.machine()
    print(f"{about['cpu']}, torch {about['torch']}; responses of {args.mean} tokens on average, prompts of {PROMPT}")
    measure.print_table(
        ["", "responses", "data MB", "ms", "MB", "x data"],
        [
            [row["name"], f"{row['responses']:,}", f"{row['data'] / 1e6:.1f}", f"{1e3 * row['seconds']:.1f}",
             f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / row['data']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip
    if len(args.responses) > 1:
        print("\ngrowth with the number of responses n: the exponent e of c n^e, by least squares")
        table = [[name, f"{found['seconds']:.2f}", f"{found['bytes']:.2f}"] for name, found in growth.items()]
        measure.print_table(["", "time", "memory"], table)
    measure.keep({"machine": about, "rows": rows, "growth": growth}, args.json)
    return 0


def data(args: argparse.Namespace) -> tuple[list[Rollout], Batch]:
    """Rollouts of `args.responses[0]` responses, and their batch with the columns that it has when it is divided."""
    rollouts = drawn(args.responses[0], args.mean)
    return rollouts, scored(pack(rollouts))


def drawn(count: int, mean: int) -> list[Rollout]:
    """Responses of half to one and a half times `mean` tokens."""
    rng = np.random.default_rng(0)
    example = Example("benchmark", (), "")
    prompts = [
        Prompt(uid, example, tuple(rng.integers(0, 150_000, PROMPT).tolist())) for uid in range(-(-count // GROUP))
    ]
    return [
        Rollout(
            prompts[i // GROUP], i % GROUP, rng.integers(0, 150_000, n, dtype=np.int32),
            -rng.random(n, dtype=np.float32), True, 0, reward=0.0,
        )
        for i, n in enumerate(rng.integers(mean - mean // 2, mean + mean // 2 + 1, count))
    ]  # fmt: skip


def scored(batch: Batch) -> Batch:
    batch.old_logprob = batch.rollout_logprob.clone()
    batch.entropy = -batch.rollout_logprob
    return batch


def calls(rollouts: Sequence[Rollout], batch: Batch) -> dict[str, Callable[[], object]]:
    """What a step does on the host. Parts of a batch are made one by one, as the updates take them."""

    def mini() -> None:
        for part in mini_batches(batch.responses.group.tolist(), UPDATES):
            batch.subset(part)

    def micro() -> None:
        for part in micro_batches(batch.lengths, max(MICRO_BATCH, *batch.lengths), False, batch.temperatures):
            batch.subset(part)
            batch.positions(part)

    prompts = {rollout.prompt.uid: rollout.prompt for rollout in rollouts}
    return {
        "pack": lambda: pack(rollouts),
        "mini-batches": mini,
        "micro-batches": micro,
        "response means": lambda: batch.response_means(batch.entropy),
        "to arrays and back": lambda: unpack_rollouts(pack_rollouts(rollouts), prompts),
    }


def measured(count: int, args: argparse.Namespace) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks", "batch", "--memory-of", "--responses", str(count)]
    command += ["--mean", str(args.mean), "--threads", str(torch.get_num_threads())]
    # Every larger block has pages of its own, so that none hides in what an earlier call has freed.
    own_pages = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=own_pages)
    if done.returncode:
        raise RuntimeError(f"the memory measurement failed: {done.stderr[-2000:]}")
    held = json.loads(done.stdout.splitlines()[-1])
    rollouts = drawn(count, args.mean)
    size = sum(r.tokens.nbytes + r.logprob.nbytes for r in rollouts)
    work = calls(rollouts, scored(pack(rollouts)))
    seconds = measure.interleaved_seconds(work, args.repeats, time.process_time)
    return [
        {"name": name, "responses": count, "data": size, "seconds": min(seconds[name]), "bytes": held[name]}
        for name in work
    ]


def grown(rows: Sequence[dict]) -> dict[str, float]:
    """The exponent of time and memory in the number of responses; NaN for one number."""
    x = np.log([row["responses"] for row in rows])
    if len(set(x)) < 2:
        return {"seconds": math.nan, "bytes": math.nan}
    floor = {"seconds": 1e-6, "bytes": 4096}  # below them nothing was seen
    return {
        name: float(np.polyfit(x, np.log([max(row[name], least) for row in rows]), 1)[0])
        for name, least in floor.items()
    }


def in_processes(args: argparse.Namespace) -> int:
    count = args.responses[-1]
    with tempfile.TemporaryDirectory() as folder:
        found = os.path.join(folder, "found.json")
        torch.multiprocessing.spawn(_process, (args.processes, folder, found, count, args.mean), args.processes)
        rows = json.loads(open(found).read())
    about = measure.machine()
    print(f"{about['cpu']}, torch {about['torch']}; {count:,} responses in {args.processes} processes of a node")
    table = [[row["name"], *(f"{row[key]:.1f}" for key in ("ms", "MB", "bytes a token"))] for row in rows]
    measure.print_table(["packed batch, scored", "ms", "MB on the node", "bytes a token"], table)
    measure.keep({"machine": about, "processes": args.processes, "responses": count, "rows": rows}, args.json)
    return 0


def _process(rank: int, processes: int, folder: str, found: str, count: int, mean: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    rollouts, node, rows = drawn(count, mean), Node(dist.group.WORLD), []
    for name, shared in (("in every process", False), ("once a node", True)):
        before, start = measure.proportional_bytes(), time.perf_counter()
        batch = node.once(lambda: scored(pack(rollouts))) if shared else scored(pack(rollouts))
        tokens = len(batch.tokens)
        for column in vars(batch).values():
            if isinstance(column, torch.Tensor):
                column.sum()  # a page that nobody reads is not mapped
        dist.barrier()
        seconds = time.perf_counter() - start
        held = torch.tensor(measure.proportional_bytes() - before)
        dist.all_reduce(held)
        rows.append({"name": name, "ms": 1e3 * seconds, "MB": int(held) / 1e6, "bytes a token": int(held) / tokens})
        del batch, column
        dist.barrier()
    if rank == 0:
        open(found, "w").write(json.dumps(rows))
    dist.destroy_process_group()
