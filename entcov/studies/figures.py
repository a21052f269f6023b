"""Figures of studies of training runs: pass@k curves, differences to baselines with their intervals, curves over steps.

Of more than 8 arms those whose last pass@k is not told from their baseline's have no names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter

from entcov.intervals import mean_interval
from entcov.report.compare import Comparison, Measure
from entcov.report.plots import COLOURS, build_figures, new_figure

_PASS = re.compile(r"val-core/.+/held_out/acc/pass@(\d+)")
_STYLES = ("-", "--", ":")
_NAMED = 8  # arms that can be told apart by their colours
_NOT_TOLD = "{} arms not told from their baseline"

Rows = Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]  # arm -> seed -> the metrics of a run


def pass_at_k(rows: Rows, comparison: Comparison) -> Figure:
    """Held-out pass@k of each arm at its last evaluation, mean over seeds, and of the starting policies at step 0."""
    figure = new_figure(8, 5)
    ax = figure.subplots()
    first = [_curve(run, first=True) for run in next(iter(rows.values())).values()]
    shown = {"start": first} | {arm: [_curve(run) for run in by_seed.values()] for arm, by_seed in rows.items()}
    thin = _unnamed(rows, comparison)
    looks = {arm: _look(number) for number, arm in enumerate(arm for arm in rows if arm not in thin)}
    looks |= {"start": ("#999999", "-")}
    for arm, curves in shown.items():
        ks = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [mean_interval([curve[k] for curve in curves]) for k in ks]
        mean, half = np.array(values).T
        if arm in thin:
            label = _NOT_TOLD.format(len(thin)) if arm == thin[0] else None
            ax.plot(ks, mean, color="#bbbbbb", linewidth=0.8, label=label, gid=arm, zorder=1)
            continue
        colour, style = looks[arm]
        ax.plot(ks, mean, style, marker=".", color=colour, label=arm, gid=arm)
        if len(shown) <= 5 and len(curves) > 1:  # more bands would hide each other
            ax.fill_between(ks, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_title("Held-out pass@k at the end, mean over seeds", loc="left")
    ax.set_xlabel("k")
    ax.set_ylabel("pass@k")
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    named.sort(key=lambda line: -line.get_ydata()[-1])  # as the lines end, from top to bottom
    ax.legend(handles=named, fontsize=8, frameon=False)
    _plain(ax)
    return figure


def overview(rows: Rows, comparison: Comparison) -> Figure:
    """Entropy, reward, response length and covariance over the steps, without the arms that have no names.

    Of the evaluations, that of the held-out prompts: a study evaluates training prompts too, as the source "seen"."""
    left_out = _unnamed(rows, comparison)
    shown = {arm: [_held_out(run) for run in runs.values()] for arm, runs in rows.items() if arm not in left_out}
    figure = build_figures(shown)["overview"]
    if left_out:
        figure.text(0.01, 0.008, f"without {_NOT_TOLD.format(len(left_out))} in pass@k", fontsize=8, color="#555555")
    return figure


def _held_out(run: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("val-core/") or "/held_out/" in key}
        for row in run
    ]


def _unnamed(rows: Rows, comparison: Comparison) -> list[str]:
    if len(rows) <= _NAMED:
        return []
    return [arm for arm in comparison.baselines if not comparison.differences[arm]["best"].excludes_zero]


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS) % len(_STYLES)]


def differences(comparison: Comparison, measures: Sequence[Measure]) -> Figure:
    """A panel for each measure: every arm's difference to its baseline with the 95 % interval, coloured without 0."""
    arms = list(comparison.baselines)
    figure = new_figure(1.5 + 3.4 * len(measures), 1.2 + 0.32 * len(arms))
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for ax, measure in zip(axes, measures, strict=True):
        for place, arm in enumerate(reversed(arms)):
            found = comparison.differences[arm][measure.name]
            if not found.by_seed:
                continue
            colour = COLOURS[1 if found.mean < 0 else 2] if found.excludes_zero else "#555555"
            half = 0.0 if found.excludes_zero is None else found.half_width
            ax.errorbar(found.mean, place, xerr=half, fmt="o", color=colour, markersize=4, capsize=2, gid=arm)
        ax.axvline(0, color="#999999", linewidth=1)
        ax.set_title(measure.title, loc="left", fontsize=10)
        ax.set_xlabel("difference")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        _plain(ax)
    labels = [f"{arm} − {comparison.baselines[arm]}" for arm in reversed(arms)]
    axes[0].set_yticks(range(len(arms)), labels, fontsize=8)
    return figure


def _curve(run: Sequence[Mapping[str, float]], first: bool = False) -> dict[int, float]:
    """k -> pass@k of the run's first or last evaluation."""
    found = [{int(m[1]): row[key] for key in row if (m := _PASS.fullmatch(key))} for row in run]
    found = [curve for curve in found if curve]
    return found[0 if first else -1]


def _plain(ax) -> None:
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
