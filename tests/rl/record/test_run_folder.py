"""Whose a run's folder is, and that what a run needs from it is what was written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from entcov.cli import main
from entcov.rl.load_config import load_config, parse_config
from entcov.rl.recipe import ConfigError
from entcov.rl.record import run_folder
from entcov.rl.record.checkpoint import list_steps, load_latest
from entcov.rl.record.metrics import read_metrics
from entcov.rl.run import evaluate_run, train
from tests.support.recorded_disk import flip_bit
from tests.support.tiny_run import recipe
from tests.support.toy_run import ToyBackend, outcome, toy_train, unfinished


@pytest.mark.parametrize("damage", [flip_bit, lambda path: os.truncate(path, 100), os.unlink])
def test_a_reference_policy_that_is_not_what_was_written_is_refused(tmp_path, damage):
    toy_train(tmp_path, steps=1)
    damage(tmp_path / "reference" / "weights.pt")
    with pytest.raises(
        RuntimeError, match=r"reference policy .*reference is damaged: .*weights\.pt.*compares with the reference"
    ):
        toy_train(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_shared_warm_start_that_is_not_what_was_written_is_refused(tmp_path):
    settings = {"warm_start.cache_dir": str(tmp_path / "cache"), "warm_start.steps": 2, "steps": 0, "eval.prompts": 0}
    train(parse_config(recipe(tmp_path / "first", **settings)), display=False)
    (weights,) = (tmp_path / "cache").glob("*/model.safetensors")
    flip_bit(weights)
    with pytest.raises(RuntimeError, match=r"the warm start .* is damaged: the content of .*; remove the folder"):
        train(parse_config(recipe(tmp_path / "second", **settings)), display=False)


class CannotBuild(ToyBackend):
    def build_actor(self, *arguments):
        raise ValueError("model: no such thing")


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="no such thing"):
        toy_train(tmp_path / "run", CannotBuild(), **{"actor.lr": 1.0})
    toy_train(tmp_path / "run", **{"actor.lr": 2.0})
    assert load_config(tmp_path / "run" / "config.yaml").actor.lr == 2.0
    with pytest.raises(ConfigError, match=r"another recipe.*:\n  actor.lr: was 2.0, is 3.0$"):
        toy_train(tmp_path / "run", **{"actor.lr": 3.0})
    toy_train(tmp_path / "alone", **{"actor.lr": 2.0})
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


def test_a_logged_step_makes_the_folder_its_recipes(tmp_path):
    with pytest.raises(RuntimeError, match="the first step fails"):
        toy_train(tmp_path, FailingFirstStep(), **{"token_record.max_mb": 0})  # a record scores before the first step
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "checkpoints" / "step_0").rename(tmp_path / "elsewhere")
    assert len(read_metrics(tmp_path)) == 1
    with pytest.raises(ConfigError, match="another recipe"):
        toy_train(tmp_path, seed=1)


class FailingFirstStep(ToyBackend):
    def actor(self, actor):
        def compute_logprobs(batch):
            raise RuntimeError("the first step fails")

        actor.compute_logprobs = compute_logprobs
        return actor


def test_a_lock_that_another_process_holds_is_respected(tmp_path):
    (tmp_path / ".tmp_config.yaml.77").write_text("work in progress")
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", program, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"\n"
        with pytest.raises(RuntimeError, match=f"{tmp_path} is in use by another process"), run_folder.held(tmp_path):
            pass
        assert unfinished(tmp_path) != []
        child.communicate(b"\n")
    with run_folder.held(tmp_path):
        assert unfinished(tmp_path) == []


HOLD = """
import sys
from tests.rl.record.test_run_folder import Failing, toy_train
def hold():
    print("held", flush=True)
    sys.stdin.read()
toy_train(sys.argv[1], Failing("actor", "compute_logprobs", 1, hold), steps=3)
"""


def test_a_folder_in_use_is_refused_before_anything_in_it_changes(tmp_path):
    run = tmp_path / "run"
    toy_train(run)
    with subprocess.Popen([sys.executable, "-c", HOLD, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        (run / "samples" / ".tmp_step_9.jsonl.77").write_text("work in progress")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(RuntimeError, match=rf"{run} is in use by another process"):
            toy_train(run, steps=5, **{"eval.samples": 2})
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    toy_train(run, steps=4)
    assert unfinished(run) == []


def test_a_refused_recipe_changes_nothing(tmp_path):
    toy_train(tmp_path)
    flip_bit(tmp_path / "checkpoints" / "step_2" / "state.pt")
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RuntimeError, match="is damaged"):
        toy_train(tmp_path, steps=9)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_leftovers_of_killed_processes_go_and_other_files_stay(tmp_path):
    toy_train(tmp_path)
    left = [".tmp_config.yaml.77", "samples/.tmp_step_2.jsonl.77", ".tmp_reference.77/weights.pt"]
    others = ["samples/.tmp_mine", ".tmp_x.txt", "notes.77"]
    for name in left + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    toy_train(tmp_path, steps=3)
    assert not any((tmp_path / name).exists() for name in left) and not (tmp_path / ".tmp_reference.77").exists()
    assert all((tmp_path / name).exists() for name in others)


@pytest.mark.parametrize("reason", ["a read-only disk", "a file in the way"])
def test_eval_prints_its_table_where_it_cannot_keep_it(tmp_path, monkeypatch, capsys, reason):
    run = tmp_path / "run"
    config = recipe(run, steps=0, **{"warm_start.steps": 0, "eval.prompts": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--no-display"]) == 0
    if reason == "a read-only disk":

        def refuse(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(run_folder, "make_folder", refuse)
    else:
        (run / "eval").write_text("")
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    wanted = {"a read-only disk": "Read-only file system", "a file in the way": "File exists"}[reason]
    assert f"{run}, step 0; metrics and responses could not be kept: " in shown[0] and wanted in shown[0]
    assert shown[-1].startswith("entcov/carry_arithmetic") and len(shown) == 4
    with pytest.raises(OSError, match=wanted):
        evaluate_run(parse_config(config))


def test_an_evaluation_clears_what_a_killed_one_has_left(tmp_path):
    toy_train(tmp_path, steps=1)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / ".tmp_step_1.jsonl.77").write_text("half")
    run_folder.keep_evaluation(tmp_path, 1, {}, [])
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [".lock", "step_1.json", "step_1.jsonl"]


@pytest.mark.parametrize("every", [0, 2, 3])
def test_the_last_step_is_stored_whatever_the_interval(tmp_path, every):
    toy_train(tmp_path, **{"steps": 3, "checkpoint.every": every, "checkpoint.keep": 9})
    assert list_steps(tmp_path / "checkpoints") == {0: [0, 3], 2: [0, 2, 3], 3: [0, 3]}[every]


# ---- the end of a run that ends early --------------------------------------------------------------------------------

RARE = {"checkpoint.every": 0, "steps": 6, "eval.every": 2, "token_record.max_mb": 0}  # a record scores once more


class Failing(ToyBackend):
    """Calls `act` at the n-th call of one of its parts' methods."""

    def __init__(self, part: str, method: str, at: int, act):
        self.part, self.method, self.at, self.act = part, method, at, act

    def actor(self, actor):
        return self._failing(actor) if self.part == "actor" else actor

    def sampler(self, sampler):
        return self._failing(sampler) if self.part == "sampler" else sampler

    def _failing(self, part):
        real, calls = getattr(part, self.method), 0

        def method(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == self.at:
                self.act()
            return real(*args, **kwargs)

        setattr(part, self.method, method)
        return part


def boom():
    raise RuntimeError("boom")


def assert_goes_on_from(run, step, tmp_path, **settings):
    assert load_latest(run / "checkpoints").step == step
    toy_train(run, **RARE | settings)
    toy_train(tmp_path / "straight", **RARE | settings)
    assert outcome(run) == outcome(tmp_path / "straight")


# `generate` is called once before the first step, once in each step, and in evaluations after steps 2 and 4.
@pytest.mark.parametrize(
    "part, method, at, error",
    [
        ("sampler", "generate", 6, boom),  # the rollouts of step 4
        ("actor", "compute_logprobs", 4, boom),
        ("actor", "compute_logprobs", 4, lambda: signal.raise_signal(signal.SIGUSR1)),
        ("sampler", "generate", 7, boom),  # the evaluation after step 4
    ],
    ids=["rollouts", "scores", "interrupted outside of the handler", "evaluation"],
)
def test_a_step_that_fails_before_its_update_loses_nothing_before_it(tmp_path, capsys, part, method, at, error):
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        toy_train(tmp_path / "run", Failing(part, method, at, error), **RARE)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    step = 4 if at == 7 else 3
    assert f"the state after step {step} is stored" in capsys.readouterr().err
    assert load_latest(tmp_path / "run" / "checkpoints").step == step
    if step == 3:  # that of step 4 lacks its evaluation
        assert_goes_on_from(tmp_path / "run", 3, tmp_path)
    else:
        toy_train(tmp_path / "run", **RARE)
        assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(7))


def test_rollouts_that_were_sampled_ahead_are_stored_as_the_step_found_them(tmp_path):
    ahead = {"rollout.sampler": "vllm", "rollout.max_staleness": 1}  # the toy engine brings its own sampler
    with pytest.raises(RuntimeError, match="boom"):
        toy_train(tmp_path / "run", Failing("actor", "compute_logprobs", 4, boom), **RARE | ahead)
    assert_goes_on_from(tmp_path / "run", 3, tmp_path, **ahead)


def test_a_step_that_fails_in_its_update_is_not_stored(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="boom"):
        toy_train(tmp_path / "run", Failing("actor", "update", 4, boom), **RARE)
    said = capsys.readouterr().err
    assert (
        "steps 1 to 3 are lost: step 4 has begun to change the weights. The latest checkpoint is that of step 0" in said
    )
    assert_goes_on_from(tmp_path / "run", 0, tmp_path)


def test_nothing_earlier_is_removed_for_a_state_that_may_be_the_failures_cause(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        toy_train(tmp_path, Failing("actor", "compute_logprobs", 5, boom), **RARE | {"checkpoint.every": 3})
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_3", "step_4"]


def test_a_failure_whose_state_cannot_be_stored_says_both(tmp_path, capsys, monkeypatch):
    class Full(Failing):
        def save(self, directory, step, *args):
            if step:
                raise OSError(errno.ENOSPC, "disk full")
            super().save(directory, step, *args)

    with pytest.raises(RuntimeError, match="boom"):
        toy_train(tmp_path, Full("actor", "compute_logprobs", 2, boom), **RARE)
    assert "step 1 is lost: storing the state failed: [Errno 28] disk full. The latest" in capsys.readouterr().err


@pytest.fixture
def default_signals():
    """As in a terminal; a shell's background jobs ignore SIGINT, and a run leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("method", ["compute_logprobs", "update"])
def test_a_signal_waits_for_the_step_and_its_checkpoint(tmp_path, capfd, default_signals, number, method):
    def strike():
        signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as caught:
        toy_train(tmp_path / "run", Failing("actor", method, 3, strike), **RARE)
    assert caught.value.args == (number,)
    assert "stopping when this step is done and stored; Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_goes_on_from(tmp_path / "run", 3, tmp_path)


def test_a_second_interrupt_does_not_wait(tmp_path, capsys, monkeypatch, default_signals):
    def strike():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun's copy of the same Ctrl-C
        signal.raise_signal(signal.SIGTERM)
        passed = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: passed)
        signal.raise_signal(signal.SIGTERM)
        reached.append(True)
        signal.raise_signal(signal.SIGINT)

    reached = []
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path, Failing("actor", "compute_logprobs", 3, strike), **RARE)
    assert reached == [True]
    said = capsys.readouterr().err
    assert "steps 1 to 2 are lost: a second interrupt does not wait for a checkpoint" in said
    assert load_latest(tmp_path / "checkpoints").step == 0


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path):
    def strike():
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as caught:
        toy_train(tmp_path, Failing("sampler", "generate", 1, strike), **RARE)
    assert caught.value.args == (signal.SIGTERM,) and load_latest(tmp_path / "checkpoints") is None


def test_a_step_that_fails_after_a_signal_says_so_and_stops(tmp_path, capsys):
    def strike():
        signal.raise_signal(signal.SIGTERM)
        boom()

    with pytest.raises(KeyboardInterrupt) as caught:
        toy_train(tmp_path, Failing("actor", "compute_logprobs", 3, strike), **RARE)
    assert caught.value.args == (signal.SIGTERM,) and load_latest(tmp_path / "checkpoints").step == 2
    assert "the run was to stop, and failed before it could: boom" in capsys.readouterr().err


def test_sigterm_of_the_command(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(recipe(tmp_path / "run", steps=100_000, **{"checkpoint.every": 0, "eval.prompts": 0}))
    )
    command = [sys.executable, "-m", "entcov", "train", str(path), "--no-display"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        rows = tmp_path / "run" / "metrics.jsonl"
        while not (rows.exists() and rows.read_bytes().count(b"\n") >= 2):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        said = child.stderr.read()
        assert child.wait() == 143
    assert "stopped; the same command goes on from the latest checkpoint" in said and "Traceback" not in said
    step = load_latest(tmp_path / "run" / "checkpoints").step
    assert step == read_metrics(tmp_path / "run")[-1]["step"] >= 2
