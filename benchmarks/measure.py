"""Timing by interleaved repetitions, and memory by the allocator's own events and by the kernel's high-water mark; and
the tables in which benchmarks print what they found."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved_seconds(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times in turn (a, b, c, a, b, c, ...), after one warm-up of each.

    A neighbour on the machine then slows all of them alike, and the ratio within a turn stays meaningful. Each timed
    call follows an untimed one of the same kind: one that frees gigabytes leaves its successor with pages that the
    system has taken back, and that would be charged to the wrong name. `clock`: time.process_time counts what the
    processors did for this process alone.
    """
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Median and range of theirs / ours, turn by turn."""
    turns = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(turns), "min": min(turns), "max": max(turns)}


def peak_allocated_bytes(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held during `call` beyond what it held before, from its own events."""
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
    return peak


def peak_resident_bytes(call: Callable[[], object]) -> int:
    """Growth of the process's resident high-water mark (VmHWM) during `call`: sees every allocator. Linux only.

    Meant for a fresh process: memory that an earlier call freed but kept is reused unseen.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is resident now
    before = _status_bytes("VmRSS")
    result = call()
    after = _status_bytes("VmHWM")
    del result
    return after - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, str]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
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
