"""`plot`, `report` and `fit-law`: what finished runs show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from entcov.cli.command_line import check_folder, console


def add_plot_report_and_law(commands: Any) -> None:
    plot = commands.add_parser("plot", help="PNG plots of one or several runs")
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument("--out", help="directory; default: RUN/plots for one run, ./plots for several")
    plot.set_defaults(command=_plot)

    report = commands.add_parser("report", help="one HTML file of runs: curves, tables, their responses token by token")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or one that compare has written")
    report.add_argument("--out", help="file; default: RUN/report.html for one folder, ./report.html for several")
    report.set_defaults(command=_report)

    law = commands.add_parser("fit-law", help="the law reward = -a exp(H) + b of runs: fit, forecast, entropy left")
    law.add_argument("runs", nargs="+", metavar="RUN")
    law.add_argument("--fraction", type=float, default=0.15, help="of the run, for the forecast; default %(default)s")
    law.add_argument(
        "--entropy", default="response_mean",
        help="response_mean (default, as in the paper), token_mean, or heldout:SOURCE (of runs with eval.entropy)",
    )  # fmt: skip
    law.add_argument("--reward", help="train or heldout:SOURCE; default: that of the entropy")
    law.add_argument("--out", help="directory; default: RUN/plots for one run, ./plots for several")
    law.set_defaults(command=_fit_law)


def _plot(args: argparse.Namespace) -> int:
    for path in plot_runs(*_runs_and_out(args)):
        print(path)
    return 0


def _report(args: argparse.Namespace) -> int:
    from entcov.report.page import write_report

    out = Path(args.out or (Path(args.runs[0]) / "report.html" if len(args.runs) == 1 else "report.html"))
    if out.is_dir():
        raise ValueError(f"--out: must be a file, got the folder {out}")
    if file := next((folder for folder in out.parents if folder.is_file()), None):
        raise ValueError(f"--out: must be in a folder, got {out}, and {file} is a file")
    print(write_report(args.runs, out))
    return 0


def _fit_law(args: argparse.Namespace) -> int:
    from entcov.report.fit_law import fit_runs

    runs, out = _runs_and_out(args)
    options = {"fraction": args.fraction, "entropy": args.entropy, "reward": args.reward}
    for path in fit_runs(runs, out, **options, console=console()):
        print(path)
    return 0


def _runs_and_out(args: argparse.Namespace) -> tuple[dict[str, str], Path]:
    """Label -> run folder, and where the results go."""
    paths = list(dict.fromkeys(args.runs))
    names = [Path(run).resolve().name for run in paths]
    out = check_folder("--out", Path(args.out or (Path(paths[0]) / "plots" if len(paths) == 1 else "plots")))
    return {run if names.count(name) > 1 else name: run for name, run in zip(names, paths, strict=True)}, out


def plot_runs(runs: dict[str, str], out: Path) -> list[Path]:
    """All plots of the run folders, by label, into `out`; their paths."""
    from entcov.report import plots
    from entcov.report.diagnostics import Diagnosed, plot_diagnostics
    from entcov.report.solves import plot_solves
    from entcov.rl.record.metrics import read_metrics
    from entcov.rl.solve_counts import read_solve_counts

    rows = {label: read_metrics(run) for label, run in runs.items()}
    solves = {label: read_solve_counts(run) for label, run in runs.items()}
    paths = plots.plot_runs(rows, out) + plot_solves(solves, out)
    return paths + plot_diagnostics({label: Diagnosed([rows[label]], solves[label]) for label in runs}, out)
