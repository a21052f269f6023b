"""What is forced to the disk, and in which order: every fsync and rename of a write, as the kernel is asked."""

from __future__ import annotations

import errno
import os

import pytest

from entcov.rl.data.stream import write_rows
from entcov.rl.record import durable
from entcov.rl.record.checkpoint import load_latest, save_checkpoint
from entcov.rl.record.durable import replace_file, write_all
from entcov.rl.record.metrics import RunLogger
from entcov.rl.types import Example


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """("fsync", path, bytes in the file) and ("rename", from, to), in order; paths are relative to tmp_path."""
    events = []

    def name(path):
        return os.path.relpath(path, tmp_path).replace(str(os.getpid()), "PID")

    def fsync(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        events.append(("fsync", name(path), None if os.path.isdir(path) else os.path.getsize(path)))

    def renaming(real):
        def rename(source, target, **options):
            real(source, target, **options)
            events.append(("rename", name(source), name(target)))

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    for operation in ("rename", "replace"):
        monkeypatch.setattr(os, operation, renaming(getattr(os, operation)))
    return events


def test_a_replaced_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_too(tmp_path, asked):
    (tmp_path / "latest").write_text("old")
    replace_file(tmp_path / "latest", b"step_3\n")
    assert asked == [
        ("fsync", ".tmp_latest.PID", 7),
        ("rename", ".tmp_latest.PID", "latest"),
        ("fsync", ".", None),
    ]
    assert os.listdir(tmp_path) == ["latest"] and (tmp_path / "latest").read_bytes() == b"step_3\n"


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_file_that_cannot_be_replaced_is_as_it_was_and_nothing_is_left(tmp_path, monkeypatch, failing):
    path = tmp_path / "latest"
    path.write_text("old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, failing, full)
    with pytest.raises(OSError, match="disk full: cannot write .*latest; its earlier content is intact"):
        replace_file(path, b"new")
    assert os.listdir(tmp_path) == ["latest"] and path.read_text() == "old"


def test_a_write_that_takes_a_part_goes_on_with_the_rest(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    write_all(fd, b"0123456789")
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_has_its_name_before_the_pointer_moves(tmp_path, asked):
    directory = tmp_path / "checkpoints"

    def folder(path):
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "vocab.json").write_text("{}")

    save_checkpoint(directory, 3, {"weights": lambda path: path.write_bytes(bytes(100)), "model": folder}, {}, keep=1)
    inside, step, pointer = "checkpoints/.tmp_step_3.PID", "checkpoints/step_3", "checkpoints/.tmp_latest.PID"
    named, moved = asked.index(("rename", inside, step)), asked.index(("rename", pointer, "checkpoints/latest"))
    before = asked[:named]
    for path in directory.glob("step_3/**/*"):  # each file with all its bytes, each folder with all its names
        stored = f"{inside}/{path.relative_to(directory / 'step_3')}"
        stored = f"{inside}/.tmp_manifest.json.PID" if path.name == "manifest.json" else stored
        assert ("fsync", stored, None if path.is_dir() else path.stat().st_size) in before, stored
    assert ("fsync", inside, None) in before[
        before.index(("rename", f"{inside}/.tmp_manifest.json.PID", f"{inside}/manifest.json")) :
    ]
    assert ("fsync", "checkpoints", None) in asked[named:moved]
    assert asked[moved:] == [("rename", pointer, "checkpoints/latest"), ("fsync", "checkpoints", None)]
    assert ("fsync", pointer, 7) in asked[named:moved]
    assert load_latest(directory).step == 3


def test_a_logged_step_is_on_the_disk_when_log_returns(tmp_path, asked):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"a": 1.0})
        assert asked == [("fsync", ".", None), ("fsync", "metrics.jsonl", len('{"step": 1, "a": 1.0}\n'))]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_dataset_is_on_the_disk_before_it_has_its_name(tmp_path, asked, suffix):
    write_rows([Example("mine", ({"role": "user", "content": "1+1="},), "2")], tmp_path / f"rows.{suffix}")
    temporary, size = f".rows.{suffix}.PID.tmp", (tmp_path / f"rows.{suffix}").stat().st_size
    assert asked[:2] == [("fsync", temporary, size), ("rename", temporary, f"rows.{suffix}")]
