"""The frame of studies: parts are stored, not made twice, and belong to their arguments; pages; the command."""

import json
import multiprocessing
import os
import time
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from entcov.cli import main
from entcov.rl.record.progress import PartsProgress
from entcov.studies import base, catalogue
from entcov.studies.base import How, StudyError, run_parts
from entcov.studies.page import run_study
from tests.support.study_parts import InlinePool, Traced, waits


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(base, "ProcessPoolExecutor", InlinePool)


def how(tmp_path, **others):
    return How(tmp_path / "study", display=False, **others)


def test_parts_are_stored_and_not_made_again(inline, tmp_path):
    study = Traced(tmp_path)
    first = run_parts(study.parts(False), how(tmp_path))
    assert list(first) == [f"part {n}/of it" for n in range(3)] and study.calls() == [0, 1, 2]
    assert first["part 1/of it"]["nan"] is None  # what JSON holds is what findings see
    assert run_parts(study.parts(False), how(tmp_path)) == first and study.calls() == [0, 1, 2]
    (stored,) = (tmp_path / "study/parts").glob("part_2*")
    stored.unlink()
    run_parts(study.parts(False), how(tmp_path))
    assert study.calls() == [0, 1, 2, 2]


def test_a_part_of_other_arguments_is_refused(inline, tmp_path):
    run_parts(Traced(tmp_path).parts(False), how(tmp_path))
    with pytest.raises(ValueError, match=r"part_1.*holds tests.support.study_parts.made .* asks for .*remove it"):
        run_parts(Traced(tmp_path, scale=5).parts(False), how(tmp_path))


def test_a_failed_part_is_named_and_keeps_the_others(inline, tmp_path):
    study = Traced(tmp_path)
    (tmp_path / "broken").touch()
    with pytest.raises(StudyError, match=r"^part 1/of it: ArithmeticError: number 1 is broken$"):
        run_parts(study.parts(False), how(tmp_path))
    (tmp_path / "broken").unlink()
    kept = len(list((tmp_path / "study/parts").glob("*.json")))
    before = study.calls()
    assert len(run_parts(study.parts(False), how(tmp_path))) == 3
    assert len(study.calls()) - len(before) == 3 - kept


def test_two_processes_at_a_time(tmp_path):
    found = run_parts(Traced(tmp_path, count=6).parts(False), how(tmp_path, jobs=2))
    assert [own["number"] for own in found.values()] == list(range(6))
    processes = {own["process"] for own in found.values()}
    assert 1 <= len(processes) <= 2 and os.getpid() not in processes


def test_workers_end_with_a_killed_study(tmp_path):
    slow = partial(waits, tmp_path)
    runner = multiprocessing.get_context("spawn").Process(
        target=run_parts, args=({"slow": slow}, How(tmp_path / "study", display=False))
    )
    runner.start()
    told = tmp_path / "process"
    until(lambda: told.exists() and told.read_text())
    worker = int(told.read_text())
    assert running(worker)
    runner.kill()
    runner.join()
    until(lambda: not running(worker))
    assert not list((tmp_path / "study/parts").glob("*.json"))


def running(process: int) -> bool:
    """Not merely a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_page_holds_statements_tables_and_every_number(inline, tmp_path):
    shown = StringIO()
    files = run_study(
        Traced(tmp_path), how(tmp_path, smoke=True), tmp_path / "page", command="the command",
        console=Console(file=shown, width=100),
    )  # fmt: skip
    assert sorted(path.name for path in files) == ["study.json", "study.md"]
    text = (tmp_path / "page/study.md").read_text()
    for piece in ("# A title", "How many?", "the command", "proves nothing", "The sum is 0.", "| part 0/of it | 0 |"):
        assert piece in text
    assert "The sum is 0." in shown.getvalue()
    kept = json.loads((tmp_path / "page/study.json").read_text())
    assert kept["study"] == "traced" and kept["smoke"] is True and kept["results"]["part 0/of it"]["number"] == 0


def test_progress_in_a_log(tmp_path):
    text = StringIO()
    with PartsProgress(4, console=Console(file=text)) as progress:
        assert progress.seconds_left() is None
        progress.stored(2)
        progress.done("a [b]", 61.0)
        left = progress.seconds_left()
    assert text.getvalue() == "[2/4] 2 were done before\n[3/4] a [b]: 1:01\n"
    assert left is not None and 0 <= left < 5


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nosuch"], "NAME: must be one of"),
        (["traced", "--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["traced", "--out", "FILE"], "--out: must be a folder, and"),
        (["traced", "--page", "FILE"], "--page: must be a folder, and"),
        (["traced", "--arms", "none"], "--arms: is for studies of training runs, which traced is not"),
    ],
)
def test_the_command_refuses(inline, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setitem(catalogue.STUDIES, "traced", Traced(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    assert main(["study", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_fails_with_the_part(inline, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(catalogue.STUDIES, "traced", Traced(tmp_path))
    (tmp_path / "broken").touch()
    assert main(["study", "traced", "--out", str(tmp_path / "out")]) == 1
    assert "part 1/of it: ArithmeticError" in capsys.readouterr().err


def test_the_command_lists_every_study(capsys):
    assert main(["study"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(catalogue.STUDIES) and {"splits", "drift", "clamp"} <= set(listed)
