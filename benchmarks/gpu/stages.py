"""Stages with time limits: what one is, and how a command is run inside one."""

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

    out: Path
    device: str  # "cuda", or "cpu" in a rehearsal
    rivals: Path | None
    deadline: float  # of the whole run, on time.monotonic()
    commit: str
    results: dict = field(default_factory=dict)  # stage -> what it found

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Stage:
    """`run(context, seconds)` returns its findings, a dict with at least "status"."""

    name: str
    seconds: float
    run: Callable[[Context, float], dict]


def execute(stage: Stage, context: Context) -> dict:
    """The stage's findings with its duration; an exception becomes a failure, a spent budget "not run"."""
    start = time.monotonic()
    seconds = context.deadline - start
    if not context.rehearsal:  # which measures nothing, on a machine that may be slow or busy
        seconds = min(seconds, stage.seconds)
    if seconds < 2:
        return {"status": SKIPPED, "reason": "no time left", "seconds": 0.0}
    try:
        found = stage.run(context, seconds)
    except Exception as error:  # whatever it is, the other stages go on
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


def start(command: list[str | Path], log: Path, **environment: str) -> subprocess.Popen:
    """Starts a command in the repository's root, in a process group of its own, with its output in `log`."""
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, start_new_session=True,
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
