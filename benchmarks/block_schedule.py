"""What rows that are skipped cost: a model of an H100's block scheduler, no GPU. Nothing here is measured.

A row that is ignored is no work, but its blocks are launched all the same: each reads the row's target, writes zeros
and ends. The alternative is a list of the rows that count. Its length is known on the GPU alone, and a launch needs a
number of blocks, so short of waiting for the GPU the blocks beyond the list's end are launched too; only their place
changes. The table compares both with a list whose length the host knows.

The model: every multiprocessor runs 4 blocks at a time. A block takes START before its loads arrive and then shares the
memory's bandwidth with all others, up to what its own 16 KB under way allow; a block of a skipped row takes SKIP.
Blocks start in their order as places become free.
"""

import argparse
import heapq
import math
import random
from collections.abc import Sequence

from benchmarks.measure import print_table
from benchmarks.static_evidence import SPECS

H100 = SPECS["sm_90"]
PLACES = 4 * H100.sms  # blocks at a time
BYTES_PER_US = 0.92 * H100.tb_per_s * 1e6  # of the memory; 92 % is what the best kernels reach
LATENCY = 0.7  # us of a load from memory
LONE_BLOCK = 16384 / LATENCY  # bytes a us that one block can draw
START, SKIP = 0.5, 0.8  # us; assumed, in the range of what launches and dependent loads take
SEGMENT = 40960  # columns; csrc/cuda/launch.h
T = 8192


def microseconds(blocks: Sequence[bool], bytes_of_one: float) -> float:
    """How long it takes to run these blocks in their order. True: reads `bytes_of_one`; False: skips."""
    now = drawn = 0.0  # drawn: bytes that every reading block has had since the beginning
    waiting: list[tuple[float, bool]] = []  # (when it is over, whether reading begins then)
    reading: list[float] = []  # what `drawn` is when a block has all its bytes
    places, position = PLACES, 0
    while position < len(blocks) or waiting or reading:
        while places and position < len(blocks):
            works = blocks[position]
            heapq.heappush(waiting, (now + (START if works else SKIP), works))
            places, position = places - 1, position + 1
        rate = min(LONE_BLOCK, BYTES_PER_US / len(reading)) if reading else 0.0
        done = now + (reading[0] - drawn) / rate if reading else math.inf
        next_one = waiting[0][0] if waiting else math.inf
        drawn += rate * (min(done, next_one) - now)
        now = min(done, next_one)
        if next_one <= done:
            if heapq.heappop(waiting)[1]:
                heapq.heappush(reading, drawn + bytes_of_one)
            else:
                places += 1
        else:
            heapq.heappop(reading)
            places += 1
    return now


def masks(share: float) -> dict[str, list[bool]]:
    """Rows that count, with this share skipped: prompts before their responses, all in front, or anywhere."""
    skipped = round(2048 * share)
    anywhere = [False] * round(T * share) + [True] * (T - round(T * share))
    random.Random(0).shuffle(anywhere)
    return {
        "prompts of sequences of 2,048": ([False] * skipped + [True] * (2048 - skipped)) * (T // 2048),
        "one run in front": [False] * round(T * share) + [True] * (T - round(T * share)),
        "anywhere": anywhere,
    }


def compare(rows: list[bool], columns: int, size: int = 2) -> dict[str, float]:
    """Times in us of the blocks of these rows: as they are, those that skip last, and without them."""
    segments = -(-columns // SEGMENT)
    each = columns * size / segments
    blocks = [works for works in rows for _ in range(segments)]
    work = [True] * sum(blocks)
    return {
        "mask": microseconds(blocks, each),
        "list made on the GPU": microseconds(work + [False] * (len(blocks) - len(work)), each),
        "list of known length": microseconds(work, each),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--columns", type=int, nargs="+", default=[19008, 38016, 152064], help="of a row, bf16")


def run(args: argparse.Namespace) -> int:
    print(f"model of an H100 (nothing is measured), {T} rows, bf16; us, and against a list of known length")
    table = []
    for columns in args.columns:
        for share in (0.15, 0.5, 0.9):
            for name, rows in masks(share).items():
                found = compare(rows, columns)
                best = found["list of known length"]
                cells = [f"{us:.0f}  {100 * (us / best - 1):+.0f} %" for us in list(found.values())[:2]]
                table.append([f"{columns:,}", f"{share:.0%}", name, *cells, f"{best:.0f}"])
    print_table(["columns", "skipped", "where", "mask", "list made on the GPU", "list of known length"], table)
    return 0
