"""kill -9 at random moments, then the same command again: the metrics are those of the run that was never killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from entcov.rl.load_config import parse_config
from entcov.rl.record import checkpoint, sealed
from entcov.rl.run import train
from tests.support.tiny_run import recipe, timeless, token_files

STEPS = 10
KILLS = 16
SETTINGS = {
    "steps": STEPS,
    "token_record": {"every": 1},
    "control": ["clip_cov", "aent"],
    "controls": {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}, "aent": {"warmup": 1}},
}


def go_on(run_dir: str, slow_checkpoints: bool) -> None:
    """The child: one call of `train`. Slow checkpoints make it likely that a kill strikes while one is written."""
    if slow_checkpoints:
        quick = sealed._sha256
        sealed._sha256 = lambda path: (time.sleep(0.02), quick(path))[1]
    train(parse_config(recipe(run_dir, **SETTINGS)), display=False)


@pytest.mark.parametrize("slow_checkpoints", [False, True])
def test_killed_runs_end_like_the_one_that_was_left_alone(tmp_path, slow_checkpoints):
    context = multiprocessing.get_context("forkserver")  # children start from a server that has imported everything
    context.set_forkserver_preload(["tests.rl.test_kill"])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    started = time.monotonic()
    assert finish(context, straight, slow_checkpoints, after=None)
    whole = time.monotonic() - started
    rng = random.Random(0)
    kills = interrupted_checkpoints = 0
    done = False
    while kills < KILLS // 2 and not done:
        # Some die before the first checkpoint; most after a few steps, so that there is always something left to kill.
        # Of slow checkpoints every second kill waits until one is being written.
        aimed = slow_checkpoints and kills % 2 == 1
        done = finish(context, killed, slow_checkpoints, after=rng.uniform(0.0, 0.45 * whole), in_checkpoint=aimed)
        kills += not done
        interrupted_checkpoints += bool(list((killed / "checkpoints").glob(".tmp_*")))
        if done and kills < KILLS // 2:  # finished early: start another one
            assert timeless(killed) == timeless(straight)
            killed, done = tmp_path / f"killed_{kills}", False
    while not done:
        done = finish(context, killed, slow_checkpoints, after=None)
    assert timeless(killed) == timeless(straight)
    assert [row["step"] for row in timeless(killed)] == list(range(STEPS + 1))
    assert model_bytes(killed) == model_bytes(straight)
    assert token_files(killed) == token_files(straight) and len(token_files(straight)) > 12
    assert not slow_checkpoints or interrupted_checkpoints > 0


def finish(context, run_dir: Path, slow_checkpoints: bool, after: float | None, in_checkpoint: bool = False) -> bool:
    """Runs a child, kills it after so many seconds (and inside the next checkpoint); whether it came to its end."""
    child = context.Process(target=go_on, args=(str(run_dir), slow_checkpoints))
    child.start()
    child.join(after)
    while in_checkpoint and child.exitcode is None and not list((run_dir / "checkpoints").glob(".tmp_*/*")):
        child.join(0.002)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode == 0


def model_bytes(run_dir: Path) -> bytes:
    return (checkpoint.load_latest(run_dir / "checkpoints").file("model") / "model.safetensors").read_bytes()
