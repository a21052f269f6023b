"""Sealed folders: `manifest.json` in them, written last, has the size and sha256 of every file.

Checkpoints, the reference policy and warm starts are sealed. A sealed folder is complete and on the disk before it gets
its name, and a flipped bit in it is found when it is read.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from entcov.rl.record.durable import atomic_write, fsync_path, is_disk_full, temporary_path
from entcov.rl.threads import submit

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_HASHING_THREADS = 8

Writers = Mapping[str, Callable[[Path], None]]  # entry name -> function that writes a file or folder at its path


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or what is stored is not what was written."""


def write_sealed(folder: Path, writers: Writers, what: str, **about: Any) -> None:
    """Make `folder` and its entries, and seal it. If that fails, nothing of it is left.

    Args:
        folder: must not exist; a temporary name if it replaces another.
        what: what it holds, for messages.
        about: further values of the manifest.

    Raises:
        CheckpointError: writing failed (disk full, ...).
    """
    current = folder
    try:
        folder.mkdir()
        for name, writer in writers.items():
            current = folder / name
            writer(current)
            if not current.exists():
                raise CheckpointError(f"the writer of {name!r} returned and wrote nothing at {current}")
        current = folder / MANIFEST
        _seal(folder, about)
    except BaseException as error:
        try:
            _explain(error, folder, current, what)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_sealed(final: Path, writers: Writers, what: str) -> None:
    """Replace the sealed folder `final`. After a kill on the way neither the old nor the new one may be there."""
    temporary = temporary_path(final)
    write_sealed(temporary, writers, what)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_path(final.parent)


def damage(folder: Path, what: str, **about: Any) -> str | None:
    """What is wrong with the sealed folder, or None.

    Args:
        what: what it is, for the message.
        about: values that its manifest must have.
    """
    manifest_path = folder / MANIFEST
    if not folder.is_dir():
        return f"{what} {folder} is missing"
    try:
        manifest = json.loads(manifest_path.read_bytes())
        version, files = manifest["format_version"], manifest["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:
        return f"{what} {folder} is damaged: {manifest_path} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{what} {folder} is damaged: {manifest_path} is not a manifest"
    if version != FORMAT_VERSION:
        return f"{what} {folder} has format version {version}, and this version of entcov reads {FORMAT_VERSION}"
    for key, value in about.items():
        if manifest.get(key) != value:
            return f"{what} {folder} is damaged: {manifest_path} says {key} {manifest.get(key)}"
    for name, (size, _) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{what} {folder} is damaged: {file} is missing"
        if file.stat().st_size != size:
            return f"{what} {folder} is damaged: {file} has {file.stat().st_size} bytes instead of {size}"
    for name, digest in zip(expected, _digests([folder / name for name in expected]), strict=True):
        if digest != expected[name][1]:
            return (
                f"{what} {folder} is damaged: the content of {folder / name} is not what was written (sha256 differs)"
            )
    return None


def _seal(folder: Path, about: dict[str, Any]) -> None:
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in written:
        fsync_path(path)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(written, _digests(written), strict=True)
    }
    manifest = {"format_version": FORMAT_VERSION, **about, "files": files}
    atomic_write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        fsync_path(inner)
    fsync_path(folder)
    fsync_path(folder.parent)


def _explain(error: BaseException, folder: Path, current: Path, what: str) -> None:
    """Raises CheckpointError for a failure of the disk. Call it before files are removed: it tests if it is full."""
    if not isinstance(error, Exception):
        return
    name = Path(getattr(error, "filename", None) or current).name
    # torch and safetensors turn ENOSPC into errors of their own, so the file system is tested as well.
    if is_disk_full(error) or _no_space_left(folder):
        raise CheckpointError(
            f"disk full: cannot write {name} of {what} in {folder.parent}; what was written of it is removed, earlier "
            "checkpoints are intact"
        ) from error
    if isinstance(error, OSError):
        raise CheckpointError(f"cannot write {name} of {what} in {folder.parent}: {error}") from error


def _no_space_left(folder: Path) -> bool:
    """Whether the file system refuses one more block."""
    probe = folder / ".probe"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    probe.unlink()
    return False


def _digests(paths: list[Path]) -> list[str]:
    """sha256 of each file, several at a time: a checkpoint of a large model has hundreds of gigabytes."""
    with ThreadPoolExecutor(min(_HASHING_THREADS, len(paths)) or 1) as pool:
        return [digest.result() for digest in [submit(pool, _sha256, path) for path in paths]]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
