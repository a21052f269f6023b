"""Writing files that survive a kill, a power cut or a full disk: short writes, fsync, and replacement by rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from entcov import _checks as check

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` the content `data` in one step: a reader, or a kill, sees the old content or the new, never a part.

    Raises:
        OSError: the new content could not be written; `path` is as it was.
    """
    temporary = path.with_name(f".tmp_{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
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
    """Makes an OSError of what safetensors raises where the disk refuses a write: it has an error of its own."""
    try:
        yield
    except SafetensorError as error:
        number = next((number for number in _FULL if os.strerror(number) in str(error)), errno.EIO)
        raise OSError(number, f"cannot write {path}: {check.one_line(error)}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, a quota or a file-size limit is used up."""
    return isinstance(error, OSError) and error.errno in _FULL


def write_error(error: OSError, path: Path, consequence: str) -> OSError:
    """The same error, same errno, in words that name the file and what the failure means for earlier data."""
    reason = {errno.EFBIG: "file size limit reached", errno.EDQUOT: "disk quota used up", errno.ENOSPC: "disk full"}
    why = reason.get(error.errno or 0, error.strerror or str(error))
    return OSError(error.errno, f"{why}: cannot write {path}; {consequence}")
