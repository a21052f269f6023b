"""A study's page: study.md with its tables, the figures beside it, and study.json with every number."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from entcov.report.compare import environment, plain, rich_table, table_row
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.studies.base import Findings, How, Study

_COMMITS = "commits.json"


def run_study(study: Study, how: How, page: Path, *, command: str, console: Console) -> list[Path]:
    """Runs a study, prints its tables, and writes its page into the folder `page`; returns the files.

    Args:
        command: what the user typed, for the record.

    Raises:
        StudyError, ValueError: as `Study.run`.
    """
    known, own, before = _commits(how.folder), commit(), _files(how.folder)
    makers = known if own in known else [*known, own]
    _keep_commits(how.folder, makers)  # now: what is made stays, however the call ends
    found = study.run(how)
    made_nothing = bool(before) and _files(how.folder) == before
    if made_nothing and known:
        makers = known
        _keep_commits(how.folder, makers)
    for statement in found.statements:
        console.print(statement, markup=False, highlight=False)
    for table in found.tables:
        console.print(rich_table(*table))
    made_with = f"{environment()}; {', then '.join(makers)}" + ("" if own in makers else f"; this page: {own}")
    make_folder(page)
    files = {f"{name}.png": _png(figure) for name, figure in found.figures.items()}
    values = {"study": study.name, "smoke": how.smoke, "command": command, "made_with": made_with}
    text = json.dumps(plain({**values, **found.values}), indent=1) + "\n"
    files["study.json"] = text.encode()
    files["study.md"] = markdown(study, found, command=command, made_with=made_with, smoke=how.smoke).encode()
    for name, content in files.items():
        atomic_write(page / name, content)
    return [page / name for name in files]


def markdown(study: Study, found: Findings, *, command: str, made_with: str, smoke: bool) -> str:
    lines = [f"# {study.title}", "", study.question, "", f"```\n{command}\n```", "", f"{made_with}."]
    if smoke:
        lines += ["", "**The smoke version: it shows that the study runs, and proves nothing.**"]
    for statement in found.statements:
        lines += ["", statement]
    for title, header, rows in found.tables:
        lines += ["", f"## {title}", "", table_row(header), table_row(["---"] * len(header)), *map(table_row, rows)]
    for name in found.figures:
        lines += ["", f"![{name.replace('_', ' ')}]({name}.png)"]
    return "\n".join(lines) + "\n"


def _commits(folder: Path) -> list[str]:
    """The commits that have made what is in a study's folder, in order; it may hold parts of each."""
    path = folder / _COMMITS
    return json.loads(path.read_bytes()) if path.exists() else []


def _keep_commits(folder: Path, commits: Sequence[str]) -> None:
    make_folder(folder)
    atomic_write(folder / _COMMITS, (json.dumps(list(commits)) + "\n").encode())


def _files(folder: Path) -> set[Path]:
    """What a study has made and found again when it is called once more, but for its pages."""
    return {path for path in folder.rglob("*") if path.name != _COMMITS and path.relative_to(folder).parts[0] != "page"}


def commit() -> str:
    """The commit of the checkout that entcov is imported from, for the record."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "no checkout, so no commit"
    return f"commit {head}" + (", changed files" if git("status", "--porcelain", "--untracked-files=no") else "")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def listing(studies: Sequence[Study]) -> str:
    """A line for every study."""
    width = max(len(study.name) for study in studies)
    return "\n".join(f"{study.name:<{width}}  {study.question}" for study in studies)
