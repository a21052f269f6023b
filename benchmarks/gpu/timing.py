"""Times work on a device, in turns, on inputs that are in no cache."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import measure

# The GPU waits about this long before each timed call, so that the host has launched all kernels of the call before the
# first one starts: the GPU's work is timed and not the host's, as in a training step, where the host runs ahead.
HEAD_START_CYCLES = 2_000_000
WARM_UP = 2


@dataclass(frozen=True)
class Call:
    """One thing to time. run(i) works on input set i; restore(i), untimed, restores what an earlier run overwrote."""

    run: Callable[[int], object]
    restore: Callable[[int], object] | None = None


def seconds_of(call: Call, device: str, turn: int) -> float:
    if call.restore is not None:
        call.restore(turn)
    if device == "cpu":
        start = time.perf_counter()
        result = call.run(turn)
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)
    before.record()
    result = call.run(turn)
    after.record()
    after.synchronize()
    del result
    return before.elapsed_time(after) / 1e3


def in_turns(calls: dict[str, Call], device: str, turns: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in turn (a, b, a, b, ...): `turns` times, fewer (at least 3) once `seconds` have passed."""
    timed = {name: partial(seconds_of, call, device) for name, call in calls.items()}
    for call in timed.values():
        for turn in range(WARM_UP):
            call(turn)
    return measure.in_turns(timed, turns, seconds)


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median_us": 1e6 * statistics.median(times),
        "min_us": 1e6 * min(times),
        "max_us": 1e6 * max(times),
        "repeats": len(times),
    }


def input_sets(bytes_of_one: int, l2_bytes: int) -> int:
    """How many sets of inputs to use in turn, so that a set has left the cache when its turn comes again."""
    return max(2, -(-4 * l2_bytes // max(bytes_of_one, 1)))


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Most bytes that torch's GPU allocator held during the call beyond what it held before; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak
