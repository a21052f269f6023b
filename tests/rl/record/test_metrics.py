"""The run's record: what is on the disk after a kill, a resume, a full disk or a wrong value."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from entcov.rl.record import durable
from entcov.rl.record.metrics import LOST, NONFINITE, RunLogger, read_metrics


def test_rows_come_back_exactly(tmp_path):
    rows = [{"actor/entropy": 0.1 + 0.2, "perf/total_num_tokens": 2**40 + 1}, {"actor/entropy": np.float32(1 / 3)}]
    with RunLogger(tmp_path / "run", tensorboard=False) as logger:
        logger.log(1, rows[0])
        logger.log(1, {"val-core/sums/acc/mean@1": 0.5})
        logger.log(2, rows[1])
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, **rows[0]},
        {"step": 1, "val-core/sums/acc/mean@1": 0.5},
        {"step": 2, "actor/entropy": float(np.float32(1 / 3))},
    ]


def test_nonfinite_values_are_null_and_counted(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"a": math.nan, "b": -math.inf, "c": 1.0})
        logger.log(2, {"a": 0.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == {"step": 1, "a": None, "b": None, "c": 1.0, NONFINITE: 2}
    assert NONFINITE not in second
    assert math.isnan(read_metrics(tmp_path)[0]["b"])


@pytest.mark.parametrize("value", ["0.5", None, True, [1.0], torch.tensor(1.0), 1j])
def test_a_value_that_is_no_number_is_an_error_that_names_its_key(tmp_path, value):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        with pytest.raises(TypeError, match=r"metric 'actor/entropy' must be a real number, got"):
            logger.log(1, {"actor/pg_loss": 0.1, "actor/entropy": value})
        logger.log(1, {"actor/entropy": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "actor/entropy": 0.5}]


def test_bad_steps_and_keys(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(5, {"a": 1})
        with pytest.raises(ValueError, match="last logged step 5, got 4"):
            logger.log(4, {"a": 1})
        with pytest.raises(TypeError, match="step must be an int, got float"):
            logger.log(6.0, {"a": 1})
        with pytest.raises(ValueError, match='other than "step", got \'step\''):
            logger.log(6, {"step": 1})
    with pytest.raises(RuntimeError, match="closed logger"):
        logger.log(7, {"a": 1})


def test_a_new_run_does_not_append_to_an_old_one(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"a": 1})
    with pytest.raises(FileExistsError, match="holds an earlier run's metrics"):
        RunLogger(tmp_path, tensorboard=False)


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "a', b'{"step": 5, "a": 5}', b"\0\0\0"])
def test_resume_cuts_after_the_checkpoint_and_drops_a_torn_line(tmp_path, torn):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        for step in range(5):
            logger.log(step, {"a": step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    with RunLogger(tmp_path, tensorboard=False, resume_step=2) as logger:
        with pytest.raises(ValueError, match="last logged step 2"):
            logger.log(1, {"a": 0})
        logger.log(3, {"a": 30})
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    with RunLogger(tmp_path, tensorboard=False, resume_step=-1) as logger:
        logger.log(0, {"a": 7})
    assert read_metrics(tmp_path) == [{"step": 0, "a": 7}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", [b"{broken\n", b"[1]\n", b'{"a": 1}\n', b"\xff\xfe\n", b'{"step": 2,\r"a": 2}}\n'])
def test_a_damaged_line_in_the_middle_is_named_and_a_resumed_run_sets_it_aside(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)
    with RunLogger(tmp_path, tensorboard=False, resume_step=3) as logger:
        logger.log(4, {"a": 4})
        logger.log(5, {"a": 5})
    said = capsys.readouterr().err
    assert f"{path}: damaged lines (2) were moved to metrics.damaged" in said
    assert f"{path}: the metrics of steps 2 are missing" in said
    assert (tmp_path / "metrics.damaged").read_bytes() == damage
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}, {"step": 4, "a": 4, LOST: 1}, {"step": 5, "a": 5}]


def test_lost_lines_are_told_and_counted(tmp_path, capsys):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        for step in range(10):
            logger.log(step, {})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[step] for step in (0, 1, 3, 7, 9)))  # 9 is after the checkpoint
    RunLogger(tmp_path, tensorboard=False, resume_step=8).close()
    assert "the metrics of steps 2, 4 to 6, 8 are missing. The run goes on from step 8" in capsys.readouterr().err
    path.unlink()
    with RunLogger(tmp_path, tensorboard=False, resume_step=2) as logger:
        logger.log(3, {})
    assert "the metrics of steps 1 to 2 are missing" in capsys.readouterr().err
    assert read_metrics(tmp_path) == [{"step": 3, LOST: 2}]


def test_nothing_is_said_of_what_a_resumed_run_cuts(tmp_path, capsys):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        for step in range(5):
            logger.log(step, {})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "torn')
    RunLogger(tmp_path, tensorboard=False, resume_step=3).close()
    RunLogger(tmp_path, tensorboard=False, resume_step=-1).close()
    assert capsys.readouterr().err == ""


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path)


def test_every_logged_step_survives_kill_9(tmp_path):
    """The child reports a step only after log() returned; the kill comes from outside, between any two instructions."""
    program = f"""
from entcov.rl.record.metrics import RunLogger
logger = RunLogger({str(tmp_path)!r}, tensorboard=False)
for step in range(100_000):
    logger.log(step, {{f"key_{{i}}": step + i / 7 for i in range(40)}})
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if int(line) >= 25:
                child.send_signal(signal.SIGKILL)
                break
        reported = [25, *map(int, child.stdout.read().split())]
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(len(steps))) and steps[-1] >= reported[-1]


def test_full_disk_loses_nothing_earlier(tmp_path, monkeypatch):
    """A disk that takes half a line and then refuses: the half is removed, and logging goes on once there is room."""
    real = os.write
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"a": 1.0})

        def full(fd, data):
            if len(data) <= 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, bytes(data[: len(data) - 5]))

        monkeypatch.setattr(durable.os, "write", full)
        with pytest.raises(OSError, match=r"disk full: cannot write .*\.jsonl; step 2 is not recorded") as caught:
            logger.log(2, {"a": 2.0})
        assert caught.value.errno == errno.ENOSPC
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "a": 1.0}\n'
        monkeypatch.undo()
        logger.log(2, {"a": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_file_size_limit_of_the_kernel(tmp_path):
    """The same with the kernel refusing: RLIMIT_FSIZE lets the file grow to 1000 bytes."""
    program = f"""
import resource
from entcov.rl.record.metrics import RunLogger
logger = RunLogger({str(tmp_path)!r}, tensorboard=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for step in range(100):
    logger.log(step, {{"actor/entropy": step / 3}})
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "file size limit reached: cannot write" in child.stderr and "metrics.jsonl" in child.stderr
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(len(steps))) and len(steps) > 15
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def _tensorboard_scalars(run_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    with RunLogger(tmp_path) as logger:
        for step in range(1, 6):
            logger.log(step, {"actor/entropy": float(step)})
    with RunLogger(tmp_path, resume_step=3) as logger:
        for step in range(4, 7):
            logger.log(step, {"actor/entropy": 10.0 * step})
    assert _tensorboard_scalars(tmp_path, "actor/entropy") == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_tensorboard_events_are_on_disk_when_log_returns(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log(1, {"actor/entropy": 2.5})
    assert _tensorboard_scalars(tmp_path, "actor/entropy") == [(1, 2.5)]
    logger.close()


@pytest.mark.parametrize("module, settings", [("wandb", {"wandb": {}}), ("torch.utils.tensorboard", {})])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, settings):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=f"pip install {module.split('.')[-1]}"):
        RunLogger(tmp_path, tensorboard="tensorboard" in module, **settings)
    RunLogger(tmp_path, tensorboard=False).close()  # the failed attempt holds no lock and left no metrics


def test_wandb_gets_the_metrics_and_a_resumed_run_keeps_its_page(tmp_path, monkeypatch):
    """W&B needs an account, so a recorder stands in for the package: what it is told is the contract."""
    calls = []
    run = types.SimpleNamespace(
        id="abc123",
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    package = types.ModuleType("wandb")
    package.init = lambda **settings: calls.append(("init", settings)) or run
    monkeypatch.setitem(sys.modules, "wandb", package)
    with RunLogger(tmp_path, tensorboard=False, wandb={"project": "p"}) as logger:
        logger.log(1, {"a": 1.0})
    with RunLogger(tmp_path, tensorboard=False, wandb={"project": "p"}, resume_step=1):
        pass
    assert calls == [
        ("init", {"dir": str(tmp_path), "project": "p"}),
        ("log", 1, {"a": 1.0}),
        ("finish",),
        ("init", {"dir": str(tmp_path), "id": "abc123", "resume": "allow", "project": "p"}),
        ("finish",),
    ]
