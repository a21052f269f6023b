"""A plugin of pytest (`-p benchmarks.gpu.outcomes --outcomes FILE`): one JSON line a test, written as the test ends.

A report that is written at the end, such as JUnit's, would be missing for a session that was stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the run has other stages too, where pytest is missing
    import pytest

BAD = "failed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file for one JSON line a test")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that started them
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


class Outcomes:
    def __init__(self, path: Path):
        self.file = path.open("w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # of set-up and tear-down, what did not go well
            self.tell(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(report)

    def tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        record = {"test": report.nodeid, "outcome": report.outcome, "message": message(report)}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def pytest_unconfigure(self) -> None:
        self.file.close()


def message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The first line of what went wrong; empty if nothing did."""
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()
    return lines[0 if crash is not None else -1][:300] if lines else ""


def read(path: Path) -> dict:
    """How many passed, failed and were skipped so far, and the names and messages of those that failed."""
    found: dict[str, dict] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off when the process was stopped
            continue
        if found.get(record["test"], {}).get("outcome") != BAD:  # a test that failed may still pass its tear-down
            found[record["test"]] = record
    outcomes = [record["outcome"] for record in found.values()]
    failures = [f"{r['test'].rpartition('::')[2]}: {r['message']}" for r in found.values() if r["outcome"] == BAD]
    return {
        "passed": outcomes.count("passed"),
        "failed": len(failures),
        "skipped": outcomes.count("skipped"),
        "failures": failures,
    }
