"""What share of the memory's bandwidth a kernel would reach, by simulating multiprocessors event by event: no GPU.

A model, not a measurement. It answers what a change of a kernel's design (blocks a multiprocessor, vectors a thread,
tiles asked for ahead) does to the time that the memory waits for the kernel, which counting instructions does not show.

Every warp is a Python generator that follows its kernel: it asks for bytes and waits for them, works, meets barriers.
Four schedulers a multiprocessor issue the work of a tile, whose cost is that of the compiled hot loop
(static_evidence). The memory answers in order, at its rate, after its latency; blocks take the place of those that have
ended. The number of rows is that of a micro-batch of 8,192 tokens, so waves of blocks and the last of them count.

How far multiprocessors share the memory decides much. "alone": each has its own share of the bandwidth, and what it
does not use is lost, as if all were idle at the same moment. "shared": 8 of them, each with the others' idle time to
use, as if their phases were independent. The truth lies between. Latencies of an idle memory are published; that of a
loaded one is higher, and the two columns of a case are for both.
"""

import argparse
import heapq
import math
import random
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import cuda_toolchain, sass, static_evidence
from benchmarks.cuda_toolchain import ROOT
from benchmarks.measure import print_table

ROWS = 8192
SHARED = 8  # multiprocessors in the case "shared"
ATTAINABLE = 0.94  # of the data sheet's bandwidth: 3.16 of 3.35 TB/s, published for QuACK's cross-entropy on an H100

# Cycles. Luo et al., arXiv 2402.13499, measure by pointer chasing: memory 466 (A100) and 479 (H100 PCIe), L2 262 and
# 263, shared memory 29. No table for B200 was found; it has the H100's. A loaded memory: 0.5 us, the order of magnitude
# that is usually given for HBM near its full bandwidth.
MEMORY = {"sm_80": 466, "sm_90": 479, "sm_100": 479}
LOADED_NS = 480
L2 = 263
SHARED_MEMORY = 29
ARITHMETIC = 4  # of a dependent instruction: CUDA programming guide, compute capability 7.0 and later
# Assumed, no published figure was found: a shuffle and a barrier take as long as a load from shared memory; a free
# place of a block is taken again after 300 cycles; what depends on the last load of a tile takes 100 cycles more than
# the slots for its instructions.
SHUFFLE = BARRIER = SHARED_MEMORY
LAUNCH = 300
CHAIN = 100
PORT = 64  # bytes a cycle from L2 into one multiprocessor: NVIDIA's A100 and H100 white papers
REDUCE = 5 * (SHUFFLE + ARITHMETIC)  # a value over a warp
TEAM_MAX = REDUCE + SHARED_MEMORY + REDUCE  # without the barrier between: Team::max of device/block_reduction.cuh
TEAM_SUM = REDUCE + SHARED_MEMORY + 7 * ARITHMETIC


@dataclass(frozen=True)
class Design:
    """How a kernel goes over a segment of a row. The defaults are those of csrc/cuda/launch.h."""

    threads: int = 256
    blocks: int = 4  # resident on a multiprocessor
    vectors: int = 4  # of 16 bytes, asked for by a thread at once: a tile
    ahead: int = 0  # tiles asked for before the tile in work is done
    group: int = 4  # vectors that are worked on together; a tile's groups behind the segment's end are left out
    early: bool = False  # whether the first tile is asked for before the target has arrived
    segment: int = 40960  # columns at most
    ignored: float = 0.0  # share of the rows whose target is ignore_index

    @property
    def warps(self) -> int:
        return self.threads // 32

    def worked_on(self, tile: list[int]) -> int:
        """Vectors of a tile that every thread works on, those behind the row's end included that share a group."""
        return min(-(-sum(tile) // (16 * self.threads * self.group)) * self.group, self.vectors)

    def tiles(self, columns: int, size: int) -> Iterator[list[list[int]]]:
        """For each segment of a row, for each tile, the bytes that each warp asks for."""
        segments = -(-columns // self.segment)
        length = (-(-columns // segments) + 127) // 128 * 128
        for begin in range(0, columns, length):
            vectors = -(-(min(length, columns - begin) * size) // 16)
            yield [
                [
                    sum(16 * min(max(vectors - tile - k * self.threads - 32 * w, 0), 32) for k in range(self.vectors))
                    for w in range(self.warps)
                ]
                for tile in range(0, vectors, self.vectors * self.threads)
            ]


@dataclass(frozen=True)
class Cost:
    """Of a warp, in cycles of its scheduler: before the hot loop, for one vector of 16 bytes a thread, after it."""

    before: float
    vector: float
    after: float


# What a warp asks of the machine: ("until", time), ("work", cycles of the scheduler) or ("barrier",).
Steps = Generator[tuple, float, None]


@dataclass
class Block:
    sm: int
    warps: int
    waiting: list = field(default_factory=list)
    ended: int = 0


class Machine:
    """`sms` multiprocessors that share `sms` shares of the memory. rate: bytes a cycle and multiprocessor."""

    def __init__(self, sms: int, rate: float, latency: float, seed: int = 0):
        self.sms, self.rate, self.latency = sms, rate, latency
        self.now, self.bytes = 0.0, 0
        self._memory, self._port = 0.0, [0.0] * sms
        self._scheduler = [[0.0] * 4 for _ in range(sms)]
        self._events: list = []
        self._count = 0
        self._random = random.Random(seed)

    def load(self, sm: int, size: int, latency: float | None = None) -> float:
        """Asks for bytes now and returns when they arrive. latency: of the L2 for what lies there, which takes no
        bandwidth of the memory."""
        self._port[sm] = max(self._port[sm], self.now) + size / PORT
        if latency is not None:
            return self._port[sm] + latency
        self.bytes += size
        self._memory = max(self._memory, self.now) + size / (self.rate * self.sms)
        # Banks, refreshes and the distance to a slice of the L2 differ by request.
        return max(self._memory, self._port[sm]) + self.latency * self._random.uniform(0.85, 1.15)

    def store(self, sm: int, size: int) -> None:
        """Writes bytes; nobody waits for them."""
        self.bytes += size
        self._memory = max(self._memory, self.now) + size / (self.rate * self.sms)

    def run(self, blocks: int, resident: int, warps: int, steps: Callable[[Block, int, int], Steps]) -> float:
        """Runs `blocks` blocks, `resident` on a multiprocessor at a time; returns the cycles until the last has ended.
        steps(block, its number, warp) is what a warp does."""
        left = iter(range(blocks))

        def start(sm: int, time: float) -> None:
            number = next(left, None)
            if number is not None:
                block = Block(sm, warps)
                for warp in range(warps):
                    self._at(time, block, warp, steps(block, number, warp))

        for sm in list(range(self.sms)) * resident:
            start(sm, LAUNCH)
        while self._events:
            self.now, _, block, warp, generator = heapq.heappop(self._events)
            try:
                step = next(generator)
            except StopIteration:
                block.ended += 1
                self._meet(block)
                if block.ended == block.warps:
                    start(block.sm, self.now + LAUNCH)
                continue
            if step[0] == "until":
                self._at(max(self.now, step[1]), block, warp, generator)
            elif step[0] == "work":
                free = self._scheduler[block.sm]
                free[warp % 4] = max(free[warp % 4], self.now) + step[1]
                self._at(free[warp % 4], block, warp, generator)
            else:
                block.waiting.append((warp, generator))
                self._meet(block)
        return self.now

    def _meet(self, block: Block) -> None:
        if block.waiting and len(block.waiting) + block.ended == block.warps:
            for warp, generator in block.waiting:
                self._at(self.now + BARRIER, block, warp, generator)
            block.waiting = []

    def _at(self, time: float, block: Block, warp: int, generator: Steps) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, block, warp, generator))


# ---- the kernels ----------------------------------------------------------------------------------------------------


def over_tiles(m: Machine, block: Block, warp: int, d: Design, cost: Cost, tiles, asked: list, stores: bool) -> Steps:
    """The pass over the tiles of a segment. In the first one the block agrees on a reference, unless it stores."""
    for n, tile in enumerate(tiles):
        while len(asked) <= min(n + d.ahead, len(tiles) - 1):
            asked.append(m.load(block.sm, tiles[len(asked)][warp]))
        yield "until", asked[n]
        if n == 0 and not stores:
            yield from block_maximum(m)
        yield "work", cost.vector * d.worked_on(tile)
        yield "until", m.now + CHAIN
        if stores:
            m.store(block.sm, tile[warp])


def block_maximum(m: Machine) -> Steps:
    yield "until", m.now + TEAM_MAX
    yield ("barrier",)


def row_stats(m: Machine, d: Design, cost: Cost, columns: int, size: int):
    segments = list(d.tiles(columns, size))

    def steps(block: Block, number: int, warp: int) -> Steps:
        tiles = segments[number % len(segments)]
        ignored = hash_share(number // len(segments)) < d.ignored
        yield "work", cost.before
        target = m.load(block.sm, 32, L2)
        asked = [m.load(block.sm, tiles[0][warp])] if d.early else []
        yield "until", target
        if ignored:
            return
        yield from over_tiles(m, block, warp, d, cost, tiles, asked, stores=False)
        yield from block_maximum(m)
        yield "work", cost.after
        yield "until", m.now + REDUCE
        yield ("barrier",)
        if warp == 0:
            yield "until", m.now + TEAM_SUM - REDUCE + 40 * ARITHMETIC  # log1p and a quotient

    return len(segments), steps


def hash_share(row: int) -> float:
    return row * 0.6180339887498949 % 1.0


def logits_grad(m: Machine, d: Design, cost: Cost, columns: int, size: int):
    """Full batches of `vectors`, then single vectors one after the other (Columns::write of device/columns.cuh)."""
    segments, single = list(d.tiles(columns, size)), replace(d, vectors=1)

    def steps(block: Block, number: int, warp: int) -> Steps:
        tiles = segments[number % len(segments)]
        full = [tile for tile in tiles if tile[-1] == 512 * d.vectors]
        rest = next(iter(single.tiles(max(sum(map(sum, tiles[len(full) :])), 16), 1))) if len(full) < len(tiles) else []
        yield "work", cost.before
        yield "until", m.load(block.sm, 32, L2)  # the gradients and the target
        yield "until", m.load(block.sm, 32, L2) + 40 * ARITHMETIC  # the statistics, and the coefficients from them
        yield from over_tiles(m, block, warp, d, cost, full, [], stores=True)
        yield from over_tiles(m, block, warp, single, cost, rest, [], stores=True)
        yield "work", cost.after

    return len(segments), steps


SECTOR, EVERY = 32, 20  # bytes, and one in so many is sampled: csrc/clamp.h
LISTED = 0.04  # share of a row in the bracket


def clamped_stats(m: Machine, d: Design, cost: Cost, columns: int, size: int):
    """A block a row: the sample, two radix steps over it, the pass, three radix steps over the list, the last sums.

    The steps in shared memory are counted from device/bracket_pass.cuh: a loop's dependent instructions and loads, its
    iterations, barriers. They are latencies of one block, during which it asks the memory for nothing.
    """
    tiles = next(iter(replace(d, segment=1 << 30).tiles(columns, size)))
    sectors = columns * size // SECTOR // EVERY
    sample = 0 if columns <= 4096 else sectors * SECTOR // size  # logits
    turns, listed = -(-sample // d.threads), max(1, round(LISTED * columns / d.threads))
    eight = 8 * ARITHMETIC + SHARED_MEMORY  # a thread's share of 2,048 counters
    before = REDUCE + BARRIER + eight + BARRIER  # sum_before()
    search = 11 * (SHARED_MEMORY + 2 * ARITHMETIC)
    select = (
        16 * ARITHMETIC + turns * 2 * ARITHMETIC + eight + before + 8 * 2 * ARITHMETIC + search + 16 * ARITHMETIC
        + turns * (SHARED_MEMORY // 2) + 16 * (SHARED_MEMORY + 2 * ARITHMETIC) + 7 * BARRIER
    )  # fmt: skip
    digit = 8 * ARITHMETIC + listed * (SHARED_MEMORY + 6 * ARITHMETIC) + eight + before + 4 * eight // 2 + 5 * BARRIER
    last = listed * (SHARED_MEMORY + 10 * ARITHMETIC) + TEAM_SUM + BARRIER + 100 * ARITHMETIC

    def steps(block: Block, number: int, warp: int) -> Steps:
        yield "work", cost.before
        yield "until", m.load(block.sm, 32, L2)
        for _ in range(-(-2 * sectors // d.threads) if sample else 0):
            yield "until", m.load(block.sm, min(512, 16 * 2 * sectors // d.warps)) + 6 * ARITHMETIC
        yield ("barrier",)
        yield "until", m.now + select
        yield ("barrier",)
        yield from over_tiles(m, block, warp, d, cost, tiles, [], stores=False)
        yield from block_maximum(m)
        yield "work", cost.after
        yield "until", m.now + 3 * BARRIER + 3 * digit + last
        yield ("barrier",)

    return 1, steps


# name: the kernel in the machine code, its source, its steps, its design, bytes moved for one byte of logits
KERNELS = {
    "row_stats": ("row_stats_kernel<{},0,1,8>", "row_stats.cu", row_stats, Design(group=2), 1),
    "logits_grad": ("logits_grad_kernel<{},0,1,8>", "logits_grad.cu", logits_grad, Design(), 2),
    "clamped_stats": ("clamped_stats_kernel<{},1>", "clamped_stats.cu", clamped_stats, Design(blocks=3), 1),
}
CASES = [("row_stats", 19008), ("row_stats", 151936), ("logits_grad", 19008), ("logits_grad", 151936),
         ("clamped_stats", 151936)]  # fmt: skip
SIZES = {"bf16": 2, "fp32": 4}


def costs(archs: tuple[str, ...], names: list[str]) -> dict[tuple[str, str, str], Cost]:
    """{(kernel, dtype, architecture): Cost} of the compiled kernels."""
    import tempfile

    sources = {ROOT / "csrc" / "cuda" / KERNELS[name][1] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        compiled = cuda_toolchain.compile_all(sorted(sources), archs, Path(folder))
    found = {}
    for (_, arch), (_, text) in compiled.items():
        for kernel in sass.parse(text):
            for name in names:
                for dtype in SIZES:
                    if static_evidence.readable(kernel.name) == KERNELS[name][0].format(dtype):
                        found[name, dtype, arch] = cost_of(kernel, arch)
    return found


def cost_of(kernel: sass.Kernel, arch: str) -> Cost:
    """The hot loop's usual way, by the busiest pipe of one of the four schedulers' quarters; outside it, the shortest
    ways from the start and to the end, an instruction a cycle."""
    loop, size = kernel.hot_loop(), static_evidence.logit_bytes(kernel.name)
    way = loop.usual()
    way = loop.usual(sum(i.width for i in way if i.name in sass.LOADS) // size)
    vectors = sum(i.width for i in way if i.name in sass.LOADS) // 16
    lanes = static_evidence.specification(arch).lanes
    busy = max(4 * sum(static_evidence.cycles(i, pipe, n) for i in way) for pipe, n in lanes.items())
    ends = {n for n, block in enumerate(kernel.blocks) if block[-1].name == "EXIT"}  # of most warps: the first one
    before = kernel.shortest(0, {loop.header}) - len(kernel.blocks[loop.header])
    exits = {n for block in loop.blocks for n in kernel.successors[block]} - loop.blocks
    return Cost(before, busy / vectors, min(kernel.shortest(n, ends) for n in exits))


def share(name: str, columns: int, dtype: str, arch: str, cost: Cost, sms: int, latency: float, d: Design) -> float:
    """Of the attainable bandwidth, over the whole launch; ignored rows do not count as work that is to be done."""
    _, _, program, _, moved = KERNELS[name]
    rate = ATTAINABLE * static_evidence.specification(arch).bytes_per_cycle
    machine = Machine(sms, rate, latency)
    rows = round(ROWS / static_evidence.specification(arch).sms * sms)
    segments, steps = program(machine, d, cost, columns, SIZES[dtype])
    cycles = machine.run(rows * segments, d.blocks, d.warps, steps)
    wanted = sum(hash_share(row) >= d.ignored for row in range(rows))
    return wanted * columns * SIZES[dtype] * moved / (cycles * rate * sms)


def latencies(arch: str) -> tuple[float, float]:
    """Of an idle and of a loaded memory, in cycles."""
    spec = static_evidence.specification(arch)
    return MEMORY[re.match(r"sm_\d+", arch)[0]], LOADED_NS * spec.ghz


MEASURED = re.compile(r"^(\w+)  +(\d+) x (\d+) (bf16|fp32)  .*?(\d+)%\s*$", re.MULTILINE)


def calibration(results: str, predicted: Callable[[str, int, str], float]) -> tuple[float, int]:
    """(factor, number of measurements): the geometric mean of measured over predicted shares, for the lines of
    RESULTS.md's tables "kernels alone" that the model knows. Without any it is (1.0, 0): uncalibrated."""
    logs = [
        math.log(int(percent) / 100 / predicted(name, int(columns), dtype))
        for name, _, columns, dtype, percent in MEASURED.findall(results)
        if name in KERNELS and int(percent) > 0
    ]
    return (math.exp(sum(logs) / len(logs)), len(logs)) if logs else (1.0, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_90a", help="one of sm_80, sm_90a, sm_100a (default: sm_90a)")
    parser.add_argument("--dtype", choices=SIZES, default="bf16")
    parser.add_argument("--kernel", choices=KERNELS, default=None, help="default: all")
    parser.add_argument("--columns", type=int, nargs="+", default=None, metavar="N", help="default: 19008 and 151936")
    for name in ("blocks", "vectors", "group", "ahead"):
        parser.add_argument(f"--{name}", type=int, default=None, help=f"try another {name} than the kernel's")
    parser.add_argument("--early", action="store_true", help="the first tile does not wait for the target (row_stats)")
    parser.add_argument("--ignored", type=float, default=0.0, help="share of the rows that are ignored (row_stats)")


def run(args: argparse.Namespace) -> int:
    wanted = {name: getattr(args, name) for name in ("blocks", "vectors", "group", "ahead")}
    if wrong := [f"--{name} must be at least {least}, got {wanted[name]}"
                 for name, least in (("blocks", 1), ("vectors", 1), ("group", 1), ("ahead", 0))
                 if wanted[name] is not None and wanted[name] < least]:  # fmt: skip
        print(f"events: {wrong[0]}")
        return 2
    if not re.match(r"sm_\d+", args.arch) or re.match(r"sm_\d+", args.arch)[0] not in MEMORY:
        print(f"events: --arch must be one of {', '.join(MEMORY)} (with or without the a), got {args.arch}")
        return 2
    if not 0.0 <= args.ignored < 1.0:
        print(f"events: --ignored must be in [0, 1), got {args.ignored}")
        return 2
    cases = [(name, n) for name, n in CASES if args.kernel in (None, name)]
    if args.columns:
        cases = [(name, n) for name in dict.fromkeys(name for name, _ in cases) for n in args.columns]
    try:
        cost = costs((args.arch,), list(dict.fromkeys(name for name, _ in cases)))
    except cuda_toolchain.ToolMissing as error:
        print(f"events: {error}")
        return 1
    changed = {name: value for name, value in wanted.items() if value is not None}
    changed |= {"early": args.early, "ignored": args.ignored}

    def predicted(name: str, columns: int, dtype: str, sms: int, latency: float, **changes) -> float:
        design = replace(KERNELS[name][3], **changes)
        return share(name, columns, dtype, args.arch, cost[name, dtype, args.arch], sms, latency, design)

    idle, loaded = latencies(args.arch)
    factor, count = calibration(
        (ROOT / "benchmarks" / "RESULTS.md").read_text() if args.arch.startswith("sm_90") else "",
        lambda name, columns, dtype: predicted(name, columns, dtype, SHARED, loaded),
    )
    print(
        f"{args.arch}, {ROWS} rows, {args.dtype}: share of the attainable bandwidth ({ATTAINABLE:.0%} of the data "
        f"sheet's), a model; " + (f"calibrated by {factor:.2f} from {count} measurements" if count else "uncalibrated")
    )
    rows = []
    for name, columns in cases:
        found = [
            f"{factor * predicted(name, columns, args.dtype, sms, latency, **changed):.0%}"
            for sms in (1, SHARED)
            for latency in (idle, loaded)
        ]
        rows.append([name, f"{columns:,}", *found, f"{cost[name, args.dtype, args.arch].vector:.0f}"])
    header = ["kernel", "columns", f"alone, {idle:.0f}", f"{loaded:.0f}", f"shared, {idle:.0f}", f"{loaded:.0f}",
              "cycles a vector"]  # fmt: skip
    print_table(header, rows)
    return 0
