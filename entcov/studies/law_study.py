"""The law R = -a exp(H) + b on the runs of the hard-prompt benchmark: its fit, and its forecasts from early parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from entcov.intervals import mean_interval
from entcov.report.fit_law import PAPER, Points, RunLaw, columns, read_points, run_law
from entcov.report.plots import COLOURS, new_figure
from entcov.studies.base import Findings, How, Study, Table
from entcov.studies.plan import Plan
from entcov.studies.training import TrainingStudy

FRACTIONS = (0.15, 0.3, 0.5)  # of a run that a forecast is made from; the paper's are 0.15 (7B) and 0.12 (32B)
SCALE = 4  # steps whose mean is one point: 2,048 responses, as many as a step of the paper has
Laws = Mapping[str, Mapping[int, Mapping[float, RunLaw]]]  # arm -> seed -> fraction


class LawStudy(Study):
    """Fits the law to the runs that the study `controls` reports, which it makes where they are missing."""

    name: ClassVar[str] = "law"
    title: ClassVar[str] = "The law R = -a exp(H) + b"
    question: ClassVar[str] = (
        "Does the reward follow the entropy as Cui et al. (arXiv 2505.22617, eq. 1) find, do a run's first steps "
        "forecast its end, and do the controls share one curve?"
    )
    runs: ClassVar[TrainingStudy] = TrainingStudy("controls")

    def run(self, how: How) -> Findings:
        folder = how.folder.with_name(how.folder.name.replace(self.name, self.runs.name, 1))
        plan, rows, _, _ = self.runs.trained(How(folder, how.smoke, how.jobs, how.arms, how.display))
        entropy, reward = columns("response_mean")
        laws = {
            arm: {
                seed: laws_of(
                    read_points(self.runs.run_folder(folder, arm, seed), entropy, reward), 1 if how.smoke else SCALE
                )
                for seed in by_seed
            }
            for arm, by_seed in rows.items()
        }
        return evaluate(plan, laws)


def laws_of(points: Points, scale: int = SCALE) -> dict[float, RunLaw]:
    """By fraction, the law of a run whose points are means over `scale` steps."""
    return {fraction: run_law(averaged(points, scale), fraction) for fraction in FRACTIONS}


def averaged(points: Points, count: int) -> Points:
    """Means over `count` successive points each; the last one may be over fewer. One point stays as it is."""
    starts = range(0, len(points.at), count)
    at, entropy, reward = (
        np.array([series[i : i + count].mean() for i in starts])
        for series in (points.at, points.entropy, points.reward)
    )
    return Points(at, entropy, reward, points.budget)


def evaluate(plan: Plan, laws: Laws) -> Findings:
    fits, forecasts, values = [], [], {}
    for arm, by_seed in laws.items():
        whole = [own[FRACTIONS[0]].law for own in by_seed.values()]
        fits.append([arm, *(_interval([getattr(law, name) for law in whole]) for name in ("a", "b", "ceiling", "r2"))])
        errors = {fraction: _errors(by_seed, fraction) for fraction in FRACTIONS}
        forecasts.append([arm, *(_interval(errors[f][which]) for f in FRACTIONS for which in ("rmse", "end"))])
        values[arm] = {
            "a": [law.a for law in whole], "b": [law.b for law in whole], "r2": [law.r2 for law in whole],
            "forecasts": {str(fraction): found for fraction, found in errors.items()},
        }  # fmt: skip
    paper = " and ".join(f"{value} ({what})" for what, value in PAPER.items())
    header = ["arm", *(f"{title} from {f:.0%}" for f in FRACTIONS for title in ("RMSE", "error at the end"))]
    return Findings(
        statements=statements(laws, paper),
        tables=[
            Table("Fits to whole runs, mean over seeds with its 95 % interval", ["arm", "a", "b", "b − a", "R²"], fits),
            Table(f"Forecasts, in units of reward; the paper's RMSE: {paper}", header, forecasts),
        ],
        figures={"law": _figure(laws)},
        values={"seeds": list(plan.seeds), "steps_a_point": SCALE, "paper_rmse": PAPER, "arms": values},
    )


def statements(laws: Laws, paper: str) -> list[str]:
    everything = [own for by_seed in laws.values() for own in by_seed.values()]
    fitted = [own[FRACTIONS[0]].law.r2 for own in everything]
    said = [f"The law explains {_interval(fitted)} of the variance of a run's reward (R², {len(fitted)} runs)."]
    first = [own[FRACTIONS[0]].forecast for own in everything]
    if all(first):
        rmse, end = [one.rmse for one in first], [one.end_error for one in first]
        direction = _direction(end)
        said.append(
            f"From the first {FRACTIONS[0]:.0%} of a run the rest is forecast with an RMSE of {_interval(rmse)}; the "
            f"paper reports {paper}. At the end the forecast is {direction} ({_interval(end, '+')})."
        )
    a = {arm: [own[FRACTIONS[0]].law.a for own in by_seed.values()] for arm, by_seed in laws.items()}
    arms = list(a)
    apart = [
        f"{arm} ({_interval(differences, '+')})"
        for arm in arms[1:]
        if _excludes_zero(differences := [x - y for x, y in zip(a[arm], a[arms[0]], strict=True)])
    ]
    said.append(
        f"Arms whose a differs from that of {arms[0]}, paired by seed: {', '.join(apart)}. They do not share one curve."
        if apart
        else f"No arm's a is told apart from that of {arms[0]}."
    )
    return said


def _errors(by_seed: Mapping[int, Mapping[float, RunLaw]], fraction: float) -> dict[str, list[float]]:
    """Of the runs that have a forecast."""
    found = [own[fraction].forecast for own in by_seed.values() if own[fraction].forecast is not None]
    return {"rmse": [one.rmse for one in found], "end": [one.end_error for one in found]}


def _direction(errors: Sequence[float]) -> str:
    if not _excludes_zero(errors):
        return "neither too high nor too low"
    return "too high" if sum(errors) > 0 else "too low"


def _excludes_zero(values: Sequence[float]) -> bool:
    mean, half = mean_interval(values)
    return abs(mean) > half  # False for NaN, where there is one value


def _interval(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "—"
    mean, half = mean_interval(values)
    return f"{mean:{sign}.3f}" + ("" if half != half else f" ± {half:.3f}")


def _figure(laws: Laws) -> Figure:
    """Reward over entropy, every run's points in its arm's colour, with the fit of the first seed; forecasts beside."""
    figure = new_figure(12, 4.6)
    curve, ahead = figure.subplots(1, 2)
    for (arm, by_seed), colour in zip(laws.items(), COLOURS * len(laws), strict=False):
        for number, own in enumerate(by_seed.values()):
            run = own[FRACTIONS[0]]
            label = arm if number == 0 else None
            curve.plot(run.points.entropy, run.points.reward, ".", color=colour, alpha=0.5, markersize=4, label=label)
        law = next(iter(by_seed.values()))[FRACTIONS[0]].law
        at = np.linspace(0, max(own[FRACTIONS[0]].points.entropy.max() for own in by_seed.values()), 100)
        curve.plot(at, law.predict(at), color=colour, linewidth=1)
        errors = [_errors(by_seed, fraction)["rmse"] for fraction in FRACTIONS]
        ahead.plot(
            [f for f, e in zip(FRACTIONS, errors, strict=True) if e], [np.mean(e) for e in errors if e], "o-",
            color=colour, label=arm,
        )  # fmt: skip
    curve.set_title(
        f"Reward over entropy, means over {SCALE} steps; lines: the first seed's fit", loc="left", fontsize=10
    )
    curve.set_xlabel("entropy, nats")
    curve.set_ylabel("reward")
    ahead.set_title("Error of the forecast; dashed: the paper's", loc="left", fontsize=10)
    for value in PAPER.values():
        ahead.axhline(value, color="#555555", linestyle="--", linewidth=1)
    ahead.set_xlabel("fraction of the run that the law is fitted to")
    ahead.set_ylabel("RMSE, reward")
    ahead.set_ylim(bottom=0)
    for ax in (curve, ahead):
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    curve.legend(fontsize=8, frameon=False)
    return figure
