"""Plots of solve counts: pass@k curves, and histograms of how many prompts are solved how often."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from entcov.report.plots import COLOURS, new_figure
from entcov.rl.solve_counts import SolveCounts

Recorded = Mapping[int, Mapping[str, SolveCounts]]  # step -> source -> counts, as `read_solve_counts` gives them


def plot_solves(runs: Mapping[str, Recorded], out_dir: str | Path) -> list[Path]:
    """Writes pass_at_k.png and solve_counts.png: each run's first evaluation (dashed, pale) and last one (solid).

    There is a panel for each data source. Evaluations of one sample have no curve; without others nothing is written.

    Args:
        runs: label -> records.
        out_dir: created if absent; files of the same names are replaced.
    """
    out_dir, paths = Path(out_dir), []
    for name, figure in build_figures(runs).items():
        out_dir.mkdir(parents=True, exist_ok=True)
        paths.append(out_dir / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def build_figures(runs: Mapping[str, Recorded]) -> dict[str, Figure]:
    """The figures of `plot_solves` by name."""
    several = {label: [(s, own, c) for s, found in records.items() for own, c in found.items() if c.samples > 1]
               for label, records in runs.items()}  # fmt: skip
    sources = sorted({source for found in several.values() for _, source, _ in found})
    if not sources:
        return {}
    figures = {}
    for name, draw in (("pass_at_k", _pass_at_k), ("solve_counts", _histogram)):
        figures[name] = figure = new_figure(8, 1 + 3.8 * len(sources))
        for ax, source in zip(figure.subplots(len(sources), 1, squeeze=False)[:, 0], sources, strict=True):
            for (label, found), colour in zip(several.items(), COLOURS * len(several), strict=False):
                own = [(step, counts) for step, one, counts in found if one == source]
                for step, counts in dict([own[0], own[-1]]).items() if own else ():
                    draw(ax, counts, f"{label}, step {step}", colour, last=step == own[-1][0])
            ax.set_title(source, loc="left")
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(fontsize=8, frameon=False)
    return figures


def _pass_at_k(ax: Axes, counts: SolveCounts, label: str, colour: str, *, last: bool) -> None:
    curve = counts.curve()
    style, alpha = ("-", 1.0) if last else ("--", 0.5)
    ax.plot(list(curve), list(curve.values()), style, marker=".", color=colour, alpha=alpha, label=label, gid=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("k")
    ax.set_ylabel("pass@k")


def _histogram(ax: Axes, counts: SolveCounts, label: str, colour: str, *, last: bool) -> None:
    """The share of prompts that were solved c times, as steps around c."""
    share = np.array(counts.histogram) / sum(counts.histogram)
    edges = (np.arange(counts.samples + 2) - 0.5) / counts.samples
    style, alpha = ("-", 1.0) if last else ("--", 0.5)
    ax.stairs(share, edges, color=colour, alpha=alpha, linestyle=style, label=label, gid=label)
    ax.set_xlabel(f"share of the {counts.samples} responses that are right")
    ax.set_ylabel("share of prompts")
