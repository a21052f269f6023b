"""Plots of the diagnostics of a run (docs/diagnostics.md): one panel each, and a PNG file of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from entcov.report.plots import COLOURS, Rows, common_steps, new_figure, smooth, smoothing_window
from entcov.rl.solve_counts import SolveCounts

Recorded = Mapping[int, Mapping[str, SolveCounts]]  # step -> source -> counts, as `read_solve_counts` gives them

_TOP = {"0.0002": "0.02 %", "0.002": "0.2 %", "0.02": "2 %", "0.2": "20 %", "0.5": "50 %"}
_CLASSES = ("rewarded_likely", "rewarded_unlikely", "punished_likely", "punished_unlikely")
_CLASS_LOOK = ((COLOURS[2], "-"), (COLOURS[2], "--"), (COLOURS[1], "-"), (COLOURS[1], "--"))
_POSITIONS = 10
_COLUMNS = 3


@dataclass(frozen=True)
class Diagnosed:
    """A run to plot: the rows of each seed as `read_metrics` gives them, and the solve counts of one of them."""

    seeds: Sequence[Rows]
    solves: Recorded

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the mean over seeds of `key` at them."""
        steps, values = common_steps(self.seeds, key)
        return steps, values.mean(axis=0) if values.size else np.array([])


def plot_diagnostics(runs: Mapping[str, Diagnosed], out_dir: str | Path) -> list[Path]:
    """Writes diagnostics.png: the panels of each run, runs below each other. Nothing where no run logged any of them.

    Args:
        runs: by label.
        out_dir: created if absent; a file of that name is replaced.
    """
    if (figure := build_figure(runs)) is None:
        return []
    path = Path(out_dir) / "diagnostics.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return [path]


def build_figure(runs: Mapping[str, Diagnosed]) -> Figure | None:
    """The figure of `plot_diagnostics`."""
    shown = {label: own for label, run in runs.items() if (own := panels(run))}
    if not shown:
        return None
    heights = [-(-len(own) // _COLUMNS) for own in shown.values()]
    figure = new_figure(15, 3.6 * sum(heights) + 0.4 * len(shown))
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (label, own), rows in zip(parts, shown.items(), heights, strict=True):
        if len(shown) > 1:
            part.suptitle(label, x=0.01, ha="left")
        axes = part.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for ax, (title, draw) in zip(axes, own.items(), strict=False):
            draw(ax)
            finish(ax, title)
        for ax in axes[len(own) :]:
            ax.set_axis_off()
    return figure


def panel_figures(run: Diagnosed) -> dict[str, Figure]:
    """A small figure of each panel, by its title."""
    figures = {}
    for title, draw in panels(run).items():
        figures[title] = new_figure(4.8, 3.5)
        draw(ax := figures[title].subplots())
        finish(ax, title)
    return figures


def panels(run: Diagnosed) -> dict[str, Callable[[Axes], None]]:
    """Title -> what draws the panel, of the diagnostics that the run has."""
    classes = [name.replace("_", ", ") for name in _CLASSES]
    tops = [(f"actor/cov_top_{share}", f"top {name}") for share, name in _TOP.items()]
    found = {
        "Covariance of the top tokens, mean": _lines([*tops, ("actor/cov_mean", "all")], "nats", log=True),
        "Entropy change by the updates": _lines(
            [("actor/entropy_change", "measured"), ("actor/entropy_change_predicted", "predicted, first order")],
            "nats per token", zero=True,
        ),
        "Entropy by position in the response": _by_position,
        "Tokens of each class": _lines(
            [(f"token_classes/{name}/tokens", text) for name, text in zip(_CLASSES, classes, strict=True)],
            "share of tokens", percent=True, looks=_CLASS_LOOK,
        ),
        "Their part in the entropy's change": _lines(
            [(f"token_classes/{name}/change", text) for name, text in zip(_CLASSES, classes, strict=True)],
            "below 0: spends entropy", percent=True, zero=True, looks=_CLASS_LOOK,
        ),
        "Groups with no, some and only right responses": _lines(
            [(f"training/groups_{name}_right", f"{name} right") for name in ("none", "some", "all")],
            "share of groups", percent=True,
        ),
        "Different answers to a prompt": _lines([("training/distinct_answers", "training")], "mean over prompts"),
        "Most common answer": _lines(
            [("calibration/confidence", "confidence"), ("calibration/accuracy", "accuracy"),
             ("calibration/ece", "expected calibration error")],
            "mean over prompts", percent=True,
        ),
        "Reliability of the held-out most common answer": _reliability,
    }  # fmt: skip
    return {title: draw for title, make in found.items() if (draw := make(run)) is not None}


Maker = Callable[[Diagnosed], Callable[[Axes], None] | None]


def _lines(
    keys: Sequence[tuple[str, str]], unit: str, *, log: bool = False, percent: bool = False, zero: bool = False,
    looks: Sequence[tuple[str, str]] = tuple((colour, "-") for colour in COLOURS),
) -> Maker:  # fmt: skip
    """A line a key over the steps, smoothed as in the other plots, of runs that logged the first of the keys.

    Args:
        keys: (key, name in the legend)
        log: a logarithmic axis, and values that are not above 0 are left out.
        percent: values are shares.
        zero: a line at 0.
    """

    def make(run: Diagnosed) -> Callable[[Axes], None] | None:
        found = [(name, look, *run.series(key)) for (key, name), look in zip(keys, looks, strict=False)]
        found = [one for one in found if one[2].size]
        if not run.series(keys[0][0])[0].size:
            return None

        def draw(ax: Axes) -> None:
            for name, (colour, style), steps, values in found:
                shown = smooth(values, smoothing_window(len(values)))
                shown = np.where(shown > 0, shown, np.nan) if log else shown
                marker = "." if len(steps) == 1 else None
                ax.plot(steps, shown, style, color=colour, linewidth=1.5, label=name, gid=name, marker=marker)
            if log:
                ax.set_yscale("log")
            if percent:
                ax.yaxis.set_major_formatter(PercentFormatter(1.0))
            if zero:
                ax.axhline(0, color="#555555", linewidth=0.8)
            ax.set_xlabel("step")
            ax.set_ylabel(unit)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

        return draw

    return make


def _by_position(run: Diagnosed) -> Callable[[Axes], None] | None:
    """Entropy over the tenths of a response, means over the first, the middle and the last tenth of the steps."""
    columns = [dict(zip(*run.series(f"entropy_by_position/{i + 1}"), strict=True)) for i in range(_POSITIONS)]
    steps = sorted(set().union(*columns))
    if not steps:
        return None
    width = max(1, len(steps) // 10)
    middle = (len(steps) - width) // 2
    spans = dict.fromkeys(tuple(steps[at : at + width]) for at in (0, middle, len(steps) - width))

    def draw(ax: Axes) -> None:
        for span, colour, style in zip(spans, (COLOURS[6], COLOURS[2], COLOURS[0]), (":", "--", "-"), strict=False):
            known = [[column[step] for step in span if step in column] for column in columns]
            values = [np.mean(own) if own else math.nan for own in known]
            name = f"step {span[0]:.0f}" if len(span) == 1 else f"steps {span[0]:.0f} to {span[-1]:.0f}"
            ax.plot(
                np.arange(0.5, _POSITIONS) / _POSITIONS, values, style, marker=".", color=colour, label=name, gid=name
            )
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xlabel("position in the response")
        ax.set_ylabel("nats per token")

    return draw


def _reliability(run: Diagnosed) -> Callable[[Axes], None] | None:
    """Accuracy over confidence of each source's first evaluation and its last one; the area of a point is its share."""
    found: dict[str, list[tuple[int, SolveCounts]]] = {}
    for step, sources in sorted(run.solves.items()):
        for source, counts in sources.items():
            if counts.answers is not None and counts.answers.calibration is not None:
                found.setdefault(source, []).append((step, counts))
    if not found:
        return None

    def draw(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        for (source, own), colour in zip(found.items(), COLOURS[2:] * len(found), strict=False):
            for step, counts in dict([own[0], own[-1]]).items():
                sure, last = counts.answers.calibration, step == own[-1][0]
                size, x, y = np.array(sure.bins).T
                name = f"{source + ', ' if len(found) > 1 else ''}step {step}: error {sure.ece:.1%}"
                style, alpha = ("-", 1.0) if last else ("--", 0.5)
                ax.plot(x, y, style, color=colour, alpha=alpha, linewidth=1.2, label=name, gid=name)
                ax.scatter(x, y, 150 * size / size.sum(), color=colour, alpha=alpha, linewidth=0)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator(np.arange(0, 1.1, 0.2)))
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
        ax.set_xlabel("confidence: share of the responses")
        ax.set_ylabel("accuracy")

    return draw


def finish(ax: Axes, title: str) -> None:
    """The looks that all panels have in common."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        count, options = len(ax.get_legend_handles_labels()[1]), {}
        if count > 2:  # above the lines
            low, high = ax.get_ylim()
            ax.set_ylim(top=high * 8 if ax.get_yscale() == "log" else high + 0.25 * (high - low))
            options = {"loc": "upper center", "ncols": 3 if count > 4 else 2}
        ax.legend(fontsize=8, frameon=False, **options)
