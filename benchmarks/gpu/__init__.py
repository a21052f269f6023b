"""One command for a machine with a GPU, torch and nvcc, offline: build, tests, sanitizer, then benchmarks with rivals.

`python -m benchmarks gpu` works within 8 minutes. Every stage has its own time limit; one that fails or runs out of
time is reported as such and does not take the others along. After every stage the results so far are on disk.
`--rehearse` does the same on a CPU with tiny shapes: it shows that the runner works and measures nothing.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for results and logs")
    parser.add_argument("--rivals", type=Path, default=None, help="folder that `python -m benchmarks rivals` filled")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; nothing is measured")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything together; default 470")
    parser.add_argument("--only", nargs="+", default=None, metavar="STAGE", help="run these stages alone")
    parser.add_argument("--commit", default=None, help="what the results are of, where there is no git repository")


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu import runner

    return runner.run(args)
