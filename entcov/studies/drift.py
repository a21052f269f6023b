"""First-order entropy change against the measured one: what the steps of drift_steps.py show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from entcov.report.compare import Estimate
from entcov.report.plots import COLOURS, new_figure
from entcov.studies.base import Findings, PartsStudy, Table
from entcov.studies.drift_steps import Rows, network, table
from entcov.studies.words import shown, verdict

TABLE_STEPS = tuple(10 ** (k / 2) for k in range(-8, 3))
NETWORK_STEPS = {
    "gradient descent": tuple(10 ** (k / 2) for k in range(-8, 0)),
    "AdamW": tuple(10 ** (k / 2) for k in range(-11, -3)),
}
TABLE_SEEDS, NETWORK_SEEDS = tuple(range(10)), tuple(range(3))
AT_KL = 1e-3  # nats a token: about what an update of a training run does
MEASURABLE = 1e-4  # nats: a mean change below is too close to the rounding of float32 logits
WARM_START = 150  # supervised steps


class Drift(PartsStudy):
    name = "drift"
    title = "First-order entropy change against the measured one"
    question = "Up to which step does the covariance predict what an update does to the entropy?"

    def parts(self, smoke: bool) -> Mapping[str, Callable[[], Any]]:
        tables, networks = (TABLE_SEEDS[:3], NETWORK_SEEDS[:2]) if smoke else (TABLE_SEEDS, NETWORK_SEEDS)
        warm_start = 80 if smoke else WARM_START
        parts = {f"table {seed}": partial(table, seed, TABLE_STEPS) for seed in tables}
        return parts | {f"transformer {seed}": partial(network, seed, NETWORK_STEPS, warm_start) for seed in networks}

    def findings(self, results: Mapping[str, Any]) -> Findings:
        tables = [own for label, own in results.items() if label.startswith("table")]
        networks = [own for label, own in results.items() if label.startswith("transformer")]
        by_kind = {kind: [own[kind] for own in tables] for kind in tables[0]}
        by_optimizer = {name: [own["rows"][name] for own in networks] for name in NETWORK_STEPS}
        statements = [
            _tables(by_kind),
            _product(by_kind),
            _networks(by_optimizer),
            _means(by_optimizer),
            *_own_gradient(by_kind, by_optimizer),
        ]
        listed = [_summary(by_kind, by_optimizer), _network_steps(by_optimizer, networks)]
        values = _rounded({"tables": tables, "transformers": networks})
        return Findings(statements, listed, {"drift": _figure(by_kind, by_optimizer)}, values)


def slope(rows: Rows, error: str = "error", smallest: float = 0.0, largest: float = math.inf) -> float:
    """Of log error against log step, by least squares, where the measured change lies between the two."""
    used = [row for row in rows if smallest <= row["size"] and row["kl"] <= largest and row[error] > 0]
    if len(used) < 3:
        return math.nan
    x, y = (np.log([row[name] for row in used]) for name in ("eta", error))
    return float(np.polyfit(x, y, 1)[0])


def relative_error(rows: Rows, kl: float, error: str = "error") -> float:
    """mean |predicted - measured| / mean |measured| where the step has this KL, by interpolation of the logs.

    NaN where no step is so large or so small.
    """
    pairs = sorted((math.log(row["kl"]), math.log(row[error] / row["size"])) for row in rows if row["kl"] > 0)
    x, y = zip(*pairs, strict=True)
    return math.exp(np.interp(math.log(kl), x, y)) if x[0] <= math.log(kl) <= x[-1] else math.nan


def _over(seeds: Sequence[float]) -> Estimate:
    """Of the seeds that have a number."""
    return Estimate.of({seed: own for seed, own in enumerate(seeds) if not math.isnan(own)})


def _slopes(runs: Mapping[str, Sequence[Rows]], **where: float) -> dict[str, Estimate]:
    return {name: _over([slope(rows, **where) for rows in seeds]) for name, seeds in runs.items()}


def _relative(runs: Mapping[str, Sequence[Rows]]) -> dict[str, Estimate]:
    return {name: _over([relative_error(rows, AT_KL) for rows in seeds]) for name, seeds in runs.items()}


SMALL_TABLE = {"largest": 1e-3}  # KL: beyond, the third order shows
SMALL_NETWORK = {"smallest": MEASURABLE, "largest": 1e-2}


def _percent(of: Estimate) -> str:
    return shown(Estimate(100 * of.mean, 100 * of.half_width, of.by_seed), 1) + " %"


def _tables(by_kind: Mapping[str, Sequence[Rows]]) -> str:
    slopes, relative = _slopes(by_kind, **SMALL_TABLE), _relative(by_kind)
    each = "; ".join(f"{kind} {shown(own, 3)}" for kind, own in slopes.items())
    off = [kind for kind, own in slopes.items() if not abs(own.mean - 2) <= 0.05]
    close = "as theory says" if not off else f"which is not the 2 of theory for {', '.join(off)}"
    errors = "; ".join(f"{kind} {_percent(own)}" for kind, own in relative.items())
    return (
        f"Tables of logits: the error of the prediction falls with a slope of {each}, {close}. Where a step moves the "
        f"policy by KL = {AT_KL:g} nats, the error is, of the change itself: {errors}."
    )


def _product(by_kind: Mapping[str, Sequence[Rows]]) -> str:
    rows = [row for seeds in by_kind.values() for one in seeds for row in one]
    rounding = max(row["rounding"] for row in rows if row["kl"] <= AT_KL)
    trusted = [row["size"] for row in rows if row["rounding"] > 0.01 * row["size"]]
    text = (
        f"Up to there `logit_covariance` in float32 differs from float64 by at most {rounding:.1e} nats, mean over rows"
    )
    if not trusted:
        return text + ", less than 1 % of the change at every step."
    return text + f"; above a change of {max(trusted):.1e} nats its rounding is below 1 % of the change."


def _networks(runs: Mapping[str, Sequence[Rows]]) -> str:
    slopes, relative = _slopes(runs, **SMALL_NETWORK), _relative(runs)
    each = "; ".join(
        f"{name}: slope {shown(slopes[name], 2)}, error at KL = {AT_KL:g} {_percent(relative[name])}" for name in runs
    )
    off = [name for name, own in slopes.items() if not abs(own.mean - 2) <= own.half_width + 0.1]
    close = "The slope is 2 for each" if not off else f"The slope is not 2 for {', '.join(off)}"
    return f"Transformers, with the logits' own change known (`logit_covariance`): {each}. {close}."


def _means(runs: Mapping[str, Sequence[Rows]]) -> str:
    """The change that a metric shows is the mean over tokens, in which rises and falls cancel."""
    clauses = []
    for name, seeds in runs.items():
        cancel = _over([abs(_at(rows, "mean_change")) / _at(rows, "size") for rows in seeds])
        errors = [abs(_at(rows, "mean_predicted") / _at(rows, "mean_change") - 1) for rows in seeds]
        wrong = sum(_at(rows, "mean_predicted") * _at(rows, "mean_change") < 0 for rows in seeds)
        clauses.append(
            f"{name}: the mean change is {_percent(cancel)} of the mean size, its prediction is off by "
            f"{min(errors):.0%} to {max(errors):.0%}, and has the wrong sign in {wrong} of {len(seeds)}"
        )
    return (
        "The mean over tokens, which a run logs, is predicted worse than its parts, since rises and falls cancel. Near "
        f"KL = {AT_KL:g}: " + "; ".join(clauses) + "."
    )


def _own_gradient(tables: Mapping[str, Sequence[Rows]], networks: Mapping[str, Sequence[Rows]]) -> list[str]:
    """What entropy_drift * advantage, known before the step, says of the change."""
    on_table = _over([rows[0]["correlation"] for rows in tables["sampled gradient"]])
    adamw = _over([rows[0]["of_drift"] for rows in tables["AdamW"]])
    own = {name: _over([_at(rows, "drift") for rows in seeds]) for name, seeds in networks.items()}
    each = " and ".join(f"{shown(e, 2)} ({name})" for name, e in own.items())
    least = min(own.values(), key=lambda e: e.mean)
    words = verdict(
        least, "it has the right sign there", "it has the wrong sign there", "none is resolved for each of them"
    )
    small = max(e.mean for e in own.values()) < 0.9
    so = (
        "which way a token pushes, and not by how much its entropy will change"
        if small
        else "that of single tokens too"
    )
    return [
        "entropy_drift × advantage is known before the step. Over the states of a table it correlates with the change "
        f"by {shown(on_table, 3)} under the sampled gradient and by {shown(adamw, 3)} under AdamW, at the "
        "smallest step. Over the tokens of a transformer, whose weights are shared by all tokens, by "
        f"{each}: {words}. So it says {so}. Theorems 1 and 2 of Cui et al. are about tables; their own measurement "
        "(figure 8) is a mean over responses of a model of 7 billion weights, and nothing here contradicts it."
    ]


def _at(rows: Rows, name: str) -> float:
    """The value at the step whose KL is nearest to AT_KL."""
    return min((row for row in rows if row["kl"] > 0), key=lambda row: abs(math.log(row["kl"] / AT_KL)))[name]


def _summary(by_kind: Mapping[str, Sequence[Rows]], networks: Mapping[str, Sequence[Rows]]) -> Table:
    rows = []
    for place, runs, where in (("table", by_kind, SMALL_TABLE), ("transformer", networks, SMALL_NETWORK)):
        slopes, relative = _slopes(runs, **where), _relative(runs)
        for name in runs:
            errors = [_over([relative_error(one, kl) for one in runs[name]]) for kl in (1e-4, 1e-2)]
            cells = [_percent(own) if own.by_seed else "—" for own in (errors[0], relative[name], errors[1])]
            rows.append([place, name, str(len(runs[name])), shown(slopes[name], 3), *cells])
    header = ["logits of", "step", "seeds", "slope", "error at KL 1e-4", f"at {AT_KL:g}", "at 1e-2"]
    return Table(
        "Error of the first-order prediction: slope over step sizes, and size relative to the change", header, rows
    )


def _network_steps(runs: Mapping[str, Sequence[Rows]], networks: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for name, seeds in runs.items():
        for index, row in enumerate(seeds[0]):
            own = [one[index] for one in seeds]
            means = [sum(r[key] for r in own) / len(own) for key in ("kl", "mean_change", "mean_predicted")]
            correlation = _over([r["drift"] for r in own])
            rows.append([name, f"{row['eta']:.1e}", *(f"{mean:.2e}" for mean in means), shown(correlation, 2)])
    where = ", ".join(f"{own['entropy']:.2f} nats and reward {own['reward']:.2f}" for own in networks)
    header = ["step", "learning rate", "KL", "change, nats", "predicted", "corr. with drift × A"]
    return Table(f"Transformers, means over seeds and tokens; they begin with {where}", header, rows)


def _geometric(values: Sequence[float]) -> float:
    """Mean, NaN where a value is 0: a change that float32 does not show."""
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else math.nan


def _rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, Mapping):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _figure(by_kind: Mapping[str, Sequence[Rows]], networks: Mapping[str, Sequence[Rows]]):
    figure = new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for number, (kind, seeds) in enumerate(by_kind.items()):
        style = {"color": COLOURS[number], "marker": "osD^"[number], "markersize": 4}
        for error, line in (("error", "-"), ("product_error", ":")):
            x = [row["eta"] for row in seeds[0]]
            y = [np.mean([rows[i][error] for rows in seeds]) for i in range(len(x))]
            left.plot(x, y, line, linewidth=1.5, label=kind if error == "error" else None, **style)
    x = np.array(TABLE_STEPS)
    left.plot(x, 0.02 * x**2, color="#777777", linewidth=0.8, linestyle="--", label="slope 2")
    left.set_xlabel("step size (dotted: float32, as the product measures)")
    left.set_ylabel("error of the prediction, nats")
    left.set_title("Tables of logits", loc="left")
    runs = {f"table, {kind}": seeds for kind, seeds in by_kind.items()} | {
        f"transformer, {name}": seeds for name, seeds in networks.items()
    }
    for number, (name, seeds) in enumerate(runs.items()):
        kl = [_geometric([rows[i]["kl"] for rows in seeds]) for i in range(len(seeds[0]))]
        y = [_geometric([rows[i]["error"] / rows[i]["size"] for rows in seeds]) for i in range(len(kl))]
        shape = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if name.startswith("table") else "--"}
        right.plot(kl, y, linewidth=1.5, label=name, **shape)
    right.axvline(AT_KL, color="#777777", linewidth=0.8, linestyle=":")
    right.set_xlim(1e-7, 10)
    right.set_ylim(1e-4, 10)
    right.set_xlabel("KL(old || new), nats a token")
    right.set_ylabel("error / change")
    right.set_title("Relative error, means over seeds", loc="left")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    return figure
