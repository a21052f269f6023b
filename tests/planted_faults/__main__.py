"""`python -m tests.planted_faults`: plants every fault of the list and reports those that no test sees."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a process with threads must not fork

from tests.planted_faults.catalogue import FAULTS  # noqa: E402
from tests.planted_faults.runner import survivors  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted_faults", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="faults whose name or file contains TEXT")
    parser.add_argument("--quick", action="store_true", help="of those in one file the first, and none marked slow")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at once")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.only or options.only in fault.name + " " + fault.file]
    if options.quick:
        one_each = {fault.file: fault for fault in reversed(chosen) if fault.slow is None}
        chosen = list(reversed(one_each.values()))
    for package in sorted({fault.package for fault in chosen if fault.package and find_spec(fault.package) is None}):
        print(f"left out: faults that need {package}, which is not installed here", flush=True)
        chosen = [fault for fault in chosen if fault.package != package]
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if not chosen:
        parser.error(f"--only: no fault that can be tried here has a name or file that contains {options.only!r}")
    started = time.monotonic()
    problems = survivors(chosen, jobs=options.jobs, tell=lambda line: print(line, flush=True))
    print(f"{len(chosen) - len(problems)} of {len(chosen)} faults were caught in {time.monotonic() - started:.0f} s")
    for name, problem in problems.items():
        print(f"{name}: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
