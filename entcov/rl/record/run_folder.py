"""A run's folder. One process at a time runs in it, and all runs in it have the same recipe."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entcov.rl.config import Config
from entcov.rl.recipe import ConfigError
from entcov.rl.record.checkpoint import Checkpoint, list_steps, load_checkpoint, load_latest
from entcov.rl.record.durable import atomic_write, clear_leftovers, locked, make_folder
from entcov.rl.record.metrics import has_rows
from entcov.rl.solve_counts import SOLVE_COUNTS
from entcov.rl.stored_recipe import check_same_recipe, store_recipe
from entcov.rl.types import Rollout

SAMPLES = "samples"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the folder's lock, so that no other process runs in it. Removes temporary files of killed processes.

    Raises:
        RuntimeError: another process runs in it.
        ConfigError: the folder cannot be made.
    """
    try:
        make_folder(run_dir)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"run_dir: the folder {run_dir} cannot be made ({error.strerror})") from None
    with locked(run_dir, wait=False) as ours:
        if not ours:
            raise RuntimeError(f"{run_dir} is in use by another process; two runs cannot share a directory")
        for folder in (run_dir, run_dir / SAMPLES, run_dir / SOLVE_COUNTS):
            clear_leftovers(folder)
        yield


def has_begun(run_dir: Path) -> bool:
    """Whether the folder holds a checkpoint or a logged step. Without either the run has not begun."""
    checkpoints = run_dir / "checkpoints"
    return (checkpoints.is_dir() and bool(list_steps(checkpoints))) or has_rows(run_dir)


def check_resume(run_dir: Path, resume: str) -> None:
    """Raises ValueError unless `resume` is "auto", "never" or the path of one of this run's checkpoints."""
    if resume in ("auto", "never"):
        return
    path, checkpoints = Path(resume), run_dir / "checkpoints"
    if path.resolve().parent != checkpoints.resolve() or not path.is_dir():
        raise ValueError(f"resume: must be one of this run's checkpoints {checkpoints}/step_N, got {resume}")


def prepare_folder(run_dir: Path, config: Config, resume: str) -> Checkpoint | None:
    """Checks and stores the recipe in the folder, whose lock this process holds; returns the checkpoint to resume from.

    Raises:
        ConfigError: the folder has a run of another recipe, or `resume` is "never" and it has a run.
        CheckpointError, ValueError: there is no such checkpoint, or it is damaged. The folder is as it was.
    """
    if has_begun(run_dir):
        if resume == "never":
            raise ConfigError(f"run_dir: {run_dir} holds a run already; choose another folder, or drop --resume never")
        check_same_recipe(run_dir, config)
    latest = resume in ("auto", "never")
    checkpoint = load_latest(run_dir / "checkpoints") if latest else load_checkpoint(resume)
    store_recipe(run_dir, config)
    return checkpoint


def write_samples(path: Path, rollouts: list[Rollout], limit: int = 64) -> None:
    """Writes the first `limit` scored responses as JSON lines."""
    make_folder(path.parent)
    rows = [
        {
            "prompt": [m["content"] for m in r.prompt.example.prompt],
            "response": r.text,
            "ground_truth": r.prompt.example.ground_truth,
            "reward": r.reward,
            "finished": r.finished,
        }
        for r in rollouts[:limit]
    ]
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def keep_evaluation(run_dir: Path, step: int, result: dict[str, Any], rollouts: list[Rollout]) -> None:
    """Writes results and responses of an evaluation to RUN/eval. Several processes may evaluate one run at a time.

    Raises:
        OSError: they cannot be written there, e.g. on a read-only disk.
    """
    folder = run_dir / "eval"
    make_folder(folder)
    with locked(folder, wait=True):
        clear_leftovers(folder)
        write_samples(folder / f"step_{step}.jsonl", rollouts, limit=len(rollouts))
        atomic_write(folder / f"step_{step}.json", (json.dumps(result, indent=1) + "\n").encode())
