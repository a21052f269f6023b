"""The state of the controls in a checkpoint of verl's: the file entcov.json in the folder of the actor."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from entcov.integrations import state_file
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
            state_file.write(path, state)
        dist.barrier()


def read(folder: str) -> dict[str, Any]:
    """The stored state.

    Raises: FileNotFoundError, ValueError.
    """
    advice = (
        "The checkpoint was written without a loss mode of entcov; to begin with new controls, begin a new run from "
        "its weights"
    )
    return state_file.read(Path(folder) / FILE, ("step", "loss"), advice)


def restore(training: Training, state: dict[str, Any], folder: str) -> None:
    """Raises ValueError for the state of other controls."""
    try:
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(folder) / FILE}: {error}") from None
