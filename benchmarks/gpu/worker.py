"""Measures one contender in a process of its own: `python -m benchmarks.gpu.worker NAME`, one JSON line a measurement.

entcov runs in the same process, turn by turn, so that the ratio of the two does not depend on the state of the GPU. A
line is written as soon as it is measured, so that a process that is stopped loses no finished measurement.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import ceilings, contenders, rivals
from benchmarks.gpu.contenders import Contender
from benchmarks.gpu.kernels import KERNELS, Kernel, prepared
from benchmarks.gpu.report import NOT_REACHED
from benchmarks.gpu.timing import Call, in_turns, input_sets, peak_bytes, summary
from benchmarks.gpu.workloads import WORKLOADS, Inputs, Workload, backward, errors, forward
from benchmarks.measure import DTYPES, ratio

CHECKED_ROWS = 16
TURNS, SECONDS_A_MEASUREMENT = 30, 1.2
TOKENS, TINY_TOKENS, TINY_COLUMNS = 8192, 8, 500  # tiny: of a rehearsal


def tell(**record: object) -> None:
    print(json.dumps(_finite(record), allow_nan=False), flush=True)


def _finite(value: object) -> object:
    """NaN and infinities as text, because JSON has no numbers for them."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Worker:
    def __init__(self, contender: Contender, device: str, tokens: int, until: float):
        self.contender, self.baseline = contender, contenders.entcov()
        self.device, self.tokens, self.until = device, tokens, until
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0

    def run(self) -> None:
        """Every shape of every workload. The first shape of each workload comes first: time may not suffice for all."""
        shapes = [(n, name, *shape) for name in self.contender.functions
                  for n, shape in enumerate(WORKLOADS[name].shapes)]  # fmt: skip
        done = set()
        for _, name, dtype, columns in sorted(shapes, key=lambda shape: shape[0]):
            columns = columns if self.device == "cuda" else min(columns, TINY_COLUMNS)
            if (name, dtype, columns) in done:
                continue
            done.add((name, dtype, columns))
            about = {"contender": self.contender.name, "source": self.contender.source, "workload": name,
                     "tokens": self.tokens, "columns": columns, "dtype": dtype}  # fmt: skip
            if time.monotonic() > self.until:
                tell(**about, failure=NOT_REACHED)
                continue
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # after some shapes torch would stop compiling and run eagerly
            try:
                self.measure(WORKLOADS[name], about)
            except Exception as error:  # an implementation that fails is a finding
                place = traceback.extract_tb(error.__traceback__)[-1]
                message = f"{type(error).__name__}: {str(error)[:500]} ({Path(place.filename).name}:{place.lineno})"
                tell(**about, failure=message)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def measure(self, workload: Workload, about: dict) -> None:
        dtype, columns = DTYPES[about["dtype"]], about["columns"]
        one = workload.make(self.tokens, columns, dtype, self.device, 0)
        function = self.contender.functions[workload.name]
        few = min(CHECKED_ROWS, self.tokens)
        found = {"errors": errors(workload, function, workload.first_rows(one, few))}
        if workload.name == "token_stats":
            found["errors_minus_infinity"] = self.with_minus_infinity(workload, function, one)
        sets = [one] + [
            workload.make(self.tokens, columns, dtype, self.device, seed)
            for seed in range(1, input_sets(workload.bytes_of_one(one), self.l2))
        ]
        if self.contender.name == "entcov":
            self.measure_kernels(workload, about, sets)
        for label in ("forward", "forward+backward"):
            both = {"entcov": self.baseline, self.contender.name: self.contender}
            calls = {name: self.call(workload, c, sets, dtype, label) for name, c in both.items()}
            times = in_turns(calls, self.device, TURNS, SECONDS_A_MEASUREMENT)
            mine = times[self.contender.name]
            measured = summary(mine)
            backward_too = label != "forward"
            moved = self.contender.traffic(workload.name, backward_too, dtype.itemsize)
            if moved is not None:
                measured["bytes_per_logit"] = moved
                measured["tb_per_s"] = moved * self.tokens * columns / measured["median_us"] / 1e6
            if calls[self.contender.name].restore:
                calls[self.contender.name].restore(0)
            measured["peak_bytes"] = peak_bytes(partial(calls[self.contender.name].run, 0), self.device)
            tell(
                **about,
                **{"pass": label},
                outputs=[k for k in found["errors"] if k != "gradient"],
                note=self.contender.note,
                slower_than_entcov=ratio(mine, times["entcov"]),
                **measured,
                **found,
            )

    def measure_kernels(self, workload: Workload, about: dict, sets: list[Inputs]) -> None:
        """Our kernels one by one, in turn."""
        kernels = KERNELS.get(workload.name, {})
        ready = [prepared(workload.name, inputs) for inputs in sets] if kernels else []

        def call(kernel: Kernel) -> Call:
            if not kernel.overwrites:
                return Call(lambda turn: kernel.run(sets[turn % len(sets)], ready[turn % len(sets)]))
            own, restore = self.own_copy(sets)
            return Call(lambda turn: kernel.run(own, ready[turn % len(sets)]), restore)

        calls = {name: call(kernel) for name, kernel in kernels.items()}
        times = in_turns(calls, self.device, TURNS, SECONDS_A_MEASUREMENT)
        for name, kernel in kernels.items():
            measured = summary(times[name])
            if moved := (kernel.reads + kernel.writes) * sets[0][0].nbytes:
                measured |= {"bytes": moved, "tb_per_s": moved / measured["median_us"] / 1e6}
            if kernel.bare is not None:
                measured |= {"bare": kernel.bare, "slower_than_bare": ratio(times[name], times[kernel.bare])}
            tell(**about, kernel=name, writes=kernel.writes > 0, **measured)

    def with_minus_infinity(self, workload: Workload, function, inputs: Inputs) -> dict[str, float] | str:
        """Errors where three columns of four are -inf, as masked vocabularies are; the target is never one of them."""
        logits, target = workload.first_rows(inputs, min(CHECKED_ROWS, self.tokens))
        logits[:, torch.arange(logits.shape[1], device=logits.device) % 4 != 0] = -torch.inf
        try:
            return errors(workload, function, (logits, target // 4 * 4))
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"

    def call(
        self, workload: Workload, contender: Contender, sets: list[Inputs], dtype: torch.dtype, label: str
    ) -> Call:
        function, backward_too = contender.functions[workload.name], label != "forward"

        def run_on(inputs: Inputs) -> object:
            return backward(workload, function, inputs) if backward_too else forward(function, inputs)

        if not contender.overwrites(dtype, backward_too):
            return Call(lambda turn: run_on(sets[turn % len(sets)]))
        own, restore = self.own_copy(sets)
        return Call(lambda turn: run_on(own), restore)

    def own_copy(self, sets: list[Inputs]) -> tuple[Inputs, Callable[[int], None]]:
        """Memory for inputs that are overwritten, and a function that copies a turn's inputs there, uncached."""
        own = tuple(torch.empty_like(x) for x in sets[0])
        scrub = torch.empty(4 * self.l2, dtype=torch.uint8, device=self.device)

        def restore(turn: int) -> None:
            for x, original in zip(own, sets[turn % len(sets)], strict=True):
                x.copy_(original)
            scrub.zero_()

        return own, restore


def measure_ceilings(device: str, tokens: int) -> None:
    """Bytes a second of reading and of copying, counting what is read and what is written."""
    columns = 152064 if device == "cuda" else TINY_COLUMNS // 4 * 4
    memory = WORKLOADS["token_stats"].make(tokens, columns, torch.bfloat16, device, 0)[0]
    target = torch.empty_like(memory)
    with tempfile.TemporaryDirectory() as folder:
        library = None
        if device == "cuda":
            library = ceilings.compile_library(Path(folder), "native")
        for kind, calls in ceilings.calls(memory, target, library).items():
            timed = {name: Call(lambda _, call=call: call()) for name, call in calls.items()}
            for name, times in in_turns(timed, device, TURNS, SECONDS_A_MEASUREMENT).items():
                moved = memory.nbytes * (2 if kind == "copy" else 1)
                measured = summary(times)
                tell(ceiling=kind, how=name, bytes=moved, **measured, tb_per_s=moved / measured["median_us"] / 1e6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*contenders.OWN, *rivals.RIVALS, "ceilings"])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rivals", type=Path, default=None)
    args = parser.parse_args()
    until, tokens = time.monotonic() + args.seconds, TINY_TOKENS if args.device == "cpu" else TOKENS
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if args.name == "ceilings":
        measure_ceilings(args.device, tokens)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if args.name in contenders.OWN:
                contender = contenders.OWN[args.name]()
            else:
                contender = rivals.prepare(args.name, args.rivals, Path(scratch), args.device)
        except Exception as error:
            tell(contender=args.name, failure=f"cannot be loaded: {type(error).__name__}: {str(error)[:500]}")
            return 0
        Worker(contender, args.device, tokens, until).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
