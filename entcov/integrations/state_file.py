"""The file beside a trainer's checkpoint that keeps the state of the controls."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, state: Any) -> None:
    """Writes a JSON tree, to a temporary name first; on the disk when this returns. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path, keys: tuple[str, ...], advice: str) -> dict[str, Any]:
    """The stored mapping, which must have these keys.

    Raises: FileNotFoundError with `advice` (what to do without the file); ValueError for other content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must hold the state of entcov's controls, which is not there. {advice}")
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from None
    if not isinstance(state, dict) or set(state) != set(keys):
        raise ValueError(f"{path} must hold {' and '.join(keys)}, got {str(state)[:80]}")
    return state
