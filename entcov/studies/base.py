"""What a study is: independent parts that are stored as they are done, and the findings that they give."""

from __future__ import annotations

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, NamedTuple

from matplotlib.figure import Figure

from entcov.report.compare import plain
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.rl.record.progress import PartsProgress


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Findings:
    """What a study found.

    statements: sentences whose numbers are computed from the results, the answer to the question first.
    figures: by the name of their file, without its ending.
    values: everything that the tables and figures show, for JSON.
    """

    statements: Sequence[str]
    tables: Sequence[Table]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class How:
    """How a study is run.

    folder: its own; what is done is kept there, and a second call goes on.
    smoke: the small version, which shows that everything works and proves nothing.
    jobs: processes at a time, each with one CPU thread.
    arms: of a study of training runs, those to run, each with its baseline; None: all.
    display: as for `Progress`.
    """

    folder: Path
    smoke: bool = False
    jobs: int = 1
    arms: Sequence[str] | None = None
    display: bool | str = "auto"


class Study(ABC):
    """One question, and the experiment that answers it. Subclasses are named in entcov/studies/catalogue.py."""

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]

    @abstractmethod
    def run(self, how: How) -> Findings:
        """Makes what is not yet in `how.folder`, and evaluates all of it.

        Raises:
            StudyError: a part failed; what is done is kept.
            ValueError: the folder holds parts that were made otherwise.
        """


class StudyError(RuntimeError):
    """A part of a study failed. The message names the part and the reason."""


class PartsStudy(Study):
    """A study whose parts are functions of this process's code: no training run among them."""

    @abstractmethod
    def parts(self, smoke: bool) -> Mapping[str, Callable[[], Any]]:
        """Label -> a picklable function without arguments, such as a partial of a module's function. Parts do not
        depend on each other, and return what JSON can hold."""

    @abstractmethod
    def findings(self, results: Mapping[str, Any]) -> Findings:
        """From the results of all parts, as JSON gives them back."""

    def run(self, how: How) -> Findings:
        if how.arms is not None:
            raise ValueError(f"--arms: is for studies of training runs, which {self.name} is not; got {how.arms}")
        return self.findings(run_parts(self.parts(how.smoke), how))


def run_parts(parts: Mapping[str, Callable[[], Any]], how: How) -> dict[str, Any]:
    """The results by label. Each is stored in FOLDER/parts as it is done, and not made again.

    A stored result belongs to the part's arguments: the name of its function, and the `repr` of what a partial binds.

    Raises:
        StudyError, ValueError: as `Study.run`.
    """
    folder = how.folder / "parts"
    make_folder(folder)
    results = {label: _stored(_path(folder, label), part) for label, part in parts.items()}
    left = {label: part for label, part in parts.items() if results[label] is None}
    # Threads of torch or of OpenMP do not survive a fork.
    with (
        PartsProgress(len(parts), how.display) as shown,
        ProcessPoolExecutor(how.jobs, get_context("spawn"), initializer=_worker) as pool,
    ):
        shown.stored(len(parts) - len(left))
        running = {pool.submit(_timed, part): label for label, part in left.items()}
        try:
            for done in as_completed(running):
                label = running[done]
                if error := done.exception():
                    raise StudyError(f"{label}: {type(error).__name__}: {error}") from error
                result, seconds = done.result()
                results[label] = {"part": _identity(parts[label]), "seconds": seconds, "result": plain(result)}
                atomic_write(_path(folder, label), (json.dumps(results[label]) + "\n").encode())
                shown.done(label, seconds)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {label: own["result"] for label, own in results.items()}


def _stored(path: Path, part: Callable[[], Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_bytes())
    if stored["part"] != _identity(part):
        raise ValueError(f"{path}: holds {stored['part']}, the study asks for {_identity(part)}; remove it")
    return stored


def _path(folder: Path, label: str) -> Path:
    """Labels may hold characters that file names cannot."""
    safe = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in label)
    return folder / f"{safe[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.json"


def _identity(part: Callable[[], Any]) -> str:
    function = getattr(part, "func", part)
    bound = f"{getattr(part, 'args', ())} {getattr(part, 'keywords', {})}"
    return f"{function.__module__}.{function.__qualname__} {bound}"


def _worker() -> None:
    """One CPU thread, and an end with the process that started it, also where that was killed."""
    import torch

    torch.set_num_threads(1)
    Thread(target=_end_with, args=(parent_process().sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _timed(part: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return part(), time.monotonic() - started
