"""Is it temperature alone? The policies of the study `controls` once more, sampled hotter and colder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from entcov.intervals import mean_interval
from entcov.report.plots import COLOURS, new_figure
from entcov.rl.run import evaluate_run
from entcov.rl.stored_recipe import load_run
from entcov.studies.base import Findings, How, Study, Table, run_parts
from entcov.studies.plan import Plan
from entcov.studies.training import TrainingStudy

TEMPERATURES = (0.6, 1.0, 1.4, 1.8)
SAMPLES = 16
_HELD_OUT = "/held_out"  # end of the data source's name
Curves = Mapping[str, Mapping[int, Mapping[float, Mapping[int, float]]]]  # arm -> seed -> temperature -> k -> pass@k


class TemperatureStudy(Study):
    """Evaluates the last checkpoint of each run that `controls` reports, which it makes where they are missing."""

    name: ClassVar[str] = "temperature"
    title: ClassVar[str] = "Is it temperature alone?"
    question: ClassVar[str] = (
        "A flatter policy finds more with more samples, and so does a sharp one that is sampled hotter. Is an entropy "
        "control still ahead where every policy has the temperature that is best for it?"
    )
    runs: ClassVar[TrainingStudy] = TrainingStudy("controls")

    def run(self, how: How) -> Findings:
        folder = how.folder.with_name(how.folder.name.replace(self.name, self.runs.name, 1))
        plan, rows, _, _ = self.runs.trained(How(folder, how.smoke, how.jobs, how.arms, how.display))
        places = [(arm, seed, t) for arm in rows for seed in plan.seeds for t in TEMPERATURES]
        parts = {
            f"{arm} seed {seed} T {t}": partial(pass_at_k, self.runs.run_folder(folder, arm, seed), t)
            for arm, seed, t in places
        }
        found = iter(run_parts(parts, how).values())
        curves: dict[str, dict[int, dict[float, dict[int, float]]]] = {}
        for arm, seed, t in places:
            own = {int(k): value for k, value in next(found).items()}
            curves.setdefault(arm, {}).setdefault(seed, {})[t] = own
        return evaluate(plan, curves)


def pass_at_k(run: Path, temperature: float) -> dict[int, float]:
    """k -> held-out pass@k of a run's last checkpoint."""
    overrides = [f"eval.temperature={temperature}", f"eval.samples={SAMPLES}"]
    _, _, results = evaluate_run(load_run(run, overrides, trusted=False))
    (own,) = (row for row in results if row.source.endswith(_HELD_OUT))
    return own.solved.curve()


def evaluate(plan: Plan, curves: Curves) -> Findings:
    said, tables, values = [], [], {}
    for k in (1, SAMPLES):
        means = {
            arm: {t: [own[t][k] for own in by_seed.values()] for t in TEMPERATURES} for arm, by_seed in curves.items()
        }
        best = {arm: max(TEMPERATURES, key=lambda t, own=own: fmean(own[t])) for arm, own in means.items()}
        rows = []
        for arm, own in means.items():
            cells = [arm, *(_interval(own[t]) for t in TEMPERATURES), f"{best[arm]:g}"]
            if arm in plan.baselines:
                baseline = plan.baselines[arm]
                pairs = zip(own[best[arm]], means[baseline][best[baseline]], strict=True)
                difference = [a - b for a, b in pairs]
                cells.append(f"{_interval(difference, '+')} ({baseline})")
                said.append(_statement(arm, baseline, k, difference))
            rows.append(cells if arm in plan.baselines else [*cells, "—"])
        header = ["arm", *(f"T = {t:g}" for t in TEMPERATURES), "best T", "difference, each at its best T"]
        tables.append(Table(f"Held-out pass@{k}, mean over seeds with its 95 % interval", header, rows))
        values[f"pass@{k}"] = means
    return Findings(said, tables, {"temperature": _figure(curves)}, values)


def _statement(arm: str, baseline: str, k: int, difference: list[float]) -> str:
    mean, half = mean_interval(difference)
    apart = abs(mean) > half
    verdict = ("ahead of" if mean > 0 else "behind") if apart else "not told apart from"
    return f"pass@{k}, each at its best temperature: {arm} is {verdict} {baseline} ({_interval(difference, '+')})."


def _interval(values: list[float], sign: str = "") -> str:
    mean, half = mean_interval(values)
    return f"{mean:{sign}.3f}" + ("" if half != half else f" ± {half:.3f}")


def _figure(curves: Curves) -> Figure:
    """pass@1 and pass@16 over the temperature, mean over seeds with the 95 % interval as bars."""
    figure = new_figure(11, 4.4)
    for ax, k in zip(figure.subplots(1, 2), (1, SAMPLES), strict=True):
        for number, ((arm, by_seed), colour) in enumerate(zip(curves.items(), COLOURS * len(curves), strict=False)):
            found: list[Any] = [mean_interval([own[t][k] for own in by_seed.values()]) for t in TEMPERATURES]
            mean, half = np.array(found).T
            shift = 0.01 * (number - len(curves) / 2)  # so that the bars do not hide each other
            ax.errorbar(
                np.array(TEMPERATURES) + shift, mean, yerr=np.nan_to_num(half), fmt="o-", color=colour, markersize=3,
                linewidth=1.2, capsize=2, label=arm,
            )  # fmt: skip
        ax.set_title(f"Held-out pass@{k}", loc="left")
        ax.set_xlabel("temperature of sampling")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    return figure
