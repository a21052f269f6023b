"""Writing files that survive a kill, a power cut or a full disk: short writes, fsync, replacement by rename, locks.

Unfinished files have a temporary name, `.tmp_NAME.PID`. The next process that holds the folder's lock removes those
of a killed one.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from entcov import arguments as check

LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = re.compile(r"\.tmp_.+\.\d+")


def write_all(fd: int, data: bytes) -> None:
    """`os.write` until every byte is out; a nearly full disk takes only part of a buffer before it refuses the rest."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def fsync_path(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make the folder and its parents where they are missing, so that they outlive a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def temporary_path(path: Path) -> Path:
    """Where this process prepares the content of `path`: in the same folder, under a name with its number."""
    return path.with_name(f".tmp_{path.name}.{os.getpid()}")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in `folder` under temporary names, but for the folders in it.

    Call it under the lock of the run or of the folder, so that no other process is writing there.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the folder's lock, which dies with the process; yields False if another holds it and `wait` is false.

    It is a POSIX lock: not passed on to children, and gone when this process closes any descriptor of the lock's file.

    Raises:
        OSError: the lock's file cannot be opened, e.g. on a read-only disk.
    """
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            yield False
            return
        yield True
    finally:
        os.close(fd)


def atomic_write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Give `path` the content `data` in one step: a reader, or a kill, sees the old content or the new, never a part.

    Args:
        mode: permissions of the new file, less the umask; also those of the temporary file.

    Raises:
        OSError: the new content could not be written; `path` is as it was.
    """
    temporary = temporary_path(path)
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with this number
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, path, "its earlier content is intact") from error
    fsync_path(path.parent)


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Raises OSError where safetensors raises its own error because the disk refuses a write."""
    try:
        yield
    except SafetensorError as error:
        number = next((number for number in _FULL if os.strerror(number) in str(error)), errno.EIO)
        raise OSError(number, f"cannot write {path}: {check.one_line(error)}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, a quota or a file-size limit is used up."""
    # torch raises a RuntimeError with the system's message.
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


def write_error(error: OSError, path: Path, consequence: str) -> OSError:
    """The same errno, with a message that names the file and says what the failure means for earlier data."""
    reason = {errno.EFBIG: "file size limit reached", errno.EDQUOT: "disk quota used up", errno.ENOSPC: "disk full"}
    why = reason.get(error.errno or 0, error.strerror or str(error))
    return OSError(error.errno, f"{why}: cannot write {path}; {consequence}")
