"""AEnt's clamp against the plain entropy bonus: what the trainings of clamp_training.py show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from entcov.report.compare import Estimate
from entcov.report.plots import COLOURS, new_figure
from entcov.studies.base import Findings, PartsStudy, Table
from entcov.studies.clamp_training import (
    AENT,
    BANDITS,
    CHAINS,
    FULL,
    LEARNING_RATE,
    NONE,
    PLAIN,
    SMOKE,
    TASKS,
    TOP,
    WAYS,
    measure,
    regularised_value,
)
from entcov.studies.words import shown

SMALLEST = 0.01  # difference of values that counts


class Clamp(PartsStudy):
    name = "clamp"
    title = "AEnt's clamp against the plain entropy bonus"
    question = "Where does an entropy bonus over the likeliest actions alone differ from the plain one?"

    def parts(self, smoke: bool) -> Mapping[str, Callable[[], Any]]:
        budget, tasks = (SMOKE, list(TASKS)[:1] + list(CHAINS)[:1]) if smoke else (FULL, list(TASKS))
        return {
            f"{task} / {way.name}": partial(measure, TASKS[task], way, budget) for task in tasks for way in WAYS[task]
        }

    def findings(self, results: Mapping[str, Any]) -> Findings:
        return found(nested(results))


Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # [task][name of the way]


def nested(results: Mapping[str, Any]) -> Results:
    by_task: dict[str, dict[str, Any]] = {}
    for label, result in results.items():
        task, way = label.split(" / ")
        by_task.setdefault(task, {})[way] = result
    return by_task


def difference(ways: Mapping[str, Mapping[str, Any]], way: str, base: str) -> Estimate:
    """Of the final values, seed by seed."""
    a, b = ways[way]["by_seed"], ways[base]["by_seed"]
    return Estimate.of({int(seed): a[seed] - b[seed] for seed in a})


def counts(own: Estimate) -> bool:
    """Whether a difference of values is measured, and not too small to matter."""
    return bool(own.excludes_zero) and abs(own.mean) >= SMALLEST


def found(results: Results) -> Findings:
    statements = [_aent(results), _gains(results), _others(results), *_chain(results), *_one(results)]
    values = {
        "tasks": {task: repr(TASKS[task]) for task in results}, "learning_rate": LEARNING_RATE, "results": results
    }  # fmt: skip
    return Findings(statements, [_table(results), _scan(results)], {"clamp": _figure(results)}, values)


def _aent(results: Results) -> str:
    differences = {task: difference(ways, AENT.name, PLAIN.name) for task, ways in results.items()}
    apart = [task for task, own in differences.items() if counts(own)]
    each = "; ".join(f"{task}: {shown(own, 3, sign='+')}" for task, own in differences.items())
    head = (
        f"AEnt's clamp of 0.33 ends elsewhere than the plain bonus on {len(apart)} of {len(differences)} tasks"
        if apart
        else f"On none of {len(differences)} tasks AEnt's clamp of 0.33 measurably ends elsewhere than the plain bonus"
    )
    return f"{head}, each with the coefficient that was best for it (difference of the final values, {each})."


def _gains(results: Results) -> str:
    """Which bonus is worth having at all."""
    gains = {
        f"{name} on {task}": difference(ways, name, NONE.name)
        for task, ways in results.items()
        for name in ways
        if name not in (NONE.name, TOP[1].name)
    }
    better, worse = (
        {label: own for label, own in gains.items() if counts(own) and (own.mean > 0) is up} for up in (True, False)
    )
    listed = "".join(f"; {label} {shown(own, 3, sign='+')}" for label, own in (better | worse).items())
    return (
        f"Against no bonus, {len(better)} of {len(gains)} bonuses end measurably higher and {len(worse)} lower{listed}."
    )


def _others(results: Results) -> str:
    clauses = []
    for task, ways in results.items():
        for way in ways:
            if way in (NONE.name, PLAIN.name, AENT.name):
                continue
            own = difference(ways, way, PLAIN.name)
            if counts(own):
                words = "more" if own.mean > 0 else "less"
                clauses.append((abs(own.mean), f"{way} on {task} {shown(own, 3, sign='+')} ({words})"))
    count = sum(len(set(ways) - {NONE.name, PLAIN.name, AENT.name}) for ways in results.values())
    if not clauses:
        return f"None of the {count} smaller sets of actions ends measurably elsewhere than the plain bonus."
    clauses.sort(reverse=True)
    listed = "; ".join(text for _, text in clauses)
    return (
        f"Smaller sets of actions end elsewhere than the plain bonus in {len(clauses)} of {count} comparisons, where "
        f"one in twenty would by chance: {listed}."
    )


def _chain(results: Results) -> list[str]:
    """Whether the plain bonus stops helping where right actions are few, as the paper says."""
    chains = {TASKS[task].right: ways for task, ways in results.items() if task in CHAINS}
    if not chains:
        return []
    parts = []
    for right, ways in chains.items():
        gains = {name: difference(ways, name, NONE.name) for name in ways if name != NONE.name}
        each = ", ".join(f"{name} {shown(own, 3, sign='+')}" for name, own in gains.items())
        parts.append(f"with {right} right of {TASKS[f'chain, {right} right'].actions:,} {each}")
    plain = {right: difference(ways, PLAIN.name, NONE.name) for right, ways in chains.items()}
    helped = [right for right, own in plain.items() if counts(own) and own.mean > 0]
    few, many = [r for r in chains if r < 5], [r for r in chains if r >= 5]
    paper = "The paper says that the plain bonus stops helping where fewer than about 5 actions are right. "
    if not many:
        paper += "This version has no chain with 5 or more."
    elif set(helped) == set(many):
        paper += "So it is here."
    elif set(helped) >= set(few):
        paper += "Here it helps with fewer too: this chain does not show the effect."
    else:
        listed = ", ".join(map(str, helped)) or "no number"
        paper += (
            f"Here it helps with {listed} of {', '.join(map(str, chains))}, which differs from the paper; horizon, "
            "first policy, sampling and step size are ours."
        )
    scans = [(own["coef"], own["scan"]) for ways in chains.values() for own in ways.values() if own["scan"]]
    coefs = sorted(scans[0][1], key=float)
    if len(coefs) > 1 and all(coef == float(coefs[0]) for coef, _ in scans):
        larger = max(sum(scan[coefs[1]]) / len(scan[coefs[1]]) for _, scan in scans)
        paper += (
            f" Every way chose the smallest coefficient, {coefs[0]}; with the next, {coefs[1]}, none ends above "
            f"{larger:.3f}: there the bonus hides a reward that needs two decisions."
        )
    return ["Gain over no bonus on the chain of two decisions: " + "; ".join(parts) + ". " + paper]


def _one(results: Results) -> list[str]:
    """The entropy of one action is 0, whatever the policy."""
    apart = [
        abs(ways[TOP[1].name]["by_seed"][seed] - own)
        for ways in results.values()
        if TOP[1].name in ways
        for seed, own in ways[NONE.name]["by_seed"].items()
    ]
    if not apart:
        return []
    same = "is no bonus at all: its final values equal those without a bonus on every seed"
    other = f"should be no bonus at all, and differs from none by up to {max(apart):.3g}: look for a mistake"
    return [f"A bonus on the top 1 alone {other if max(apart) > 0 else same}."]


def _table(results: Results) -> Table:
    header = ["task", "entropy of", "kept", "coefficient", "optimum", "final value", "- plain", "- none", "H, nats"]
    rows = []
    for task, ways in results.items():
        for name, own in ways.items():
            way = next(way for way in WAYS[task] if way.name == name)
            kept, coef = way.kept(TASKS[task].actions), own["coef"]
            bandit = TASKS[task].horizon == 1
            optimum = f"{regularised_value(TASKS[task], coef, kept):.3f}" if coef and bandit and kept > 1 else "—"
            plain, none = (
                "—" if name == base else _starred(difference(ways, name, base)) for base in (PLAIN.name, NONE.name)
            )
            seeds = {int(seed): value for seed, value in own["by_seed"].items()}
            bonus = [f"{kept:,}", f"{coef:g}"] if way != NONE else ["—", "—"]
            final = shown(Estimate.of(seeds), 3)
            rows.append([task, name, *bonus, optimum, final, plain, none, f"{own['entropy']:.2f}"])
    title = (
        "Final expected reward, reporting seeds: mean and half width of the 95 % interval (* counts); optimum: "
        "of the policy that maximises reward + bonus, for bandits"
    )
    return Table(title, header, rows)


def _starred(own: Estimate) -> str:
    return shown(own, 3, sign="+") + (" *" if counts(own) else "")


def _scan(results: Results) -> Table:
    coefs = next(iter(own["scan"] for ways in results.values() for own in ways.values() if own["scan"]))
    rows = [
        [task, name, *(f"{sum(own['scan'][c]) / len(own['scan'][c]):.3f}" for c in coefs)]
        for task, ways in results.items()
        for name, own in ways.items()
        if own["scan"]
    ]
    return Table("Mean final value on the choosing seeds, by coefficient", ["task", "entropy of", *coefs], rows)


def _figure(results: Results):
    figure = new_figure(9.6, 4.2)
    bandits, chains = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for number, task in enumerate(task for task in results if task in BANDITS):
        ways, colour = results[task], COLOURS[number % len(COLOURS)]
        points = sorted((way.kept(TASKS[task].actions), way.name) for way in WAYS[task] if way != NONE)
        for x, name in points:
            own = Estimate.of(ways[name]["by_seed"])
            face = "white" if name in (PLAIN.name, AENT.name) else colour
            bandits.errorbar(x, own.mean, own.half_width, fmt="o", color=colour, markerfacecolor=face, markersize=5)
        means = [Estimate.of(ways[name]["by_seed"]).mean for _, name in points]
        bandits.plot([x for x, _ in points], means, color=colour, linewidth=1.5, label=task)
    bandits.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
    bandits.set_xscale("log")
    bandits.set_xlabel("actions whose entropy is rewarded (hollow: clamp 0.33, all)")
    bandits.set_ylabel("final expected reward")
    bandits.set_title("Bandits", loc="left")
    by_right = {TASKS[task].right: ways for task, ways in results.items() if task in CHAINS}
    for number, way in enumerate(WAYS[next(iter(CHAINS))]):
        own = {right: Estimate.of(ways[way.name]["by_seed"]) for right, ways in by_right.items()}
        colour, style = COLOURS[number % len(COLOURS)], ("-", "--", ":", "-.")[number % 4]
        chains.errorbar(
            list(own), [e.mean for e in own.values()], [e.half_width for e in own.values()],
            fmt="o" + style, color=colour, markersize=4, linewidth=1.5, label=way.name,
        )  # fmt: skip
    chains.set_xscale("log")
    chains.set_xlabel("right actions of 100,000")
    chains.set_title("Chain of two decisions", loc="left")
    for ax in (bandits, chains):
        ax.set_ylim(-0.03, 1.05)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    bandits.legend(fontsize=8, frameon=False, loc="lower left")
    chains.legend(fontsize=8, frameon=False, loc="lower left")
    note = "bars: 95 % interval of the mean over reporting seeds; dotted: decoys alone"
    figure.supxlabel(note, fontsize=8, color="#555555")
    return figure
