"""Runs a set of trainings as processes, some at a time. Finished runs are not repeated; a failed run stops no other."""

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from entcov.rl.record.durable import atomic_write
from entcov.rl.record.metrics import read_metrics
from entcov.rl.record.progress import RunsProgress, duration
from entcov.rl.threads import submit

LOG, FINISHED = "log.txt", "finished.json"
_TAIL_LINES = 20


@dataclass(frozen=True)
class Job:
    """One run. `argv` must write its metrics to `run_dir` and, started again after a kill, continue the run there."""

    label: str
    argv: tuple[str, ...]
    run_dir: Path


@dataclass(frozen=True)
class Failure:
    label: str
    reason: str
    log: Path
    tail: str


def run_matrix(
    jobs: Sequence[Job], parallel: int = 1, *, total_steps: int | None = None, display: bool | str = "auto"
) -> list[Failure]:
    """Runs every job that has not finished, `parallel` at a time, with OMP_NUM_THREADS=1 and output to run_dir/log.txt.

    A run counts as finished if it has exited with 0 with the same arguments, and the files that its arguments name (the
    recipe) have not changed since. An interrupt ends the runs in progress.

    Args:
        total_steps: steps of each run, for the display.
        display: as for `Progress`.

    Returns:
        The failed runs, in the order of `jobs`.

    Raises:
        ValueError: parallel < 1.
    """
    if parallel < 1:
        raise ValueError(f"jobs must be >= 1, got {parallel}")
    running: dict[str, subprocess.Popen] = {}
    stopping = threading.Event()
    lock = threading.Lock()  # so that every process that was started is in `running` when `stopping` is set

    def run(job: Job) -> Failure | None:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        (job.run_dir / FINISHED).unlink(missing_ok=True)
        started, log = time.monotonic(), job.run_dir / LOG
        with open(log, "wb") as output:
            with lock:
                if stopping.is_set():
                    return None
                environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
                process = subprocess.Popen(
                    job.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                running[job.label] = process
            shown.state(job.label, "running")
            code = process.wait()
            with lock:
                del running[job.label]
        if code == 0:
            atomic_write(job.run_dir / FINISHED, json.dumps(_identity(job), indent=1).encode())
            shown.state(job.label, f"finished in {duration(time.monotonic() - started)}")
            return None
        reason = f"exit {code}" if code > 0 else f"signal {-code}"
        shown.state(job.label, f"failed ({reason})")
        lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return Failure(job.label, reason, log, "\n".join(lines))

    with RunsProgress([job.label for job in jobs], total_steps, display) as shown:
        left = [job for job in jobs if not _is_finished(job)]
        for job in jobs:
            if job not in left:
                shown.state(job.label, "finished before")
                shown.metrics(job.label, _metrics_so_far(job))
        with ThreadPoolExecutor(parallel) as pool:
            try:
                futures = [submit(pool, run, job) for job in left]
                while wait(futures, timeout=1).not_done:
                    for job in left:
                        if job.label in running:
                            shown.metrics(job.label, _metrics_so_far(job))
            except BaseException:
                with lock:
                    stopping.set()
                    for process in running.values():
                        process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            for job in left:
                shown.metrics(job.label, _metrics_so_far(job))
    return [failure for failure in (future.result() for future in futures) if failure is not None]


def _identity(job: Job) -> dict[str, object]:
    """What identifies a run: its arguments, without the interpreter's path, and hashes of the files that they name."""
    files = [argument for argument in job.argv[1:] if Path(argument).is_file()]
    return {
        "arguments": list(job.argv[1:]),
        "files": {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files},
    }


def _is_finished(job: Job) -> bool:
    try:
        return json.loads((job.run_dir / FINISHED).read_bytes()) == _identity(job)
    except FileNotFoundError:
        return False


def _metrics_so_far(job: Job) -> list[dict[str, float]]:
    try:
        return read_metrics(job.run_dir)
    except FileNotFoundError:
        return []
