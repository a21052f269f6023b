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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entcov.controls import AEnt, Control, EntropyBonus
from entcov.objective.advantages import DrGRPO
from entcov.objective.policy_loss import policy_loss
from entcov.objective.responses import Responses
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.stats.token_stats import token_stats

RESPONSES = 64  # of a step
DECOYS = 5
LAST = 10  # steps that the value is averaged over
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
