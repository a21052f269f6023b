"""Prompt policies: which prompts of the stream a step trains on, and the temperature that each is sampled at.

A policy is asked before a step's rollouts are sampled, and told of their scores afterwards. It is asked through a copy
that is made when the sampling of a step begins, since with `rollout.max_staleness: 1` that goes on beside the updates:
`choose` and `temperature` may therefore keep nothing, and all state changes in `observe`. Every rank makes the same
calls with the same arguments and must decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from entcov import arguments as check
from entcov.controls import Progress
from entcov.registry import Registry
from entcov.rl.types import RIGHT, Prompt


@dataclass(frozen=True)
class Outcome:
    """The scores of all responses to one prompt in one step, before any filter and without reward shaping."""

    row: int | None  # of the prompt
    scores: tuple[float, ...]

    @property
    def all_right(self) -> bool:
        return min(self.scores) >= RIGHT

    @property
    def equal(self) -> bool:
        """Whether the group has zero variance, so that it has no advantage."""
        return min(self.scores) == max(self.scores)


class PromptPolicy:
    """Base of all prompt policies. A concrete one is a dataclass; its fields are its knobs, checked when it is made."""

    name: ClassVar[str]  # key in PROMPT_POLICIES
    needs_logprob: ClassVar[bool] = False  # `choose` reads the prompts' log-probabilities
    needs_rows: ClassVar[bool] = False  # it remembers prompts by `Prompt.row`, so a generated task will not do
    oversample: int = 1  # candidates drawn from the stream for each prompt that is wanted

    def choose(
        self,
        candidates: Sequence[Prompt],
        prompt_logprob: Sequence[Sequence[float]] | None,
        count: int,
        progress: Progress,
        *,
        seed: int,
    ) -> list[int]:
        """Which candidates to sample: at most `count` different indices. The others are not seen again in this epoch.

        Where it returns fewer, it is called again with `oversample` candidates for each that is still missing.

        Args:
            prompt_logprob: with `needs_logprob`: of each candidate's tokens but the first, nats, under the policy that
                will sample, at temperature 1. Else None.
            progress: of the step that the prompts are for.
            seed: another number at every call, the same when a run is resumed.
        """
        return list(range(count))

    def temperature(self, prompt: Prompt, base: float, progress: Progress) -> float:
        """The temperature to sample this prompt at; `base` is the recipe's."""
        return base

    def observe(self, outcomes: Sequence[Outcome], progress: Progress) -> dict[str, float]:
        """Learn how a step's prompts went, all that were sampled. Called before the next `choose`. Returns metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What `observe` has changed, fit for JSON; the knobs are not in it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def perplexity(logprob: Sequence[float]) -> float:
    """exp(-mean of the log-probabilities); 1 where there is none (a prompt of one token)."""
    return math.exp(-math.fsum(logprob) / len(logprob)) if len(logprob) else 1.0


@dataclass
class PREPO(PromptPolicy):
    """Prompts of low perplexity first, of high perplexity last. Sun et al., "Efficient RL for LLMs with Intrinsic
    Exploration" (PREPO), arXiv 2511.00794; no code is published.

    The candidates B are sorted by perplexity exp(-(1/T) sum_t log pi(x_t | x_<t)) of the current policy, and the K
    prompts from place floor(rho (|B| - K)) on are taken; rho goes from 0 to 1 over the training. K is about 0.2 |B| in
    the paper, so `oversample` is 5.

    Our reading: rho = (step - 1) / (steps - 1); a prompt's first token has no log-probability and does not count; equal
    perplexities keep the stream's order. The other half of PREPO, weights by the responses' relative entropy, belongs
    to the loss and is not part of this policy.
    """

    name = "prepo"
    needs_logprob = True
    oversample: int = 5

    def __post_init__(self):
        check.integer("oversample", self.oversample, 1)

    def choose(self, candidates, prompt_logprob, count, progress, *, seed):
        order = np.argsort([perplexity(logprob) for logprob in prompt_logprob], kind="stable")
        done = (progress.step - 1) / max(1, progress.steps - 1)
        first = math.floor(min(done, 1.0) * (len(candidates) - count))
        return order[first : first + count].tolist()


@dataclass
class _ByRow(PromptPolicy):
    """A policy that remembers one integer of each row; 0 for a row that it has not seen."""

    needs_rows = True
    _memory: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def state_dict(self):
        return {"memory": [list(item) for item in sorted(self._memory.items())]}

    def load_state_dict(self, state):
        self._memory = {row: value for row, value in state["memory"]}


@dataclass
class ERPO(_ByRow):
    """Prompts that were all right before are sampled hotter. Liu et al., "Explore Data Left Behind in RL for Reasoning
    Language Models" (ERPO), arXiv 2511.04800.

    T(prompt) = min(max_temperature, base + increment * n), n the number of steps in which all of the prompt's responses
    were right. The policy that learns from a response is tempered as the one that sampled it.

    The method is the paper's; both constants, the linear rule and that n is never reset are ours: we could read neither
    the paper's constants nor its code. Its other half, a signal for groups that are all right all the same, is the
    reward shaping `reactivate`.
    """

    name = "erpo"
    increment: float = 0.05
    max_temperature: float = 1.2

    def __post_init__(self):
        check.positive("increment", self.increment)
        check.positive("max_temperature", self.max_temperature, 2.0, "vLLM samples at no higher one")

    def temperature(self, prompt, base, progress):
        return max(base, min(self.max_temperature, base + self.increment * self._memory.get(prompt.row, 0)))

    def observe(self, outcomes, progress):
        for outcome in outcomes:
            if outcome.all_right:
                self._memory[outcome.row] = self._memory.get(outcome.row, 0) + 1
        return {}


@dataclass
class GRESO(_ByRow):
    """Skips prompts whose last groups had zero variance. Zheng et al., "Act Only When It Pays", arXiv 2506.02177.

    A prompt whose last z groups were all right is left out with probability 1 - max(p_easy^z, p_floor); one whose last
    z groups were all equal and not all right likewise with p_hard. From the second epoch on, after each step, p_easy
    becomes `change` smaller where at least target / 3 of the step's groups were all right, else `change` larger, and
    p_hard the same with 2 target / 3; both stay in [p_least, p_most].

    Rules and constants: code, Infini-AI-Lab/GRESO @ b277843, verl/trainer/ppo/ray_trainer.py and
    verl/trainer/ttis/presampling_selector.py. That code calls a group easy from a mean reward of 0.98 on and hard up to
    0.11; here a hard group has no variance: of up to 9 responses with rewards 0 and 1 it is the same. It fills a batch
    with 32 prompts at a time and may discard some; here just as many are drawn as are missing.
    """

    name = "greso"
    p_easy: float = 0.5
    p_hard: float = 0.5
    target: float = 0.25
    change: float = 0.01
    p_floor: float = 0.01
    p_least: float = 0.05
    p_most: float = 0.95

    def __post_init__(self):
        for knob in ("p_easy", "p_hard", "target", "change", "p_least", "p_most"):
            check.fraction(knob, getattr(self, knob))
        check.positive("p_floor", self.p_floor, 1.0, "without it a prompt may never be tried again")
        if self.p_least > self.p_most:
            raise ValueError(f"p_least: must be at most p_most, got {self.p_least} > {self.p_most}")
        self._now = {"p_easy": self.p_easy, "p_hard": self.p_hard}

    def choose(self, candidates, prompt_logprob, count, progress, *, seed):
        drawn = np.random.default_rng(seed).random(len(candidates))
        return [i for i, prompt in enumerate(candidates) if drawn[i] >= self._skipped(prompt.row)][:count]

    def _skipped(self, row: int) -> float:
        streak = self._memory.get(row, 0)  # of groups all right, or minus that of the others without variance
        p = self._now["p_easy" if streak > 0 else "p_hard"]
        return 1.0 - max(p ** abs(streak), self.p_floor)

    def observe(self, outcomes, progress):
        easy = sum(outcome.all_right for outcome in outcomes) / len(outcomes)
        hard = sum(outcome.equal and not outcome.all_right for outcome in outcomes) / len(outcomes)
        for outcome in outcomes:
            streak = self._memory.get(outcome.row, 0)
            if outcome.all_right:
                self._memory[outcome.row] = max(streak, 0) + 1
            elif outcome.equal:
                self._memory[outcome.row] = min(streak, 0) - 1
            else:
                self._memory[outcome.row] = 0
        if progress.epoch is not None and progress.epoch > 1:
            for knob, share, most in (("p_easy", easy, self.target / 3), ("p_hard", hard, self.target * 2 / 3)):
                moved = self._now[knob] + (-self.change if share >= most else self.change)
                self._now[knob] = min(max(moved, self.p_least), self.p_most)
        return {f"prompts/{knob}": value for knob, value in self._now.items()} | {
            "prompts/all_right": easy,
            "prompts/zero_variance_not_right": hard,
        }

    def state_dict(self):
        return super().state_dict() | {"now": dict(self._now)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._now = dict(state["now"])


PROMPT_POLICIES = Registry("prompt policy", PromptPolicy, (PREPO, ERPO, GRESO), "entcov.prompt_policies")
