"""Stages with time limits, and the commands that they run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cuda_toolchain import ROOT

PASSED, FAILED, PARTIAL, SKIPPED = "passed", "failed", "partial", "not run"


@dataclass
class Context:
    """What the stages share."""

    out: Path  # for the few files of results.write
    scratch: Path  # for whatever a stage makes; gone when the run ends
    device: str  # "cuda", or "cpu" in a rehearsal
    rivals: Path | None
    wheels: Path | None
    deadline: float  # of the whole run, on time.monotonic()
    commit: str
    results: dict = field(default_factory=dict)  # stage -> what it found
    keep: Callable[[dict], None] = lambda found: None  # called by a long stage with what it has found so far

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def log(self, name: str) -> Path:
        """Where a command's output goes. All logs are packed into one archive after every stage."""
        folder = self.scratch / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.log"


@dataclass(frozen=True)
class Stage:
    """`run(context, seconds)` returns its findings, a dict with at least "status".

    seconds: its limit in a run that has as many seconds as its stages have together. In a longer or shorter run the
    limit changes in proportion. Seconds that a stage does not use go to the stages after it.
    """

    name: str
    seconds: float
    run: Callable[[Context, float], dict]


def limit(stages: list[Stage], left: float) -> float:
    """Seconds for the first of the stages that still have to run in `left` seconds."""
    return left * stages[0].seconds / sum(stage.seconds for stage in stages)


def execute(stage: Stage, context: Context, seconds: float) -> dict:
    """The stage's findings with its duration; an exception becomes a failure, a spent budget "not run"."""
    start = time.monotonic()
    if seconds < 2:
        return {"status": SKIPPED, "reason": "no time left", "seconds": 0.0}
    try:
        found = stage.run(context, seconds)
    except Exception as error:  # after any failure the other stages go on
        found = {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


@dataclass(frozen=True)
class Finished:
    """A command that has ended. code: None if it was stopped for running too long."""

    code: int | None
    output: str

    @property
    def verdict(self) -> str:
        return {0: PASSED, None: PARTIAL}.get(self.code, FAILED)

    def why(self, limit: float) -> str:
        """For a command that did not end well: the reason and the end of what it printed."""
        reason = f"stopped after {limit:.0f} s" if self.code is None else f"exit code {self.code}"
        return f"{reason}: {self.output.strip()[-1500:]}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def start(command: list[str | Path], log: Path, *, processes: int = 1, **environment: str) -> subprocess.Popen:
    """Starts a command in the repository's root, in a process group of its own, with its output in `log`.

    processes: how many run at the same time, this one and those that it starts included. Each gets its share of the
    cores as threads: with a thread per core in every process all of them would take many times as long.
    """
    threads = str(max(1, cores() // processes))
    given = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads, **environment}
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=given, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen, log: Path, until: float) -> Finished:
    """Waits until `until` (time.monotonic()), then stops the process and all that it started."""
    try:
        code = process.wait(timeout=max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = None
    return Finished(code, log.read_text(errors="replace"))


def command(arguments: list[str | Path], log: Path, seconds: float, **environment: str) -> Finished:
    return finish(start(arguments, log, **environment), log, time.monotonic() + seconds)
