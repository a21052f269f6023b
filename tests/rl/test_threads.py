"""A machine that gives no further thread: work is done in the calling thread, and a run ends as it would have."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from entcov.report.run_matrix import Job, run_matrix
from entcov.rl import threads
from entcov.rl.record.checkpoint import load_checkpoint, save_checkpoint
from entcov.rl.record.progress import Progress, RunsProgress
from tests.support.toy_run import outcome, toy_train


@pytest.fixture
def no_threads(monkeypatch):
    """No thread starts but the first `allowed`."""
    threads.say.cache_clear()
    start, state = threading.Thread.start, {"allowed": 0}

    def refuse(thread):
        if not state["allowed"]:
            raise RuntimeError("can't start new thread")
        state["allowed"] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return state


def test_a_run_without_further_threads_is_the_same_run(tmp_path, no_threads, capsys):
    toy_train(tmp_path / "without", **{"logging.tensorboard": True})
    said = capsys.readouterr().err
    assert "this run goes on without TensorBoard" in said
    assert said.count("work is done one after the other") == 1  # once, though every checkpoint has met it
    no_threads["allowed"] = 1000
    toy_train(tmp_path / "with")
    assert outcome(tmp_path / "without") == outcome(tmp_path / "with")


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_every_piece_of_work_is_done_once(no_threads, allowed):
    no_threads["allowed"], done = allowed, []

    def work(number):
        done.append(number)
        if number == 7:
            raise KeyError("seven")
        return number * number

    with ThreadPoolExecutor(4) as pool:
        futures = [threads.submit(pool, work, number) for number in range(20)]
    assert sorted(done) == list(range(20))
    assert [f.result() for f in futures if f is not futures[7]] == [n * n for n in range(20) if n != 7]
    with pytest.raises(KeyError, match="seven"):
        futures[7].result()


def test_other_errors_of_a_pool_are_not_taken_for_a_missing_thread():
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(pool, int)


def test_work_in_the_background_is_done_before_where_there_is_no_thread(no_threads, capsys):
    assert threads.in_background(threading.get_ident, "rollouts").result() == threading.get_ident()
    assert "rollouts does not go on beside other work" in capsys.readouterr().err

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # an interrupt ends the run, not one piece of its work
        threads.in_background(interrupted, "rollouts")


def test_a_checkpoint_is_stored_and_checked(tmp_path, no_threads):
    save_checkpoint(tmp_path, 1, {"w": lambda path: path.write_bytes(b"weights")}, {}, keep=1)
    assert load_checkpoint(tmp_path / "step_1").step == 1


@pytest.mark.parametrize("kind", ["one run", "several runs"])
def test_a_display_that_cannot_move_becomes_lines(no_threads, capsys, kind):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    if kind == "one run":
        with Progress(2, "tiny", True, console=console) as progress:
            progress.update(1, {"actor/entropy": 0.5})
        line = "step 1/2  entropy 0.500 nats"
    else:
        with RunsProgress(["a"], 2, True, console=console) as progress:
            progress.state("a", "finished")
        line = "[1/1] a: finished"
    assert line in console.file.getvalue()
    assert "no live display, plain lines instead" in capsys.readouterr().err


def test_a_matrix_runs_its_jobs_one_after_the_other(tmp_path, no_threads):
    jobs = [Job(name, ("true",), tmp_path / name) for name in "abc"]
    assert run_matrix(jobs, 2, display=False) == []
    assert all((tmp_path / name / "finished.json").exists() for name in "abc")
