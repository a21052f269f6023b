"""What the benchmarks share: options, timing in turns, memory by the allocator's events and by the resident high-water
mark, and tables."""

import argparse
import ctypes
import json
import math
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options that the benchmarks of ops have in common."""
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns; the median is reported")
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")


def set_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def keep(report: dict, path: Path | None) -> None:
    """Writes the results where --json says so."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def in_turns(calls: dict[str, Callable[[int], float]], turns: int, limit: float = math.inf) -> dict[str, list[float]]:
    """Seconds that each call returns for each turn, in the order a, b, c, a, b, c, ...

    Other work on the machine then slows all of them alike, and the ratio within a turn stays meaningful. After `limit`
    seconds there are no further turns, but 3 in any case.
    """
    until, times = time.monotonic() + limit, {name: [] for name in calls}
    for turn in range(turns):
        if turn >= 3 and time.monotonic() > until:
            break
        for name, call in calls.items():
            times[name].append(call(turn))
    return times


def interleaved_seconds(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times in turn.

    Before each timed call the same call runs untimed. After a call that freed gigabytes the next one has to get its
    pages from the system again, and that time belongs to the former. `clock`: time.process_time counts the processor
    time of this process alone.
    """

    def timed(call: Callable[[], object], turn: int) -> float:
        call()
        start = clock()
        call()
        return clock() - start

    return in_turns({name: partial(timed, call) for name, call in calls.items()}, repeats)


def times_of(seconds: list[float], baseline: list[float]) -> dict[str, object]:
    """Milliseconds of one call, and their ratio to the baseline's."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "ratio": ratio(seconds, baseline),
    }


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Median and range of theirs / ours, turn by turn."""
    turns = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(turns), "min": min(turns), "max": max(turns)}


def peak_allocated_bytes(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held during `call` beyond what it held before."""
    return allocated_bytes(call)[0]


def kept_bytes(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator still holds for the result of `call`: after a forward pass, all that is kept for
    backward, whether autograd saved it or a function did, and the outputs."""
    return allocated_bytes(call)[1]


def allocated_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Most bytes that torch's CPU allocator held during `call` beyond what it held before, and those that it held at
    the end while the result lived, from its own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    held = peak = 0
    memory = (e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0)
    for event in sorted(memory, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak, held


def peak_resident_bytes(call: Callable[[], object]) -> int:
    """Growth of the process's resident high-water mark (VmHWM) during `call`, whatever allocates. Linux only.

    For a fresh process: memory that an earlier call has freed and the process still holds would not be counted.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is resident now
    before = _status_bytes("VmRSS")
    result = call()
    after = _status_bytes("VmHWM")
    del result
    return after - before


def proportional_bytes() -> int:
    """Resident bytes of this process, with its part of every page that it shares. Linux."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = named[1] if named else platform.processor() or platform.machine()
    return {"cpu": model, "torch": torch.__version__, "python": platform.python_version()}


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns, two spaces apart."""
    print("\n".join(table_lines(header, rows)))


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (header, *rows)
    ]
