"""What a disk would hold if the process, or the machine, stopped before any one of its file operations.

Three kinds of stop are derived from one recorded run:
    killed      everything that was written is there, also half of the write that was under way
    power cut   only what was fsynced is there: a file's content by an fsync of the file, its name by one of its folder
    reordered   every name is there, for file systems write them early, and of contents only what was fsynced
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tree = tuple[tuple[str, bytes | None], ...]  # path, and content of a file or None for a folder
_BEFORE = ("open", "write", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate")


class RecordedDisk:
    """Records the operations under `root` between `start` and `stop`.

    stops: tree -> the kind of stop, and what had been promised at that moment, the last time that it looked so.
    """

    def __init__(self, root: Path, promised: Callable[[], Any]):
        self.root, self.promised = str(root), promised
        self.stops: dict[Tree, tuple[str, Any]] = {}
        self.operations = 0
        self._content: dict[int, bytes] = {}  # inode -> as of its last fsync
        self._entries: dict[int, dict[str, tuple[int, bool]]] = {}  # folder's inode -> name -> inode, is a folder
        self._pins: list[int] = []  # descriptors that keep the kernel from using an inode's number again

    def start(self, patch: pytest.MonkeyPatch) -> None:
        for name in _BEFORE:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def stop(self) -> None:
        for fd in self._pins:
            os.close(fd)

    def _wrapped(self, name: str, real: Callable) -> Callable:
        def operation(*args, **kwargs):
            if not changes(name, args, self.root):
                return real(*args, **kwargs)
            self.operations += 1
            self._look()
            if name == "write" and len(args[1]) > 1:
                half = len(args[1]) // 2
                done = real(args[0], bytes(args[1][:half]))
                self._look()
                return done + real(args[0], bytes(args[1][half:]))
            if name != "fsync":
                return real(*args, **kwargs)
            self._synced(args[0])  # the real thing takes milliseconds, and the page cache is enough here
            return None

        return operation

    def _synced(self, fd: int) -> None:
        status = os.fstat(fd)
        self._pins.append(os.dup(fd))
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(fd) as entries:
                self._entries[status.st_ino] = {e.name: (e.inode(), e.is_dir(follow_symlinks=False)) for e in entries}
        else:
            self._content[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def _look(self) -> None:
        live = {"killed": [], "reordered": []}
        for path in sorted(Path(self.root).rglob("*")):
            name, folder = str(path.relative_to(self.root)), path.is_dir()
            live["killed"].append((name, None if folder else path.read_bytes()))
            live["reordered"].append((name, None if folder else self._content.get(path.stat().st_ino, b"")))
        trees = live | {"power cut": sorted(self.after_a_power_cut().items())}
        for kind, tree in trees.items():
            self.stops[tuple(tree)] = kind, self.promised()

    def after_a_power_cut(self) -> dict[str, bytes | None]:
        """What would be on the disk if the power failed now."""
        return dict(self._durable(os.stat(self.root).st_ino, ""))

    def _durable(self, folder: int, prefix: str):
        for name, (inode, is_folder) in self._entries.get(folder, {}).items():
            yield prefix + name, None if is_folder else self._content.get(inode, b"")
            if is_folder:
                yield from self._durable(inode, f"{prefix}{name}/")


def changes(name: str, args: tuple, root: str) -> bool:
    """Whether os.NAME(*args) writes under `root`."""
    if name == "open" and not args[1] & os.O_CREAT:
        return False
    place = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else os.fspath(args[0])
    # rmtree names files relative to an open folder; everything that it removes here is under the root.
    return place.startswith(root) or (name in ("unlink", "rmdir") and not os.path.isabs(place))


def lay_out(tree: Tree, root: Path) -> None:
    """The tree on the real disk, with the temporary names of another process."""
    own = f".{os.getpid()}"
    for name, content in tree:
        path = root / "/".join(
            part.removesuffix(own) + ".1" if part.endswith(own) else part for part in name.split("/")
        )
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def flip_bit(path: Path) -> None:
    """Damages a file in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
