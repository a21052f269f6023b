"""The state of the controls in a checkpoint of verl's: the file entcov.json in the folder of the actor."""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from entcov.integrations.verl.training import Training

FILE = "entcov.json"


def save(training: Training, folder: str) -> None:
    """Writes the state, once on every file system that the ranks have. Every rank must call.

    With pipeline parallelism the last stage alone knows it, and tells the others.
    """
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, training.state_dict() if training.has_outputs else None)
    state = next(state for state in states if state is not None)
    path, rank = Path(folder) / FILE, dist.get_rank()
    for turn in (rank == 0, rank != 0):
        if turn and (rank == 0 or not path.exists() or json.loads(path.read_text()) != state):
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f"{FILE}.{rank}")
            with open(written, "w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, path)
        dist.barrier()


def read(folder: str) -> dict[str, Any]:
    """The stored state.

    Raises: FileNotFoundError, ValueError.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be there: the checkpoint was written without a loss mode of entcov, so the state of the "
            "controls is unknown. To begin with new controls, begin a new run from the checkpoint's weights"
        )
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from None
    if not isinstance(state, dict) or set(state) != {"step", "loss"}:
        raise ValueError(f"{path} must hold step and loss, got {str(state)[:80]}")
    return state


def restore(training: Training, state: dict[str, Any], folder: str) -> None:
    """Raises ValueError for the state of other controls."""
    try:
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(folder) / FILE}: {error}") from None
