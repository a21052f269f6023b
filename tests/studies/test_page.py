"""The page of a study: which commits made it, and what is smoke."""

import io
import json

import pytest
from rich.console import Console

from entcov.studies import page
from entcov.studies.base import Findings, How, Study, Table


class Answer(Study):
    name, title, question = "answer", "The answer", "What is it?"

    def run(self, how):
        return Findings(["It is 42."], [Table("Numbers", ["what", "value"], [["answer", "42"]])], {}, {"answer": 42})


def made(folder, monkeypatch, commit, smoke=False):
    monkeypatch.setattr(page, "commit", lambda: commit)
    console = Console(file=io.StringIO(), width=80)
    files = page.run_study(Answer(), How(folder / "work", smoke), folder / "page", command="ask", console=console)
    assert "It is 42." in console.file.getvalue() and [file.name for file in files] == ["study.json", "study.md"]
    return (folder / "page/study.md").read_text(), json.loads((folder / "page/study.json").read_text())


def test_a_page_names_every_commit_that_worked_on_it(tmp_path, monkeypatch):
    """A study that is interrupted by a change of the code has parts of both."""
    text, values = made(tmp_path, monkeypatch, "commit a")
    assert "; commit a.\n" in text and "smoke" not in text and "```\nask\n```" in text
    assert values["answer"] == 42 and not values["smoke"] and values["made_with"].endswith("; commit a")
    made(tmp_path, monkeypatch, "commit b")
    text, values = made(tmp_path, monkeypatch, "commit a")
    assert "; commit a, then commit b.\n" in text and values["made_with"].endswith("; commit a, then commit b")


def test_a_commit_that_makes_nothing_but_the_page_is_named_apart(tmp_path, monkeypatch):
    def run(self, how):
        (how.folder / str(len(self.wanted))).mkdir(exist_ok=True)
        return Findings(["It is 42."], [], {}, {})

    monkeypatch.setattr(Answer, "run", run)
    for wanted, commit, said in (
        ("1", "commit a", "; commit a."),
        ("1", "commit b", "; commit a; this page: commit b."),
        ("12", "commit c", "; commit a, then commit c."),
        ("12", "commit a", "; commit a, then commit c."),
    ):
        monkeypatch.setattr(Answer, "wanted", wanted, raising=False)
        assert f"{said}\n" in made(tmp_path, monkeypatch, commit)[0]


def test_an_interrupted_call_is_remembered(tmp_path, monkeypatch):
    def run(self, how):
        (how.folder / "part").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Answer, "run", run)
        made(tmp_path, monkeypatch, "commit a")
    (tmp_path / "work/part/more").mkdir()
    assert "; commit a; this page: commit b.\n" in made(tmp_path, monkeypatch, "commit b")[0]


def test_a_smoke_page_says_that_it_proves_nothing(tmp_path, monkeypatch):
    text, values = made(tmp_path, monkeypatch, "commit a", smoke=True)
    assert "**The smoke version: it shows that the study runs, and proves nothing.**" in text and values["smoke"]
