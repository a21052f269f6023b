"""Parts of a study for tests of the frame: picklable functions that leave a trace, and a pool in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from entcov.studies.base import Findings, PartsStudy, Table


def made(folder: Path, number: int, fails: bool = False) -> dict[str, Any]:
    """Leaves a file for each time it is called."""
    (folder / f"made_{number}_{time.monotonic_ns()}").touch()
    if fails and (folder / "broken").exists():
        raise ArithmeticError(f"number {number} is broken")
    return {"number": number, "process": os.getpid(), "nan": float("nan")}


def waits(folder: Path) -> None:
    (folder / "process").write_text(str(os.getpid()))
    time.sleep(60)


class Traced(PartsStudy):
    name = "traced"
    title = "A title"
    question = "How many?"

    def __init__(self, folder: Path, count: int = 3, scale: int = 1):
        self.folder, self.count, self.scale = folder, count, scale

    def parts(self, smoke: bool) -> dict[str, Callable[[], Any]]:
        parts = range(1 if smoke else self.count)
        return {f"part {n}/of it": partial(made, self.folder, self.scale * n, fails=n == 1) for n in parts}

    def findings(self, results: dict[str, Any]) -> Findings:
        numbers = [own["number"] for own in results.values()]
        table = Table("Numbers", ["label", "number"], [[label, str(own["number"])] for label, own in results.items()])
        return Findings([f"The sum is {sum(numbers)}."], [table], values={"results": results})

    def calls(self) -> list[int]:
        return sorted(int(path.name.split("_")[1]) for path in self.folder.glob("made_*"))


class InlinePool:
    """A ProcessPoolExecutor that does everything at once in this process: no time for imports."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: Any) -> None: ...

    def submit(self, function: Callable, *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
