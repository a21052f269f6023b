"""A run that stops, or finds the disk full, at any one of its file operations, and is started again.

The run is the trainer's own code on a toy policy (tests/support/toy_run.py): it takes the folder, keeps a reference
policy, evaluates, logs, stores two checkpoints and removes the first. However it has stopped, the same command goes on
from what had been promised or later, ends as the run that nothing has struck, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from entcov.rl import run
from entcov.rl.record import checkpoint, metrics
from entcov.rl.record.checkpoint import CheckpointError, load_latest
from entcov.rl.record.durable import make_folder, replace_file
from entcov.rl.record.metrics import read_metrics
from entcov.rl.record.sealed import replace_sealed
from tests.support.recorded_disk import RecordedDisk, changes, lay_out
from tests.support.toy_run import outcome, toy_train, unfinished


class Promises:
    """What the run has been told is on the disk."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.checkpoint, self.rows = -1, 0
        save, log = checkpoint.save_checkpoint, metrics.RunLogger.log

        def saved(directory, step, *args):
            save(directory, step, *args)
            self.checkpoint = step

        def logged(logger, step, values):
            log(logger, step, values)
            self.rows = step + 1

        patch.setattr("entcov.rl.engine.save_checkpoint", saved)
        patch.setattr(run.RunLogger, "log", logged)

    def now(self) -> tuple[int, int]:
        return self.checkpoint, self.rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The outcome of the run that nothing strikes."""
    folder = tmp_path_factory.mktemp("straight")
    toy_train(folder, steps=1)
    return outcome(folder)


@pytest.fixture
def quick_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def assert_goes_on(folder, promised, straight, capsys) -> None:
    stored, rows = promised
    latest = load_latest(folder / "checkpoints")
    assert (-1 if latest is None else latest.step) >= stored
    if rows:
        assert [row["step"] for row in read_metrics(folder)][:rows] == list(range(rows))
    toy_train(folder, steps=1)
    assert outcome(folder) == straight
    assert unfinished(folder) == []
    assert capsys.readouterr().err == ""  # nothing of the record was lost


def test_a_stop_before_any_file_operation(tmp_path, straight, quick_sync, capsys):
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "disk").mkdir()
        disk = RecordedDisk(tmp_path / "disk", Promises(patch).now)
        disk.start(patch)
        toy_train(tmp_path / "disk" / "run", steps=1)
    disk.stop()
    assert outcome(tmp_path / "disk" / "run") == straight
    capsys.readouterr()
    assert disk.operations > 70 and len(disk.stops) > 50
    for tree, (kind, promised) in disk.stops.items():
        root = tmp_path / "stopped"
        lay_out(tree, root)
        try:
            assert_goes_on(root / "run", promised, straight, capsys)
        except BaseException as error:
            names = "\n".join(f"  {name}" for name, _ in tree)
            raise AssertionError(f"{kind} where checkpoint and rows {promised} were promised:\n{names}") from error
        shutil.rmtree(root)


RETURNED = {
    "replace_file": (lambda root: replace_file(root / "file", b"content"), "file"),
    "make_folder": (lambda root: make_folder(root / "a" / "b" / "c"), "a/b/c"),
    "replace_sealed": (
        lambda root: replace_sealed(root / "sealed", {"w": lambda path: path.write_bytes(b"content")}, "a thing"),
        "sealed/w",
    ),
    "RunLogger.log": (lambda root: metrics.RunLogger(root, tensorboard=False).log(1, {}), "metrics.jsonl"),
    "save_checkpoint": (lambda root: checkpoint.save_checkpoint(root, 1, {}, {}, keep=1), "latest"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_has_returned_survives_a_power_cut(tmp_path, name):
    action, path = RETURNED[name]
    with pytest.MonkeyPatch.context() as patch:
        disk = RecordedDisk(tmp_path, lambda: None)
        disk.start(patch)
        action(tmp_path)
        left = disk.after_a_power_cut()
    disk.stop()
    assert path in left and left[path] != b""


def test_a_disk_that_is_full_from_any_file_operation_on(tmp_path, straight, quick_sync, capsys):
    number, finished = 0, False
    while not finished:
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            promises = Promises(patch)
            fill(patch, str(folder.parent), number)
            try:
                toy_train(folder, steps=1)
                finished = True
            except (OSError, CheckpointError) as error:
                assert "full" in str(error) or "No space left" in str(error)
        capsys.readouterr()  # says what is lost
        assert_goes_on(folder, promises.now(), straight, capsys)
        shutil.rmtree(folder.parent)
        number += 1
    assert number > 60


def fill(patch: pytest.MonkeyPatch, root: str, number: int) -> None:
    """The operations that need room fail from the `number`-th on; a write may bring out half of its data before."""
    seen = 0

    def wrapped(name, real):
        def operation(*args, **kwargs):
            nonlocal seen
            if not changes(name, args, root):
                return real(*args, **kwargs)
            seen += 1
            if seen <= number:
                return real(*args, **kwargs)
            if name == "write" and len(args[1]) > 1 and seen == number + 1:
                return real(args[0], bytes(args[1][: len(args[1]) // 2]))
            raise OSError(errno.ENOSPC, "No space left on device")

        return operation

    for name in ("open", "write", "fsync", "mkdir", "rename", "replace"):
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
