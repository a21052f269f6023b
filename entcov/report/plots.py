"""Plots of one run or of several, with intervals across seeds: PNG files, and single panels for a report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from entcov.intervals import student_t

Rows = Sequence[Mapping[str, float]]

# Okabe and Ito's palette, which people with any colour vision can read; without its yellow, which is too pale on white.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":")
_BAND_SEEDS = 5
_EVALUATION = re.compile(r"val-core/.+/acc/(mean|best)@(\d+)(/mean)?")


@dataclass(frozen=True)
class _Panel:
    key: str
    title: str
    unit: str
    from_zero: bool = False
    evaluations: bool = False


_PANELS = {
    "entropy": [_Panel("actor/entropy", "Policy entropy", "nats per token", from_zero=True)],
    "reward": [_Panel("critic/score/mean", "Reward", "mean of the step's rollouts", evaluations=True)],
    "response_length": [_Panel("response_length/mean", "Response length", "tokens")],
    "covariance": [
        _Panel("actor/cov_mean", "Token covariance of log-probability and advantage, mean", "nats"),
        _Panel("actor/cov_p999", "Its 99.9th percentile over tokens", "nats"),
    ],
}


# One figure each in a report. Those of held-out accuracy follow, under the names that the runs logged.
_REPORT_PANELS = (
    _Panel("critic/score/mean", "Reward", "mean of the step's rollouts"),
    _Panel("actor/entropy", "Policy entropy", "nats per token", from_zero=True),
    _Panel("actor/cov_mean", "Token covariance, mean", "nats"),
    _Panel("actor/cov_p999", "Token covariance, 99.9th percentile", "nats"),
    _Panel("actor/cov_max", "Token covariance, largest", "nats"),
    _Panel("training/mismatch", "Mismatch of sampler and trainer", "nats", from_zero=True),
    *_PANELS["response_length"],
)


def plot_runs(runs: Mapping[str, Rows | Sequence[Rows]], out_dir: str | Path) -> list[Path]:
    """Write entropy.png, reward.png, response_length.png, covariance.png and overview.png (the four together).

    A label with several seeds gets the line of their mean, at the steps that all its seeds have. With five seeds or
    more it gets a band, the 95 % interval of the mean (Student t). With fewer the seeds get faint lines: an interval of
    two seeds (t = 12.7) or three (t = 4.3) would be wider than the differences between the labels. Series are smoothed
    by a centred moving average. A single run also gets a faint line of its unsmoothed values. Points are held-out
    evaluations, averaged over data sources. A plot is left out if no run logged its metric.

    Args:
        runs: label -> the rows of one run as `read_metrics` gives them, or a list of such rows, one per seed.
        out_dir: created if absent; files of the same names are replaced.

    Returns:
        The files written.

    Raises:
        ValueError: no runs, a run without rows, or no finite value of the plotted metrics in any run.
    """
    out_dir = Path(out_dir)
    figures = build_figures(runs)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(out_dir / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def build_figures(runs: Mapping[str, Rows | Sequence[Rows]]) -> dict[str, Figure]:
    """The figures of `plot_runs` by name, to be shown or changed."""
    seeds = {label: _by_seed(label, rows) for label, rows in runs.items()}
    if not seeds:
        raise ValueError("runs must hold at least one run, got none")
    logged = {key for per_seed in seeds.values() for rows in per_seed for row in rows for key in row}
    present = {
        name: [p for p in panels if any(common_steps(per_seed, p.key)[0].size for per_seed in seeds.values())]
        for name, panels in _PANELS.items()
    }
    present = {name: panels for name, panels in present.items() if panels}
    if not present:
        wanted = ", ".join(panel.key for panels in _PANELS.values() for panel in panels)
        raise ValueError(f"runs must hold finite values of at least one of {wanted}; got {sorted(logged)}")

    figures = {}
    for name, panels in present.items():
        figure = new_figure(8, 4.8 if len(panels) == 1 else 7.2)
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        notes = [_draw(ax, panel, seeds) for ax, panel in zip(axes, panels, strict=True)]
        _legend_above(figure, _legend(seeds, panels))
        axes[-1].set_xlabel("step")
        _caption(figure, seeds, notes)
        figures[name] = figure

    overview = new_figure(12, 8)
    axes = overview.subplots(2, 2, sharex=True).flat
    notes = []
    for ax, name in zip(axes, _PANELS, strict=True):
        if name in present:
            notes.append(_draw(ax, present[name][0], seeds))
        else:
            ax.set_title(_PANELS[name][0].title, loc="left")
            ax.text(0.5, 0.5, f"{_PANELS[name][0].key}:\nno values", ha="center", va="center", transform=ax.transAxes)
    for ax in axes[2:]:
        ax.set_xlabel("step")
    _legend_above(overview, _legend(seeds, [panels[0] for panels in present.values()]))
    _caption(overview, seeds, notes)
    return figures | {"overview": overview}


def panel_figures(runs: Mapping[str, Rows | Sequence[Rows]]) -> dict[str, Figure]:
    """A small figure of each quantity that the runs logged, by its title, with lines and bands as `plot_runs` has them.

    Raises:
        ValueError: as `plot_runs`.
    """
    seeds = {label: [_with_held_out(rows) for rows in _by_seed(label, rows)] for label, rows in runs.items()}
    held_out = sorted(
        {key for rows in seeds.values() for one in rows for row in one for key in row if "held-out" in key}
    )
    panels = [*_REPORT_PANELS, *(_Panel(key, key.capitalize(), "mean over data sources") for key in reversed(held_out))]
    panels = [panel for panel in panels if any(common_steps(rows, panel.key)[0].size for rows in seeds.values())]
    if not panels:
        wanted = ", ".join(panel.key for panel in _REPORT_PANELS)
        raise ValueError(f"runs must hold finite values of at least one of {wanted}")
    figures = {}
    for panel in panels:
        figures[panel.title] = figure = new_figure(4.8, 3.5)
        ax = figure.subplots()
        _caption(figure, seeds, [_draw(ax, panel, seeds)])
        if len(seeds) > 1 or len(next(iter(seeds.values()))) > 1:
            ax.legend(handles=_legend(seeds, [panel]), fontsize=8, frameon=False)
        ax.set_title(panel.title, loc="left", fontsize=10)
        ax.set_xlabel("step")
    return figures


def _with_held_out(rows: Rows) -> list[dict[str, float]]:
    """The rows with held-out accuracies averaged over data sources, as "held-out accuracy, mean@4"."""
    found = []
    for row in rows:
        by_name: dict[str, list[float]] = {}
        for key, value in row.items():
            if match := _EVALUATION.fullmatch(key):
                by_name.setdefault(f"held-out accuracy, {match[1]}@{match[2]}", []).append(value)
        found.append({**row, **{name: sum(values) / len(values) for name, values in by_name.items()}})
    return found


def smoothing_window(count: int) -> int:
    """Steps that a series of `count` points is averaged over: odd, about a 20th of it."""
    return count // 20 // 2 * 2 + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over the last axis; at the ends over the part of the window that exists."""
    half = window // 2
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    at = np.arange(values.shape[-1])
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(at))
    return (sums[..., last] - sums[..., first]) / (last - first)


def _by_seed(label: str, rows: Rows | Sequence[Rows]) -> list[Rows]:
    per_seed = [rows] if len(rows) and isinstance(rows[0], Mapping) else list(rows)
    if not per_seed or not all(len(one) for one in per_seed):
        raise ValueError(f"run {label!r} must have at least one row for every seed, got none")
    return per_seed


def common_steps(per_seed: Sequence[Rows], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every seed has a finite value of `key`, and the values [seeds, steps]."""
    series = [{row["step"]: row[key] for row in rows if key in row and math.isfinite(row[key])} for rows in per_seed]
    series = [one for one in series if one]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    return np.array(steps, dtype=float), np.array([[one[step] for step in steps] for one in series], dtype=float)


def _evaluations(per_seed: Sequence[Rows]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """ "mean@1", "best@8", ... -> steps and values averaged over data sources and seeds."""
    keys: dict[str, list[str]] = {}
    for key in sorted({key for rows in per_seed for row in rows for key in row}):
        if match := _EVALUATION.fullmatch(key):
            keys.setdefault(f"{match[1]}@{match[2]}", []).append(key)
    found = {}
    for name, same in keys.items():
        parts = [common_steps(per_seed, key) for key in same]
        steps = sorted(set.intersection(*(set(steps) for steps, _ in parts)))
        values = [[np.mean(v[:, list(s).index(step)]) for s, v in parts] for step in steps]
        if steps:
            found[name] = np.array(steps), np.mean(values, axis=1)
    return found


def _draw(ax: Axes, panel: _Panel, seeds: Mapping[str, list[Rows]]) -> int:
    """Draws every label's series. Returns the widest smoothing window, for the caption."""
    shown, window = [], 1
    for label, colour, style in _styled(seeds):
        steps, values = common_steps(seeds[label], panel.key)
        if steps.size == 0:
            continue
        own = smoothing_window(len(steps))
        window = max(window, own)
        smoothed = smooth(values, own)
        mean = smoothed.mean(axis=0)
        if own > 1 and len(values) == 1:
            ax.plot(steps, values[0], color=colour, alpha=0.25, linewidth=0.8, gid=f"every step:{label}")
        ax.plot(steps, mean, style, color=colour, linewidth=1.8, gid=label, marker="." if len(steps) == 1 else None)
        if 1 < len(values) < _BAND_SEEDS:
            for number, one in enumerate(smoothed):
                ax.plot(steps, one, color=colour, alpha=0.35, linewidth=0.8, gid=f"seed {number}:{label}")
        if len(values) >= _BAND_SEEDS:
            half = student_t(len(values) - 1) * smoothed.std(axis=0, ddof=1) / math.sqrt(len(values))
            ax.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        shown.append(values.mean(axis=0))
        if panel.evaluations:
            for name, (at, accuracy) in _evaluations(seeds[label]).items():
                face = colour if name.startswith("mean") else "white"
                ax.plot(at, accuracy, "o", color=colour, markerfacecolor=face, markersize=5, gid=f"{name}:{label}")
                shown.append(accuracy)
    # The limits are those of the means: an interval of few seeds is so wide that the means would look flat.
    low, high = min(map(np.min, shown)), max(map(np.max, shown))
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    ax.set_ylim(0 if panel.from_zero and low >= 0 else low - margin, high + margin)
    ax.set_title(panel.title, loc="left")
    ax.set_ylabel(panel.unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return window


def _styled(seeds: Mapping[str, list[Rows]]) -> list[tuple[str, str, str]]:
    count = len(COLOURS)
    return [(label, COLOURS[i % count], _STYLES[i // count % len(_STYLES)]) for i, label in enumerate(seeds)]


def _legend(seeds: Mapping[str, list[Rows]], panels: Sequence[_Panel]) -> list[Line2D]:
    handles = []
    for label, colour, style in _styled(seeds):
        name = label if len(seeds[label]) == 1 else f"{label} ({len(seeds[label])} seeds)"
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=1.8, label=name))
    if any(panel.evaluations for panel in panels):
        for name in sorted({name for per_seed in seeds.values() for name in _evaluations(per_seed)}, reverse=True):
            face = "#555555" if name.startswith("mean") else "white"
            look = {"marker": "o", "linestyle": "", "color": "#555555", "markerfacecolor": face, "markersize": 5}
            handles.append(Line2D([], [], **look, label=f"held-out accuracy, {name}"))
    return handles


def _legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Above the panels, where it covers no curve, in as many columns as the names leave room for."""
    for columns in range(min(6, len(handles)), 0, -1):
        legend = figure.legend(handles=handles, ncols=columns, fontsize=9, frameon=False, loc="outside upper left")
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            return
        legend.remove()


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display needed
    return figure


def _caption(figure: Figure, seeds: Mapping[str, list[Rows]], windows: Sequence[int]) -> None:
    """A line below the plot about smoothing, seeds and intervals."""
    counts = {len(per_seed) for per_seed in seeds.values()}
    parts = []
    if max(windows) > 1:
        parts.append(f"moving average over {max(windows)} steps" + (", faint: every step" if 1 in counts else ""))
    if any(1 < count < _BAND_SEEDS for count in counts):
        parts.append("faint: the seeds")
    if max(counts) >= _BAND_SEEDS:
        parts.append("band: 95 % interval of the mean over seeds (Student t)")
    if parts:
        figure.supxlabel("; ".join(parts), fontsize=8, color="#555555", x=0.99, ha="right")
