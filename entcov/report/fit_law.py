"""`fit-law`: the law of runs, its forecast from their first part, and the step at which their entropy will be gone."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from omegaconf import OmegaConf
from rich.console import Console

from entcov import arguments as check
from entcov.law import MIN_POINTS, EntropyLasts, Forecast, Law, entropy_lasts, fit_law, has_spread
from entcov.report.compare import plain, rich_table
from entcov.report.plots import COLOURS, new_figure, smooth, smoothing_window
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.rl.record.metrics import read_metrics

PAPER = {"mathematics": 0.009, "code": 0.012}  # RMSE of Cui et al.: from 36 steps to the next 200
_OF_TRAINING = {"response_mean": "actor/entropy_response_mean", "token_mean": "actor/entropy"}
_HELD_OUT = "heldout:"
_USABLE = r"actor/entropy(_response_mean)?|critic/score/mean|val-aux/.+/entropy/mean|val-core/.+/acc/mean@\d+"


@dataclass(frozen=True)
class Points:
    """H and R of a run's policies. `at` counts policies: a step's rollouts come from policy `step`, and an evaluation
    after that step is of policy `step + 1`.

    budget: the run's steps.
    """

    at: np.ndarray
    entropy: np.ndarray
    reward: np.ndarray
    budget: int


@dataclass(frozen=True)
class RunLaw:
    """The law of one run. `first` is the fit to its first part and `forecast` that fit's forecast of the rest; both are
    None where the first part is too short or flat. `lasts` is None where entropy is 0 from the start."""

    points: Points
    law: Law
    first: Law | None
    forecast: Forecast | None
    lasts: EntropyLasts | None

    @property
    def gone_early(self) -> bool:
        """Whether the entropy will be gone before the run's last step."""
        return self.lasts is not None and self.lasts.step is not None and self.lasts.step < self.points.budget


def fit_runs(
    runs: Mapping[str, str | Path],
    out: str | Path,
    *,
    fraction: float = 0.15,
    entropy: str = "response_mean",
    reward: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Fits the law to every run; prints tables, and writes OUT/law.json and OUT/law.png.

    Args:
        runs: label -> run folder.
        fraction: the part of a run's points, from the first, that the forecast is fitted to.
        entropy: response_mean (of each response, then over responses; as the paper), token_mean (as the loss sees it),
            both of the step's rollouts; or heldout:SOURCE, which eval.entropy measures.
        reward: train (mean score of the step's rollouts) or heldout:SOURCE (mean@k); default: that of the entropy.

    Raises:
        FileNotFoundError: a folder that is not that of a run.
        ValueError: a fraction outside (0, 1), an unknown entropy or reward, a run that did not log them, or one with
            fewer than 8 points or whose entropy does not vary. The message names the run.
    """
    keys = columns(entropy, reward)
    check.positive("fraction", fraction)
    check.fraction("fraction", fraction, most=0.9)
    found = {}
    for label, run in runs.items():
        try:
            found[label] = run_law(read_points(run, *keys), fraction)
        except ValueError as error:
            raise ValueError(f"{run}: {error}") from None
    out = Path(out)
    make_folder(out)
    table, picture = out / "law.json", out / "law.png"
    atomic_write(table, (json.dumps(plain(summary(found, keys, fraction)), indent=1) + "\n").encode())
    atomic_write(picture, plot(found, keys, fraction))
    console = console or Console()
    for title, header, rows in tables(found, fraction):
        console.print(f"\n[bold]{title}[/]", soft_wrap=True)
        console.print(rich_table("", header, rows))
    return [table, picture]


def columns(entropy: str, reward: str | None = None) -> tuple[str, str]:
    """Regular expressions of the two metrics."""
    if entropy.startswith(_HELD_OUT):
        first = f"val-aux/{re.escape(entropy.removeprefix(_HELD_OUT))}/entropy/mean"
    else:
        if entropy not in _OF_TRAINING:
            raise ValueError(
                f"entropy must be response_mean, token_mean or heldout:SOURCE, got {check.shown(entropy)}"
                f"{check.suggestion(entropy, _OF_TRAINING)}"
            )
        first = _OF_TRAINING[entropy]
    reward = reward or (entropy if entropy.startswith(_HELD_OUT) else "train")
    if reward == "train":
        return first, "critic/score/mean"
    if not reward.startswith(_HELD_OUT):
        raise ValueError(f"reward must be train or heldout:SOURCE, got {check.shown(reward)}")
    return first, rf"val-core/{re.escape(reward.removeprefix(_HELD_OUT))}/acc/mean@\d+"


def read_points(run: str | Path, entropy: str, reward: str) -> Points:
    """The points of a run's metrics.jsonl that have both; the arguments are those of `columns`."""
    rows = read_metrics(run)
    series = []
    for pattern in (entropy, reward):
        own = _series(rows, pattern)
        if not own:
            logged = sorted({key for row in rows for key in row if re.fullmatch(_USABLE, key)})
            hint = "; it is measured with eval.entropy true" if pattern.startswith("val-aux") else ""
            raise ValueError(f"no step has the metric {_name(pattern)}{hint}. Logged are {', '.join(logged) or 'none'}")
        series.append(own)
    both = sorted(series[0].keys() & series[1].keys())
    if len(both) < MIN_POINTS:
        raise ValueError(
            f"a fit needs at least {MIN_POINTS} points with {_name(entropy)} and {_name(reward)}, got {len(both)}"
        )
    at, h, r = (np.array(values, dtype=float) for values in (both, *([own[one] for one in both] for own in series)))
    return Points(at, h, r, _budget(Path(run), int(rows[-1]["step"])))


def run_law(points: Points, fraction: float) -> RunLaw:
    """The fit, the forecast from the first `fraction` of the points, and when the entropy is gone."""
    first = forecast = lasts = None
    count = round(fraction * len(points.at))
    if count >= MIN_POINTS and has_spread(points.entropy[:count]):
        first = fit_law(points.entropy[:count], points.reward[:count])
        forecast = first.forecast(points.entropy[count:], points.reward[count:])
    if np.median(points.entropy[:5]) > 0:
        lasts = entropy_lasts(points.at, points.entropy)
    return RunLaw(points, fit_law(points.entropy, points.reward), first, forecast, lasts)


def tables(found: Mapping[str, RunLaw], fraction: float) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows of text) of the fits, the forecasts, the entropy left, and differences to the first run."""
    laws, forecasts, left, differences = [], [], [], []
    base = next(iter(found.values())).law
    for label, run in found.items():
        law = run.law
        values = [f"{getattr(law, name):.3f} ± {getattr(law, 'half_width_' + name):.3f}" for name in _NAMES]
        high, low = law.entropy_range[::-1]
        laws.append([label, str(law.points), f"{high:.3f} to {low:.3f}", *values, f"{law.r2:.3f}"])
        count = round(fraction * law.points)
        if run.forecast is None:
            why = f"a fit needs {MIN_POINTS} points with different entropies"
            forecasts.append([label, str(count), why, "", "", f"{law.residual_sd:.4f}"])
        else:
            errors = (run.forecast.rmse, run.forecast.bias, run.forecast.end_error)
            forecasts.append([label, str(count), f"{errors[0]:.4f}", *(f"{e:+.4f}" for e in errors[1:]),
                              f"{law.residual_sd:.4f}"])  # fmt: skip
        gone, share = "does not fall", "—"
        if run.lasts is not None:
            share = f"{run.lasts.left:.0%}"
            gone = gone if run.lasts.step is None else f"{run.lasts.step:.0f}" + (" *" if run.gone_early else "")
        left.append([label, share, gone, str(run.points.budget)])
        if law is not base:
            cells = []
            for name in _NAMES:
                by = getattr(law, name) - getattr(base, name)
                half = math.hypot(getattr(law, "half_width_" + name), getattr(base, "half_width_" + name))
                cells.append(f"{by:+.3f} ± {half:.3f}" + (" *" if abs(by) > half else ""))
            differences.append([label, *cells])
    paper = " and ".join(f"{value} ({what})" for what, value in PAPER.items())
    pages = [
        ("The law, reward = -a exp(H) + b, with 95 % intervals", ["run", "points", "H, nats", *_TITLES, "R²"], laws),
        (
            f"Forecast from the first {fraction:.0%}, in units of reward. The paper's RMSE: {paper}",
            ["run", "fitted to", "RMSE", "mean error", "error at the end", "sd of the whole fit"],
            forecasts,
        ),
        (
            "Entropy left to pay with, (exp(H) - 1) / its first value; * gone (10 % left) before the run's last step",
            ["run", "left", "gone at step", "steps"],
            left,
        ),
    ]
    if differences:
        title = f"Difference to {next(iter(found))}; * an interval without 0 (runs are independent)"
        pages.append((title, ["run", *_TITLES], differences))
    return pages


def summary(found: Mapping[str, RunLaw], keys: tuple[str, str], fraction: float) -> dict[str, Any]:
    """What law.json holds."""
    runs = {}
    for label, run in found.items():
        law, forecast = run.law, run.forecast
        runs[label] = {
            "points": law.points,
            **{name: getattr(law, name) for name in _NAMES},
            **{f"{name}_half_width": getattr(law, "half_width_" + name) for name in _NAMES},
            "level": law.level, "r2": law.r2, "residual_sd": law.residual_sd, "block": law.block,
            "autocorrelation": law.autocorrelation, "entropy_range": law.entropy_range,
            "forecast": None if forecast is None else {
                "fitted_to": run.first.points, "a": run.first.a, "b": run.first.b,
                "rmse": forecast.rmse, "bias": forecast.bias, "end_error": forecast.end_error,
            },
            "entropy_left": None if run.lasts is None else run.lasts.left,
            "gone_step": None if run.lasts is None else run.lasts.step,
            "steps": run.points.budget,
        }  # fmt: skip
    named = dict(zip(("entropy", "reward"), map(_name, keys), strict=True))
    return {**named, "fraction": fraction, "paper_rmse": PAPER, "runs": runs}


def plot(found: Mapping[str, RunLaw], keys: tuple[str, str], fraction: float) -> bytes:
    """PNG: reward over entropy with the fits down to H = 0, and reward over steps with the forecasts."""
    figure = new_figure(13, 5.2)
    draw(*figure.subplots(1, 2), found, keys, fraction)
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    return file.getvalue()


def draw(
    over_entropy: Axes, over_steps: Axes, found: Mapping[str, RunLaw], keys: tuple[str, str], fraction: float
) -> None:
    """Draws the two panels of `plot`."""
    for (label, run), colour in zip(found.items(), COLOURS * len(found), strict=False):
        points, law = run.points, run.law
        h = np.linspace(0, points.entropy.max(), 200)
        curve, half = law.predict(h), law.forecast(h).half_width
        over_entropy.plot(points.entropy, points.reward, ".", color=colour, alpha=0.35, markersize=4)
        over_entropy.plot(h, curve, color=colour, label=f"{label}: ceiling {law.ceiling:.3f}", gid=label)
        over_entropy.fill_between(h, curve - half, curve + half, color=colour, alpha=0.15, linewidth=0)
        smoothed = smooth(points.reward[None], smoothing_window(len(points.at)))[0]
        over_steps.plot(points.at, smoothed, color=colour, label=label, gid=label)
        if run.forecast is not None:
            at, predicted, half = points.at[run.first.points :], run.forecast.predicted, run.forecast.half_width
            name = f"{label}: forecast, RMSE {run.forecast.rmse:.3f}"
            over_steps.plot(at, predicted, "--", color=colour, linewidth=1, label=name, gid=f"forecast:{label}")
            over_steps.fill_between(at, predicted - half, predicted + half, color=colour, alpha=0.12, linewidth=0)
            over_steps.axvline(at[0], color=colour, linewidth=0.6, linestyle=":")
    over_entropy.set_title("The law, 95 % intervals", loc="left")
    over_entropy.set_xlabel(f"H, nats ({_name(keys[0])})")
    over_entropy.set_ylabel(_name(keys[1]))
    over_entropy.invert_xaxis()  # a run goes from the left to the right
    over_steps.set_title(f"Forecast from the first {fraction:.0%}; solid: measured, moving average", loc="left")
    over_steps.set_xlabel("step")
    for axes in (over_entropy, over_steps):
        _plain_axes(axes)


_NAMES = ("a", "b", "ceiling")
_TITLES = ("a", "b", "ceiling b - a")


def _plain_axes(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _series(rows: Sequence[Mapping[str, float]], pattern: str) -> dict[int, float]:
    """Number of the policy -> value."""
    later = 1 if pattern.startswith("val-") else 0
    return {
        int(row["step"]) + later: value
        for row in rows
        for key, value in row.items()
        if re.fullmatch(pattern, key) and math.isfinite(value)
    }


def _name(pattern: str) -> str:
    """The metric that a pattern of `columns` stands for."""
    return re.sub(r"\\(.)", r"\1", pattern.replace(r"\d+", "k"))


def _budget(run: Path, last: int) -> int:
    """`steps` of the stored recipe; the last step where there is no recipe."""
    try:
        steps = OmegaConf.load(run / "config.yaml").get("steps")
    except FileNotFoundError:
        return last
    return steps if isinstance(steps, int) else last
