"""AEnt's clamp against the plain entropy bonus, on sparse bandits and on a chain of sparse decisions.

The tasks. A state has A actions, of which `right` are right and five are decoys; all others are wrong. One state
(`horizon` 1) is a bandit; with more, a response is one action in each of them, in a fixed order. A response whose
actions are all right is worth 1, one whose actions are all right or decoys is worth 1/2, any other 0. The policy is a
table of logits. It begins as a pretrained model's might: a power law over ranks, of which the decoys are the first
five, and the right actions lie at random places far behind them; `flat` of the mass is spread evenly over all actions.

The chain is our reading of AEnt's synthetic MDP (Shen, arXiv 2509.03493, figure 1), whose point is |A| = 100,000 and
few right actions. What we could read of the paper leaves the horizon, the rewards of wrong actions, the first
policy, sampled or exact gradients, step size, coefficients and seeds open; all of these are ours.

The training. Every step samples 64 responses and takes one step of gradient descent on `entcov.policy_loss`, summed
over tokens, with advantages reward - mean (dr_grpo); the bonus is a mean over responses of the sum over their tokens.
The learning rate is one for all. The value of a policy is its exact expected reward, the mean of the last ten steps.

Choosing and reporting. Every way to take the entropy gets the same coefficients to choose from and the same seeds to
choose on (0 to 2): the one with the largest mean value. What is reported comes from seeds 100 to 111 with that
coefficient. A seed fixes the places of the right actions and all random numbers, so ways are compared seed by seed.
A difference counts where its 95 % interval has no 0 in it and it is at least 0.01. The second rule was added after the
first run, in which differences of 0.0003 had intervals of that width: with the random numbers in common, seeds that all
end on the decoys agree to four digits. Final values have two heads, near 1/2 and 1, so the intervals are approximate.

Ceilings, stated before any run: 1 for any policy, 1/2 for a policy that knows only decoys. A bonus of coefficient c
over the k likeliest actions has its optimum at p_a ~ exp(r_a / c) on k actions, see `regularised_value`: with one right
action, five decoys and c = 0.1 it is worth .68 for A = 10,000, .18 for A = 100,000, and .98 with k = 100 for either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entcov.controls import AEnt, Control, EntropyBonus
from entcov.objective.advantages import DrGRPO
from entcov.objective.policy_loss import policy_loss
from entcov.objective.responses import Responses
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.report.compare import Estimate
from entcov.report.plots import COLOURS, new_figure
from entcov.stats.token_stats import token_stats
from entcov.studies.base import Findings, PartsStudy, Table
from entcov.studies.words import shown

RESPONSES = 64  # of a step
DECOYS = 5
LAST = 10  # steps that the value is averaged over
SMALLEST = 0.01  # difference of values that counts
BLOCK = 100  # actions; a sample is drawn by the block's mass first
LEARNING_RATE = 20.0
CHOOSING, REPORTING = tuple(range(3)), tuple(range(100, 112))
COEFS = (0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)


@dataclass(frozen=True)
class Task:
    """See the head of this file. Ranks count from 0; `ranks` is the range in which the right actions lie."""

    actions: int
    right: int = 1
    horizon: int = 1
    ranks: tuple[int, int] = (50, 500)
    exponent: float = 1.0
    flat: float = 0.0

    def first_policy(self) -> Tensor:
        """[actions] float64."""
        p = torch.arange(1, self.actions + 1, dtype=torch.float64) ** -self.exponent
        return (1 - self.flat) * p / p.sum() + self.flat / self.actions


@dataclass(frozen=True)
class Way:
    """What entropy the bonus is on: none at all; of all actions; without the share `clamp_p`; of the `top_k` alone."""

    name: str
    clamp_p: float | None = None
    top_k: int | None = None

    @property
    def clamp(self) -> dict[str, Any]:
        """For `token_stats`."""
        given = {"clamp_p": self.clamp_p, "top_k": self.top_k}
        return {name: value for name, value in given.items() if value is not None}

    def kept(self, actions: int) -> int:
        return self.top_k or actions - int(actions * (self.clamp_p or 0.0))

    def control(self, coef: float) -> Control:
        return AEnt(entropy_coef=coef, adaptive=False) if self.clamp else EntropyBonus(coef)


NONE, PLAIN, AENT = Way("no bonus"), Way("plain bonus"), Way("clamp 0.33", clamp_p=0.33)
TOP = {k: Way(f"top {k:,}", top_k=k) for k in (1, 10, 100, 1000)}
BANDITS = {
    "10,000 arms": Task(10_000),
    "100,000 arms": Task(100_000),
    "10,000 arms, half of the mass flat": Task(10_000, exponent=1.5, flat=0.5),
    "10,000 arms, 20 right ones in the tail": Task(10_000, right=20, ranks=(2000, 8000)),
}
CHAINS = {f"chain, {right} right": Task(100_000, right, 2, (20, 200)) for right in (1, 5, 50)}
TASKS = BANDITS | CHAINS
WAYS = dict.fromkeys(BANDITS, (NONE, PLAIN, AENT, *TOP.values())) | dict.fromkeys(CHAINS, (NONE, PLAIN, AENT, TOP[100]))


@dataclass(frozen=True)
class Budget:
    """The same for every way."""

    steps: int
    coefs: tuple[float, ...]
    choosing: tuple[int, ...]
    reporting: tuple[int, ...]


FULL = Budget(200, COEFS, CHOOSING, REPORTING)
SMOKE = Budget(12, (0.03, 0.1), CHOOSING[:2], REPORTING[:3])


def regularised_value(task: Task, coef: float, kept: int) -> float:
    """Expected reward of the bandit's policy that maximises expected reward + coef * entropy over `kept` actions.

    That policy is softmax(reward / coef) on them; the right actions and the decoys are among them, as far as they fit.
    """
    right, decoys = min(task.right, kept), min(DECOYS, max(0, kept - task.right))
    # exp((reward - 1) / coef): the largest is 1.
    weight = {1.0: right, 0.5: decoys * math.exp(-0.5 / coef), 0.0: (kept - right - decoys) * math.exp(-1 / coef)}
    return sum(reward * w for reward, w in weight.items()) / sum(weight.values())


def train(task: Task, way: Way, coef: float, steps: int, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Trains one policy for every seed, all at once; they do not depend on each other.

    Returns: "value", and "entropy" in nats, of the policies at the end, by seed; "curve", the mean value of every step.
    """
    runs, rows, actions = len(seeds), len(seeds) * task.horizon, task.actions
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    low, high = task.ranks
    right = torch.stack(
        [torch.randperm(high - low, generator=g)[: task.right] + low for g in generators for _ in range(task.horizon)]
    )
    decoys = torch.arange(DECOYS).expand(rows, DECOYS)
    kind = torch.zeros(rows, actions, dtype=torch.int8).scatter_(1, decoys, 1).scatter_(1, right, 2)
    logits = task.first_policy().log().float().repeat(rows, 1).requires_grad_()
    controls = [] if way == NONE else [way.control(coef)]
    config = PolicyLossConfig(aggregation="token-sum")
    group = torch.arange(runs).repeat_interleave(RESPONSES)
    curve = []

    def of_responses(per_row: Tensor | None) -> Tensor | None:
        return None if per_row is None else per_row.repeat_interleave(RESPONSES)

    for _ in range(steps):
        with torch.no_grad():
            p = logits.softmax(-1)
            uniform = [torch.rand(task.horizon, RESPONSES, generator=g, dtype=torch.float64) for g in generators]
            action = sample(p, torch.cat(uniform))
            reward = rewards(kind.gather(1, action).view(runs, task.horizon, RESPONSES))
            curve.append(value(p, right, decoys, task.horizon))
            table = Responses.of(reward.flatten(), group, torch.full((len(group),), task.horizon))
            advantage = DrGRPO()(table).value.view(runs, 1, RESPONSES).expand(-1, task.horizon, -1).flatten()
        stats = token_stats(logits, action[:, 0].contiguous(), **way.clamp)
        chosen = logits.gather(1, action)  # the log of the sum of exponentials is that of the first one
        logprob = (chosen - (chosen[:, 0] - stats.logprob)[:, None]).flatten()
        tokens = Tokens(
            logprob, logprob.detach(), advantage, torch.ones(len(logprob), dtype=torch.bool),
            entropy=of_responses(stats.entropy), clamped_entropy=of_responses(stats.clamped_entropy),
        )  # fmt: skip
        loss, _ = policy_loss(tokens, config, controls=controls)
        (gradient,) = torch.autograd.grad(loss / RESPONSES, logits)
        with torch.no_grad():
            logits -= LEARNING_RATE * gradient
    entropy = token_stats(logits.detach(), right[:, 0].contiguous()).entropy.view(runs, task.horizon).mean(1)
    by_step = torch.stack(curve)
    return {
        "value": by_step[-LAST:].mean(0).tolist(), "entropy": entropy.tolist(), "curve": by_step.mean(1).tolist()
    }  # fmt: skip


def sample(p: Tensor, uniform: Tensor) -> Tensor:
    """Actions [rows, n] of the policies p [rows, A] by inverting their distribution functions at `uniform` [rows, n].

    First the block of actions is found, then the place in it: the cumulative sum of all actions takes ten times longer.
    """
    blocks = p.view(len(p), -1, min(BLOCK, p.shape[1]))
    mass = blocks.sum(-1, dtype=torch.float64)
    cumulative = mass.cumsum(-1)
    point = uniform * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, point, right=True).clamp(max=blocks.shape[1] - 1)
    rest = point - (cumulative - mass).gather(1, block)
    inside = blocks[torch.arange(len(p))[:, None], block].double().cumsum(-1)
    place = torch.searchsorted(inside, rest[..., None], right=True)[..., 0].clamp(max=blocks.shape[2] - 1)
    return block * blocks.shape[2] + place


def rewards(kind: Tensor) -> Tensor:
    """Of responses: kind [runs, horizon, n] is 2 for a right action, 1 for a decoy, 0 for a wrong one."""
    return torch.where((kind == 2).all(1), 1.0, torch.where((kind >= 1).all(1), 0.5, 0.0))


def value(p: Tensor, right: Tensor, decoys: Tensor, horizon: int) -> Tensor:
    """The exact expected reward [runs] of the policies p [runs * horizon, A]."""
    all_right = p.gather(1, right).sum(-1, dtype=torch.float64)
    worth_something = all_right + p.gather(1, decoys).sum(-1, dtype=torch.float64)
    return (all_right.view(-1, horizon).prod(1) + worth_something.view(-1, horizon).prod(1)) / 2


def measure(task: Task, way: Way, budget: Budget) -> dict[str, Any]:
    """Chooses the coefficient on the choosing seeds, and reports it on the others."""
    coefs = () if way == NONE else budget.coefs
    scan = {c: train(task, way, c, budget.steps, budget.choosing)["value"] for c in coefs}
    coef = max(scan, key=lambda c: sum(scan[c])) if scan else 0.0
    found = train(task, way, coef, budget.steps, budget.reporting)
    by_seed = {str(seed): own for seed, own in zip(budget.reporting, found["value"], strict=True)}
    curve = [round(own, 4) for own in found["curve"][:: max(1, budget.steps // 40)]]
    return {
        "coef": coef, "scan": {str(c): values for c, values in scan.items()}, "by_seed": by_seed,
        "entropy": sum(found["entropy"]) / len(found["entropy"]), "curve": curve,
    }  # fmt: skip


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
