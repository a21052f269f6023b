"""Checkpoints that stay loadable whenever the process is killed.

A checkpoint directory holds

    step_200/        model files, state.pt, manifest.json (name, size and sha256 of every file)
    step_300/
    latest           one line: step_300
    .lock            held while a checkpoint is written or leftovers are cleared away

`save_checkpoint` writes everything into `.tmp_step_N.<pid>`, fsyncs it, renames it to `step_N`, and only then writes
the name into `latest`. A `step_N` that already exists is first renamed to `.old_step_N.<pid>`; if the process dies
between the two renames, the next reader renames it back. So `latest` always names a complete checkpoint.
"""

import errno
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from entcov import arguments as check
from entcov.rl.record.durable import atomic_write, clear_leftovers, fsync_path, locked, make_folder
from entcov.rl.record.sealed import CheckpointError, damage, write_sealed

STATE = "state.pt"
_STEP = re.compile(r"step_(\d+)")
_OLD = re.compile(r"\.old_(step_\d+)\.\d+")
_PLAIN = (torch.Tensor, int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Checkpoint:
    """A stored checkpoint whose files have been checked against its manifest."""

    path: Path
    step: int

    @cached_property
    def state(self) -> dict[str, Any]:
        """The dictionary that was given to `save_checkpoint`, tensors on the CPU. Read on first use."""
        return load_plain(self.path / STATE, map_location="cpu")

    def file(self, name: str) -> Path:
        """The file or directory that the writer `name` wrote.

        Raises:
            CheckpointError: the checkpoint has no such entry.
        """
        if not (self.path / name).exists():
            raise CheckpointError(
                f"{self.path} has no entry {name!r}; it holds {sorted(p.name for p in self.path.iterdir())}"
            )
        return self.path / name


def save_checkpoint(
    directory: str | Path, step: int, writers: dict[str, Callable[[Path], None]], state: dict[str, Any], keep: int
) -> Path:
    """Store a checkpoint, make it the latest, and remove the oldest ones.

    Args:
        directory: of the checkpoints of the run; created if absent.
        step: >= 0. A stored checkpoint of the same step is replaced.
        writers: entry name -> function that writes a file, or a directory of files, at the path it is given.
        state: what else is needed to continue: tensors, numbers, strings, bytes and containers of them.
        keep: how many checkpoints to leave, counting this one and those of lower steps; >= 1. Higher steps (from before
            going back to an earlier checkpoint) stay until the run reaches and replaces them.

    Returns:
        The path `directory/step_N`.

    Raises:
        TypeError: `state` holds an object that a safe load would refuse; the message names its place.
        CheckpointError: writing failed (disk full, ...); earlier checkpoints and `latest` are as they were.
    """
    directory = Path(directory)
    _check_loadable(state, "state")
    make_folder(directory)
    with locked(directory, wait=True):
        _clear_leftovers(directory)
        temporary = directory / f".tmp_step_{step}.{os.getpid()}"
        entries = {**writers, STATE: lambda path: torch.save(state, path)}
        write_sealed(temporary, entries, f"step {step}", step=step)
        final, old = directory / f"step_{step}", directory / f".old_step_{step}.{os.getpid()}"
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        fsync_path(directory)
        try:
            atomic_write(directory / "latest", f"{final.name}\n".encode())
        except OSError as error:
            raise CheckpointError(
                f"step {step} is stored, and {directory / 'latest'} could not be moved to it"
            ) from error
        # From here on nothing depends on what is removed.
        shutil.rmtree(old, ignore_errors=True)
        for number in [n for n in list_steps(directory) if n <= step][:-keep]:
            _remove(directory, number)
    return final


def load_latest(directory: str | Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, checked against its manifest; None when nothing was stored yet.

    Leftovers of a killed process are cleared away, unless another process is writing here right now. A pointer that is
    missing (killed before the very first one was written) means the highest step.

    Raises:
        CheckpointError: the checkpoint is damaged. An earlier one is not taken instead: the message names the damaged
            file, the newest earlier step that is intact, and how to choose it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    try:
        with locked(directory, wait=False) as mine:
            if mine:
                _clear_leftovers(directory)
    except OSError as error:  # a checkpoint on a read-only disk can be loaded, and nothing can be cleared there
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    pointer = directory / "latest"
    steps = list_steps(directory)
    if not pointer.exists():
        return _load(directory, steps[-1]) if steps else None
    name = pointer.read_text(errors="replace").strip()
    if not (match := _STEP.fullmatch(name)):
        raise CheckpointError(f"{pointer} is damaged: it must name a checkpoint such as step_100, got {name[:80]!r}")
    return _load(directory, int(match[1]))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path` (a `step_N` directory), checked against its manifest.

    Raises:
        ValueError, FileNotFoundError: `path` cannot be a checkpoint, or is missing.
        CheckpointError: it is damaged; the message names the file.
    """
    path = Path(path)
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise ValueError(f"a checkpoint's directory is named step_N, got {path}")
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} is missing")
    step = int(match[1])
    if problem := damage(path, "checkpoint", step=step):
        raise CheckpointError(problem)
    return Checkpoint(path, step)


def load_plain(path: Path, *, map_location: str | torch.device) -> Any:
    """What `torch.save` wrote at `path`: tensors and plain values.

    Raises:
        ValueError: the file holds other objects, which could run code as they are loaded, or was not written by torch.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).partition("Please file an issue")[0]
        raise ValueError(
            f"{path}: must hold tensors and plain values as torch saves them, and cannot be loaded safely "
            f"({check.one_line(first)})"
        ) from error


def make_latest(checkpoint: Checkpoint) -> None:
    """Let `latest` name this one, so that a run that went back is not resumed from a later step if it dies at once."""
    atomic_write(checkpoint.path.parent / "latest", f"{checkpoint.path.name}\n".encode())


def list_steps(directory: str | Path) -> list[int]:
    """Steps of the checkpoints stored in `directory`, ascending, unchecked."""
    names = (_STEP.fullmatch(path.name) for path in Path(directory).iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def _load(directory: Path, step: int) -> Checkpoint:
    path = directory / f"step_{step}"
    problem = damage(path, "checkpoint", step=step)
    if problem is None:
        return Checkpoint(path, step)
    for earlier in reversed([n for n in list_steps(directory) if n < step]):
        if damage(directory / f"step_{earlier}", "checkpoint", step=earlier) is None:
            raise CheckpointError(
                f"{problem}. Step {earlier} is intact: to go back to it, --resume {directory / f'step_{earlier}'}"
            )
    raise CheckpointError(f"{problem}. No earlier step in {directory} is intact")


def _clear_leftovers(directory: Path) -> None:
    """Remove or undo unfinished work of killed processes. Only under the lock: then no other process writes here."""
    for path in list(directory.iterdir()):
        if match := _OLD.fullmatch(path.name):
            if (directory / match[1]).exists():
                shutil.rmtree(path)
            else:
                path.rename(directory / match[1])
    clear_leftovers(directory)


def _remove(directory: Path, step: int) -> None:
    """Delete a checkpoint; under another name first, so that a kill half way never leaves a damaged `step_N`."""
    doomed = directory / f".tmp_step_{step}.{os.getpid()}"
    (directory / f"step_{step}").rename(doomed)
    shutil.rmtree(doomed)


def _check_loadable(value: Any, place: str) -> None:
    """Raise TypeError for anything that `torch.load(weights_only=True)` would refuse."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            _check_loadable(key, f"the key {key!r} of {place}")
            _check_loadable(item, f"{place}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            _check_loadable(item, f"{place}[{index}]")
    elif kind not in _PLAIN and kind is not torch.nn.Parameter:
        raise TypeError(
            f"{place} has type {kind.__module__}.{kind.__qualname__}; a checkpoint's state may hold tensors, numbers, "
            "strings, bytes, None and dict, list, tuple, set of them"
        )
