"""On a machine with a GPU, torch and nvcc, offline: build, tests, sanitizer, benchmarks with rivals, tiny trainings.

Every stage has a share of the run's time; one that fails or runs out of it is reported as such and does not take the
others along. After every stage the results so far are on disk, and a later command (`--only STAGE ...`) adds its own.
`--rehearse` does the same on a CPU with tiny shapes: it shows that the runner works and measures nothing.
docs/gpu.md divides the stages into three commands for a machine that is rented for half an hour.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder for the results; default %(default)s"
    )
    parser.add_argument("--only", nargs="+", default=None, metavar="STAGE", help="build, and run these stages alone")
    parser.add_argument("--merge", type=Path, default=None, metavar="FILE", help="an earlier results.json to add to; "
                        "that of --out is added to anyway")  # fmt: skip
    parser.add_argument("--rivals", type=Path, default=None, help="folder that `python -m benchmarks rivals` filled")
    parser.add_argument(
        "--wheels", type=Path, default=None, help="folder of packages that are missing here (docs/gpu.md)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; nothing is measured")
    parser.add_argument("--seconds", type=float, default=None, help="for everything together; stages share it in "
                        "proportion; default: what the chosen stages are promised")  # fmt: skip
    parser.add_argument("--commit", default=None, help="what the results are of, where there is no git repository")


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu import runner

    return runner.run(args)
