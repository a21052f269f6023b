"""Matched runs of several entropy controls: the final values of each, and the differences to its baseline.

The baseline of a control is the same run with the control's strength at 0.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from entcov.intervals import mean_interval
from entcov.report.plots import plot_runs
from entcov.report.run_matrix import Failure, Job, run_matrix
from entcov.rl.record.durable import atomic_write
from entcov.rl.record.metrics import read_metrics

FINAL_FRACTION = 0.1  # "final" is the mean over this last part of a run's steps


@dataclass(frozen=True)
class Measure:
    """A final value of a run."""

    name: str
    title: str
    digits: int
    pattern: str  # of the metric keys; several (data sources) are averaged
    last_only: bool = False  # the last logged value, not the mean over the final steps


MEASURES = (
    Measure("entropy", "final entropy, nats", 4, r"actor/entropy"),
    Measure("reward", "final train reward", 3, r"critic/score/mean"),
    Measure("accuracy", "held-out accuracy", 3, r"val-core/.+/acc/mean@\d+", last_only=True),
    Measure("best", "held-out best of k", 3, r"val-core/.+/acc/best@\d+(/mean)?", last_only=True),
    Measure("length", "response length, tokens", 1, r"response_length/mean"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half width of its 95 % interval (NaN with one seed), and the values by seed."""

    mean: float
    half_width: float
    by_seed: dict[int, float]

    @classmethod
    def of(cls, by_seed: dict[int, float]) -> Estimate:
        """NaN if one of the values is NaN: a run that ended in NaN must not drop out of its control's mean."""
        return cls(*(mean_interval(list(by_seed.values())) if by_seed else (math.nan, math.nan)), by_seed)

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval lies on one side of 0; None without an interval."""
        return None if math.isnan(self.half_width) else abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Comparison:
    """The estimate of every measure for every control, and its difference to the control's baseline, paired by seed."""

    command: str
    environment: str
    steps: int
    seeds: tuple[int, ...]
    baselines: dict[str, str]
    estimates: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    entropy_ratio: dict[str, tuple[float, float, float]]  # entropy / baseline's: geometric mean, interval
    failures: list[Failure]


def compare(
    arguments: Callable[[str, int, Path], Sequence[str]],
    *,
    controls: Sequence[str],
    seeds: Sequence[int],
    out_dir: str | Path,
    jobs: int = 1,
    command: str,
    baselines: Mapping[str, str],
    total_steps: int | None = None,
    display: bool | str = "auto",
    program: Sequence[str] = (sys.executable, "-m", "entcov"),
) -> int:
    """Runs every control with every seed, and writes comparison.md, comparison.json and plots into `out_dir`.

    The run of a control with seed N is in `out_dir/control/seed_N`. A second call makes only the runs that have not
    finished. The tables are also printed.

    Args:
        arguments: (control, seed, run_dir) -> the arguments of the process `program ...` that makes the run.
        jobs: runs at a time, each with one CPU thread.
        command: what the user typed, for the record.
        baselines: control -> its baseline, which is among the controls too. `arguments` must make the two differ in the
            control's strength alone.
        total_steps, display: for the display of the running matrix.
        program: the command that `arguments` are given to.

    Returns:
        Exit code: 0 if every run finished, 1 if some failed. Those are printed with the ends of their logs; the other
        runs are compared.

    Raises:
        ValueError: controls or seeds are empty or repeated, jobs < 1, or a baseline is not among the controls.
    """
    out_dir = Path(out_dir)
    _check(controls, seeds, baselines)
    places = {(c, s): out_dir / c / f"seed_{s}" for c in controls for s in seeds}
    # Seed by seed, so that an interrupted comparison has complete pairs.
    matrix = [
        Job(f"{c} seed {s}", (*program, *arguments(c, s, places[c, s])), places[c, s]) for s in seeds for c in controls
    ]
    failures = run_matrix(matrix, jobs, total_steps=total_steps, display=display)
    failed = {failure.label for failure in failures}
    rows = {c: {s: read_metrics(places[c, s]) for s in seeds if f"{c} seed {s}" not in failed} for c in controls}
    comparison = summarize(rows, baselines, command=command, failures=failures)
    out_dir.mkdir(parents=True, exist_ok=True)
    if plotted := {control: list(by_seed.values()) for control, by_seed in rows.items() if by_seed}:
        plot_runs(plotted, out_dir / "plots")
    atomic_write(out_dir / "comparison.json", (json.dumps(plain(asdict(comparison)), indent=1) + "\n").encode())
    atomic_write(out_dir / "comparison.md", markdown(comparison, plots=bool(plotted)).encode())
    console = Console()
    for table in tables(comparison):
        console.print(rich_table(*table))
    as_is = {"markup": False, "highlight": False, "soft_wrap": True}  # paths and logs can be copied
    for failure in failures:
        console.print(f"\n{failure.label} failed ({failure.reason}), end of {failure.log}:", style="red", **as_is)
        console.print(failure.tail, **as_is)
    console.print(f"\n{out_dir / 'comparison.md'}", **as_is)
    return 1 if failures else 0


def summarize(
    rows: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]],
    baselines: Mapping[str, str],
    *,
    command: str,
    failures: Sequence[Failure] = (),
    measures: Sequence[Measure] = MEASURES,
) -> Comparison:
    """The comparison of finished runs: `rows[control][seed]` are a run's metrics. One measure is named entropy."""
    final = {c: {s: final_values(run, measures) for s, run in by_seed.items()} for c, by_seed in rows.items()}
    names = [measure.name for measure in measures]
    differences, ratio = {}, {}
    for control, baseline in baselines.items():
        base = final[baseline]
        pairs = [(seed, values, base[seed]) for seed, values in final[control].items() if seed in base]
        differences[control] = {
            name: Estimate.of({s: a[name] - b[name] for s, a, b in pairs if name in a and name in b}) for name in names
        }
        ratio[control] = _ratio(
            [(a["entropy"], b["entropy"]) for _, a, b in pairs if "entropy" in a and "entropy" in b]
        )
    return Comparison(
        command=command,
        environment=environment(),
        steps=max((int(run[-1]["step"]) for by_seed in rows.values() for run in by_seed.values()), default=0),
        seeds=tuple(sorted({seed for by_seed in rows.values() for seed in by_seed})),
        baselines=dict(baselines),
        estimates={
            c: {name: Estimate.of({s: v[name] for s, v in by_seed.items() if name in v}) for name in names}
            for c, by_seed in final.items()
        },
        differences=differences,
        entropy_ratio=ratio,
        failures=list(failures),
    )


def final_values(rows: Sequence[Mapping[str, float]], measures: Sequence[Measure] = MEASURES) -> dict[str, float]:
    """Measure name -> final value; measures that the run did not log are absent."""
    last_step = rows[-1]["step"]
    first_final = last_step - max(1, round(FINAL_FRACTION * last_step))  # exclusive
    values = {}
    for measure in measures:
        logged = [
            {k: v for k, v in row.items() if re.fullmatch(measure.pattern, k)} | {"step": row["step"]} for row in rows
        ]
        logged = [row for row in logged if len(row) > 1]
        logged = logged[-1:] if measure.last_only else [row for row in logged if row["step"] > first_final]
        means = [fmean(value for key, value in row.items() if key != "step") for row in logged]
        if means:
            values[measure.name] = fmean(means)
    return values


def tables(
    comparison: Comparison, measures: Sequence[Measure] = MEASURES
) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows of text): the estimates, and the differences to the baselines."""
    measures = [m for m in measures if any(e[m.name].by_seed for e in comparison.estimates.values())]
    first = [
        [control, str(max((len(e.by_seed) for e in estimates.values()), default=0))]
        + [_shown(estimates[m.name], m.digits) for m in measures]
        for control, estimates in comparison.estimates.items()
    ]
    found = [("Where the runs end", ["control", "seeds", *(m.title for m in measures)], first)]
    second = []
    for control, baseline in comparison.baselines.items():
        cells = []
        for measure in measures:
            difference = comparison.differences[control][measure.name]
            text = _shown(difference, measure.digits, sign="+")
            cells.append(f"{text} *" if difference.excludes_zero else text)
        mean, low, high = comparison.entropy_ratio[control]
        times = "—" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")
        second.append([control, baseline, times, *cells])
    if second:
        header = ["control", "baseline", "entropy / baseline's", *(m.title for m in measures)]
        found.append(("Difference to the baseline, paired by seed", header, second))
    return found


def markdown(comparison: Comparison, plots: bool) -> str:
    """The comparison as a page."""
    seeds = ", ".join(map(str, comparison.seeds)) or "none"
    lines = [
        "# Comparison of entropy controls",
        "",
        f"```\n{comparison.command}\n```",
        "",
        f"{comparison.environment}. {comparison.steps} steps; finished seeds: {seeds}.",
        "",
        "Cells: mean ± half width of the 95 % interval over seeds (Student t). Final, and response length: mean over "
        f"the last {FINAL_FRACTION:.0%} of steps. Held-out numbers: the last evaluation, averaged over data sources. A "
        "difference is the mean over seeds of (control − baseline with the same seed); * marks an interval that does "
        "not contain 0. The ratio is the geometric mean over the same pairs, with its interval.",
    ]
    for title, header, rows in tables(comparison):
        lines += ["", f"## {title}", "", table_row(header), table_row(["---"] * len(header)), *map(table_row, rows)]
    if comparison.failures:
        lines += ["", "## Failed runs", ""]
        for failure in comparison.failures:
            lines += [f"{failure.label} ({failure.reason}):", "", f"```\n{failure.tail}\n```", ""]
    if plots:
        lines += ["", "![entropy, reward, response length and covariance](plots/overview.png)"]
    return "\n".join(lines) + "\n"


def _check(controls: Sequence[str], seeds: Sequence[int], baselines: Mapping[str, str]) -> None:
    for name, values in (("controls", controls), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name} must hold at least one entry, got none")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must not repeat an entry, got {list(values)}")
    for control in controls:
        if Path(control).name != control:
            raise ValueError(f"controls: a name that is no plain folder name cannot be compared, got {control!r}")
    for control, baseline in baselines.items():
        for name in (control, baseline):
            if name not in controls:
                raise ValueError(
                    f"baselines: {name!r} must be among the controls {list(controls)}, got {control!r}: {baseline!r}"
                )


def _ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean of a / b and its interval; NaN unless every number is positive."""
    if not pairs or not all(a > 0 and b > 0 for a, b in pairs):
        return math.nan, math.nan, math.nan
    mean, half = mean_interval([math.log(a / b) for a, b in pairs])
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _shown(estimate: Estimate, digits: int, sign: str = "") -> str:
    if not estimate.by_seed:
        return "—"
    text = f"{estimate.mean:{sign}.{digits}f}"
    return text if math.isnan(estimate.half_width) else f"{text} ± {estimate.half_width:.{digits}f}"


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal: the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def environment() -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        processor = match[1]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("entcov", "torch", "transformers"))
    return f"{versions}, Python {platform.python_version()}, {processor}, {os.cpu_count()} cores"


def plain(value: Any) -> Any:
    """For JSON: NaN as null, paths and keys as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
