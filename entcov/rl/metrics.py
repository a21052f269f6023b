"""The record of a run: metrics.jsonl (the truth), TensorBoard events, and Weights & Biases when asked.

One step, one line: `{"step": 12, "actor/entropy": 0.83, ...}`. A line is written whole and fsynced before `log`
returns, so a killed run has every step it reported. A metric that is NaN or infinite is written as `null`, because JSON
has no such numbers, and the line then carries their count as `training/nonfinite_metrics`; `read_metrics` gives NaN.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from entcov.rl.durable import replace_file, write_all, write_error

FILE_NAME = "metrics.jsonl"
NONFINITE = "training/nonfinite_metrics"


class RunLogger:
    """Appends the metrics of every step to the run directory's records. Use as a context manager, or call `close`.

    Args:
        run_dir: created if absent. `metrics.jsonl`, `tensorboard/` and the lock `.metrics.lock` live in it.
        tensorboard: also write TensorBoard events to `run_dir/tensorboard`.
        wandb: arguments for `wandb.init`; None writes nothing there. The run's id is kept in `run_dir/wandb_id`, so
            that a resumed run continues its own page.
        resume_step: None for a new run. Otherwise the step of the checkpoint that is resumed: lines after it are
            removed (-1 removes every line: a run that was killed before its first checkpoint and starts over).

    Raises:
        FileExistsError: a new run, and `run_dir` already holds metrics.
        RuntimeError: another process logs into `run_dir`, or a package that was asked for is missing.
        ValueError: metrics.jsonl has a damaged line that is not its last.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = True,
        wandb: dict[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        if resume_step is not None and resume_step < -1:
            raise ValueError(f"resume_step must be None or >= -1, got {resume_step}")
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAME
        self._fd = self._tensorboard = self._wandb = None
        self._lock = _lock(run_dir)
        try:
            self._last_step = _cut(self.path, resume_step)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if tensorboard:
                self._tensorboard = _tensorboard_writer(run_dir / "tensorboard", resume_step)
            if wandb is not None:
                self._wandb = _wandb_run(run_dir, wandb)
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` for `step`; a step may get several lines, and steps never go back.

        Raises:
            TypeError: a value is not a real number (the message names its key), or step is not an int.
            ValueError: step is negative or lower than the last one, or a key is "step" or empty.
            OSError: the line could not be written, e.g. the disk is full; it is absent, and earlier lines are intact.
        """
        if self._fd is None:
            raise RuntimeError(f"log called on the closed logger of {self.path}")
        if isinstance(step, bool) or not isinstance(step, Integral):
            raise TypeError(f"step must be an int, got {type(step).__name__}")
        if step < 0 or step < self._last_step:
            raise ValueError(f"step must be >= 0 and >= the last logged step {self._last_step}, got {step}")
        values = {key: _number(key, value) for key, value in metrics.items()}
        nonfinite = sum(not math.isfinite(value) for value in values.values())
        if nonfinite:
            values[NONFINITE] = nonfinite
        self._append(step, {key: value if math.isfinite(value) else None for key, value in values.items()})
        self._last_step = int(step)
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()  # a killed run must not lose the events of steps that a checkpoint covers
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _append(self, step: int, row: dict[str, float | None]) -> None:
        line = json.dumps({"step": int(step), **row}, allow_nan=False) + "\n"
        size = os.fstat(self._fd).st_size
        try:
            write_all(self._fd, line.encode())
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)  # a refused line leaves no torn half behind
            raise write_error(error, self.path, f"step {step} is not recorded, earlier steps are intact") from error

    def close(self) -> None:
        """Close all records; calling it again does nothing."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        for fd in (self._fd, self._lock):
            if fd is not None:
                os.close(fd)
        self._fd = self._lock = self._tensorboard = self._wandb = None

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl in order, `null` as NaN. A torn last line (run killed, or live) is left out.

    Raises:
        FileNotFoundError: the directory holds no metrics.jsonl.
        ValueError: a line that is not the last is damaged; the message names file and line.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {run_dir} is not the directory of a run that logged a step")
    rows = (row for _, row in _lines(path))
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each complete line with its parsed row. Lines are written with one call, so one without a newline is torn."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError('no integer "step"')
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); remove the line to read the rest") from None
        lines.append((line, row))
    return lines


def _cut(path: Path, resume_step: int | None) -> int:
    """Bring the file to the state that logging continues from, and return its last step (-1: none)."""
    if not path.exists():
        return -1
    if resume_step is None:
        if path.stat().st_size:
            raise FileExistsError(f"{path} holds an earlier run's metrics: resume that run, or use another directory")
        return -1
    kept = [(line, row) for line, row in _lines(path) if row["step"] <= resume_step]
    content = b"".join(line for line, _ in kept)
    if len(content) != path.stat().st_size:
        replace_file(path, content)
    return kept[-1][1]["step"] if kept else -1


def _number(key: str, value: object) -> float:
    if not isinstance(key, str) or not key or key == "step":
        raise ValueError(f'a metric\'s name must be a non-empty string other than "step", got {key!r}')
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {key!r} must be a real number, got {type(value).__name__}: {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def _lock(run_dir: Path) -> int:
    """Hold `.metrics.lock`: a POSIX lock, which dies with the process and is not passed on to forked workers."""
    fd = os.open(run_dir / ".metrics.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(fd)
        raise RuntimeError(f"{run_dir} is in use by another process; two runs cannot share a directory") from None
    return fd


def _tensorboard_writer(log_dir: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            f"TensorBoard events were asked for and tensorboard is missing ({error}): pip install tensorboard"
        ) from error
    # Events after the checkpoint stay in their files; purge_step tells TensorBoard not to show them.
    return SummaryWriter(str(log_dir), purge_step=None if resume_step is None else resume_step + 1)


def _wandb_run(run_dir: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError("Weights & Biases was asked for and is not installed: pip install wandb") from error
    id_file = run_dir / "wandb_id"
    if id_file.exists():
        # W&B ignores steps that it already has. A resumed run recomputes exactly those values, so nothing is lost.
        settings = {"id": id_file.read_text().strip(), "resume": "allow", **settings}
    run = wandb.init(**{"dir": str(run_dir), **settings})
    replace_file(id_file, f"{run.id}\n".encode())
    return run
