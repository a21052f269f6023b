"""The metrics of a run: metrics.jsonl (complete), TensorBoard events, and Weights & Biases when asked.

One step, one line: `{"step": 12, "actor/entropy": 0.83, ...}`. A line is written whole and fsynced before `log`
returns, so a killed run has every step it reported. A metric that is NaN or infinite is written as `null`, because JSON
has no such numbers, and the line then carries their count as `training/nonfinite_metrics`; `read_metrics` gives NaN.

A resumed run does not need the lines before its checkpoint. Where some are missing or damaged, it says so and
continues; the next line carries the number of missing steps as `training/lost_steps`, and damaged lines are moved to
`metrics.damaged`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from entcov.rl.record.durable import atomic_write, fsync_path, make_folder, write_all, write_error
from entcov.rl.threads import no_thread, say

FILE_NAME = "metrics.jsonl"
DAMAGED = "metrics.damaged"
NONFINITE = "training/nonfinite_metrics"
LOST = "training/lost_steps"


class RunLogger:
    """Appends the metrics of every step to the run directory's records. Use as a context manager, or call `close`.

    Args:
        run_dir: created if absent. `metrics.jsonl` and `tensorboard/` are in it. No other process may log there: a run
            holds the folder (`run_folder.held`).
        tensorboard: also write TensorBoard events to `run_dir/tensorboard`.
        wandb: arguments for `wandb.init`; None writes nothing there. The run's id is kept in `run_dir/wandb_id`, so
            that a resumed run continues its own page.
        resume_step: None for a new run. Otherwise the step of the checkpoint that is resumed: lines after it are
            removed (-1 removes every line: a run that was killed before its first checkpoint and starts over). Missing
            steps from 1 to it are reported on stderr and recorded.

    Raises:
        FileExistsError: a new run, and `run_dir` already holds metrics.
        RuntimeError: a package that was asked for is missing.
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
        make_folder(run_dir)
        self.path = run_dir / FILE_NAME
        self._fd = self._tensorboard = self._wandb = None
        try:
            self._last_step, self._lost = _cut(self.path, resume_step)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            fsync_path(run_dir)
            if tensorboard:
                self._tensorboard = _unless_no_thread(
                    lambda: _tensorboard_writer(run_dir / "tensorboard", resume_step), "TensorBoard"
                )
            if wandb is not None:
                self._wandb = _unless_no_thread(lambda: _wandb_run(run_dir, wandb), "Weights & Biases")
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` for `step`; a step may get several lines, and steps never go back.

        Raises:
            TypeError: a value is not a real number (the message names its key).
            ValueError: step is negative or lower than the last one, or a key is "step" or empty.
            OSError: the line could not be written, e.g. the disk is full; it is absent, and earlier lines are intact.
        """
        if self._fd is None:
            raise RuntimeError(f"log called on the closed logger of {self.path}")
        if step < 0 or step < self._last_step:
            raise ValueError(f"step must be >= 0 and >= the last logged step {self._last_step}, got {step}")
        values = {key: _number(key, value) for key, value in metrics.items()}
        nonfinite = sum(not math.isfinite(value) for value in values.values())
        if nonfinite:
            values[NONFINITE] = nonfinite
        if self._lost:
            values[LOST] = self._lost
        self._append(step, {key: value if math.isfinite(value) else None for key, value in values.items()})
        self._last_step, self._lost = int(step), 0
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
        if self._fd is not None:
            os.close(self._fd)
        self._fd = self._tensorboard = self._wandb = None

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
    rows = []
    for number, (_, row) in enumerate(_lines(path), start=1):
        if isinstance(row, ValueError):
            raise ValueError(f"{path}, line {number} is damaged ({row}); remove the line to read the rest")
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def has_rows(run_dir: str | Path) -> bool:
    """Whether a step was logged there, also if its line is damaged now."""
    path = Path(run_dir) / FILE_NAME
    return path.exists() and b"\n" in path.read_bytes()


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | ValueError]]:
    """Each complete line with its parsed row, or what is wrong with it.

    Lines are written with one call, so one without a newline at its end is torn, and left out.
    """
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError('no integer "step"')
        except ValueError as error:
            row = error
        lines.append((line + b"\n", row))
    return lines


def _cut(path: Path, resume_step: int | None) -> tuple[int, int]:
    """Bring the file to the state that logging continues from; its last step (-1: none), and how many are missing."""
    if resume_step is None:
        if path.exists() and path.stat().st_size:
            raise FileExistsError(f"{path} holds an earlier run's metrics: resume that run, or use another directory")
        return -1, 0
    lines = _lines(path) if path.exists() else []
    damaged = [(number, line) for number, (line, row) in enumerate(lines, start=1) if isinstance(row, ValueError)]
    kept = [(line, row["step"]) for line, row in lines if isinstance(row, dict) and row["step"] <= resume_step]
    missing = sorted(set(range(1, resume_step + 1)) - {step for _, step in kept})
    if damaged and resume_step >= 0:
        aside = path.with_name(DAMAGED)  # after a kill it may hold some lines twice
        before = aside.read_bytes() if aside.exists() else b""
        atomic_write(aside, before + b"".join(line for _, line in damaged))
        _warn(f"{path}: damaged lines ({_ranges([number for number, _ in damaged])}) were moved to {DAMAGED}")
    if missing:
        _warn(
            f"{path}: the metrics of steps {_ranges(missing)} are missing. The run goes on from step {resume_step}, "
            f"which does not depend on them; plots will lack them, and the next line has their number as {LOST}"
        )
    content = b"".join(line for line, _ in kept)
    if path.exists() and len(content) != path.stat().st_size:
        atomic_write(path, content)
    return (kept[-1][1] if kept else -1), len(missing)


def _ranges(numbers: list[int]) -> str:
    """Ascending integers as "3, 7 to 9"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _number(key: str, value: object) -> float:
    if not isinstance(key, str) or not key or key == "step":
        raise ValueError(f'a metric\'s name must be a non-empty string other than "step", got {key!r}')
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {key!r} must be a real number, got {type(value).__name__}: {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def _unless_no_thread(make: Callable[[], Any], name: str) -> Any:
    """`make()`; None where it needs a thread and the machine gives none. metrics.jsonl has everything in any case."""
    try:
        return make()
    except RuntimeError as error:
        if not no_thread(error):
            raise
        say(f"{error}: this run goes on without {name}")
        return None


def _tensorboard_writer(log_dir: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Events after the checkpoint stay in their files; purge_step tells TensorBoard not to show them.
    return SummaryWriter(str(log_dir), purge_step=None if resume_step is None else resume_step + 1)


def _wandb_run(run_dir: Path, settings: dict[str, Any]) -> Any:
    import wandb

    id_file = run_dir / "wandb_id"
    if id_file.exists():
        # W&B ignores steps that it already has. A resumed run recomputes exactly those values, so nothing is lost.
        settings = {"id": id_file.read_text().strip(), "resume": "allow", **settings}
    run = wandb.init(**{"dir": str(run_dir), **settings})
    atomic_write(id_file, f"{run.id}\n".encode())
    return run
