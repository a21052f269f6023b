"""The results of runs: one file to which every command adds, and the files beside it.

A run is a mapping {"environment", "rehearsal", "ended", "stages": {name: findings}}. Commands of the same code on the
same kind of machine add to one run; others stay apart, and the report says so.
"""

import datetime
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu import report, roofline
from benchmarks.gpu.stages import SKIPPED, Context

RESULTS, TABLES, LOGS, PLOT = "results.json", "RESULTS.md", "logs.tar.gz", "roofline.png"
# Two commands with the same of these are one run.
SAME = ("device", "driver", "nvcc", "torch", "python", "commit")


def load(path: Path) -> list[dict]:
    """The runs of an earlier results.json.

    Raises:
        ValueError: the file is not one of ours.
    """
    try:
        runs = json.loads(path.read_text())["runs"]
        return [dict(run, environment=run["environment"], stages=run["stages"], ended=run["ended"]) for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a results.json of this command, got {type(error).__name__}: {error}"
        ) from None


def of(context: Context) -> dict:
    """This run so far."""
    return {
        "environment": {name: value for name, value in context.results.get("environment", {}).items()
                        if name not in ("status", "seconds", "reason")},
        "rehearsal": context.rehearsal,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stages": dict(context.results),
    }  # fmt: skip


def merged(runs: Iterable[dict]) -> list[dict]:
    """Later runs replace earlier ones. Runs of the same machine and code become one. Of each device every stage is kept
    from the latest run that has it. The latest run comes last."""
    kept: list[dict] = []
    for run in runs:
        device = run["environment"].get("device")
        older, own = [], {}
        for other in kept:
            stages = other["stages"]
            if other["environment"].get("device") == device:
                stages = {name: found for name, found in stages.items() if not _replaced(name, run)}
            if all(other["environment"].get(name) == run["environment"].get(name) for name in SAME):
                own |= stages
            elif stages:
                older.append({**other, "stages": stages})
        # A stage that did not run now does not replace what it found before.
        both = {**run["stages"], **own}
        names = dict.fromkeys(name for name in ("environment", "build", *own, *run["stages"]) if name in both)
        kept = [*older, {**run, "stages": {name: both[name] for name in names}}]
    return kept


def _replaced(name: str, run: dict) -> bool:
    return name in run["stages"] and run["stages"][name]["status"] != SKIPPED


def write(context: Context, earlier: list[dict], document: Path) -> None:
    """The four files of `context.out`; a new entry in `document` (benchmarks/RESULTS.md) unless it is a rehearsal."""
    runs = merged([*earlier, of(context)])
    replace(context.out / RESULTS, lambda path: path.write_text(json.dumps({"runs": runs}, indent=1) + "\n"))
    device = runs[-1]["environment"].get("device", "unknown device")
    same = [run for run in runs if run["environment"].get("device", "unknown device") == device]
    renewed = report.renew(document.read_text(), device, same)
    replace(context.out / TABLES, lambda path: path.write_text(renewed))
    if not context.rehearsal:
        replace(document, lambda path: path.write_text(renewed))
    replace(context.out / LOGS, lambda path: _pack(context.scratch / "logs", path))
    if roofline.points(same) and roofline.available():
        replace(context.out / PLOT, lambda path: roofline.draw(same, path))


def take_up_logs(context: Context) -> None:
    """Unpacks the logs of earlier commands from `context.out`, because every stage writes the whole archive again."""
    if (context.out / LOGS).exists():
        with tarfile.open(context.out / LOGS) as archive:
            archive.extractall(context.scratch, filter="data")


def _pack(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        if folder.is_dir():
            archive.add(folder, "logs")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes under a temporary name and renames, so that the file is never incomplete."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    shutil.move(partial, path)
