"""Collects the rollouts of one step: samples, scores and filters them. Packs rollouts for checkpoints and ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entcov.controls import Progress
from entcov.diagnostics import solved_shares
from entcov.rl.answers import Answers
from entcov.rl.config import RolloutConfig
from entcov.rl.data.prompt_policy import Outcome, PromptPolicy, perplexity
from entcov.rl.data.stream import PromptStream
from entcov.rl.interfaces import Sampler
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.types import RIGHT, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ARRAYS = ("tokens", "logprob")  # of packed rollouts: flat tensors
_KEPT = ("components", "baseline", "temperature")  # fields of a rollout that are packed as columns
_CHOICE = 2  # last of the path of a prompt policy's seeds; no other seed's path has four numbers
_MOST_CHOICES = 10_000  # rounds of choosing prompts; a policy that skips 99 of 100 needs some hundreds


def derived_seed(seed: int, *path: int) -> int:
    """A 63-bit seed that depends on every number of the path."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1)


def temperature_of_each(temperature: float | Sequence[float], count: int) -> list[float]:
    """The temperature of each of `count` prompts, from what `Sampler.generate` was given.

    Raises:
        ValueError: another number of temperatures, or differing ones with a greedy (0) or negative one among them.
    """
    if isinstance(temperature, Real):
        return [temperature] * count
    if len(temperature) != count:
        raise ValueError(f"temperature: there must be one for each of {count} prompts, got {len(temperature)}")
    if len(set(temperature)) > 1 and min(temperature) <= 0:
        raise ValueError(f"temperature: differing ones must be greater than 0, got {min(temperature)}")
    return list(temperature)


def as_rollout(
    prompt: Prompt, sample: int, tokens: Sequence[int], logprob: Sequence[float], version: int, tokenizer: Tokenizer
) -> Rollout:
    """A sampler's response as a rollout. It is finished if it ends in the end-of-sequence token."""
    tokens = np.asarray(tokens, dtype=np.int32)
    finished = bool(tokens[-1] == tokenizer.eos_token_id)
    text = tokenizer.decode((tokens[:-1] if finished else tokens).tolist())
    return Rollout(prompt, sample, tokens, logprob, finished, weight_version=version, text=text)


@dataclass
class Collected:
    """The rollouts that one step trains on, and their metrics."""

    rollouts: list[Rollout]  # whole groups, scored
    position: int  # prompts taken from the stream, these included
    metrics: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)  # of everything sampled, before the filter

    def state_dict(self) -> dict[str, Any]:
        outcomes = [(outcome.row, list(outcome.scores)) for outcome in self.outcomes]
        own = {"position": self.position, "metrics": dict(self.metrics), "outcomes": outcomes}
        return own | pack_rollouts(self.rollouts)

    @classmethod
    def from_state(cls, state: dict[str, Any], stream: PromptStream) -> Collected:
        prompts = {uid: stream.take(uid, 1)[0] for uid in {each[0] for each in state["each"]}}
        outcomes = [Outcome(row, tuple(scores)) for row, scores in state.get("outcomes", ())]
        return cls(unpack_rollouts(state, prompts), state["position"], state["metrics"], outcomes)


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The rollouts as plain values and flat tensors. A prompt is kept as its position in the stream."""
    return {
        "tokens": torch.from_numpy(np.concatenate([np.empty(0, np.int32), *(r.tokens for r in rollouts)])),
        "logprob": torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(r.logprob for r in rollouts)])),
        "each": [
            (r.prompt.uid, r.sample, len(r.tokens), r.finished, r.weight_version, r.text, r.reward, r.timed_out)
            for r in rollouts
        ],
        **{name: [getattr(r, name) for r in rollouts] for name in _KEPT},
    }


def unpack_rollouts(packed: dict[str, Any], prompts: Mapping[int, Prompt]) -> list[Rollout]:
    """The rollouts that `pack_rollouts` was given, as slices of its tensors; `prompts` by their position."""
    # Earlier versions kept wider numbers.
    tokens, logprob = packed["tokens"].to(torch.int32).numpy(), packed["logprob"].to(torch.float32).numpy()
    start = 0
    rollouts = []
    for uid, sample, length, *said in packed["each"]:
        at = slice(start, start + length)
        rollouts.append(Rollout(prompts[uid], sample, tokens[at], logprob[at], *said))
        start += length
    for name in _KEPT:  # checkpoints of earlier versions have none of them
        for rollout, value in zip(rollouts, packed.get(name, [None] * len(rollouts)), strict=True):
            setattr(rollout, name, value)
    return rollouts


@dataclass
class Collector:
    """Samples a step's rollouts. It changes no state but the sampler's, so it may run while the actor updates."""

    config: RolloutConfig
    seed: int  # the run's
    sampler: Sampler
    stream: PromptStream
    reward_fn: RewardFunction
    prompt_policy: PromptPolicy | None = None  # which prompts, and their temperatures; None: the stream's, the recipe's
    progress: Progress | None = None  # of the step, for the prompt policy
    greedy_baseline: bool = False  # sample one greedy response to each prompt too, for `Rollout.baseline`

    def collect(self, step: int, position: int, phase: Callable[[str], None] = lambda name: None) -> Collected:
        """The rollouts of `step`, from the prompts at `position` and after it.

        A prompt policy decides which prompts are sampled, and at which temperatures. With dynamic sampling
        (`filter_zero_variance`) groups whose rewards are all equal are dropped and more prompts are drawn, up to
        `max_draws` times. `on_shortfall: accept` goes on with fewer groups where that is not enough.

        Args:
            phase: called with the name of each phase.

        Raises:
            RuntimeError: dynamic sampling has left too few groups, or with `on_shortfall: accept` none; or the prompt
                policy chooses no prompts.
        """
        config = self.config
        seconds: dict[str, float] = defaultdict(float)
        kept: list[Rollout] = []
        drawn: list[Rollout] = []
        perplexities: list[float] = []  # of the prompts sampled, where the policy asks for log-probabilities
        began = position
        for draw in range(config.max_draws if config.filter_zero_variance else 1):
            with Scorer(self.reward_fn) as scorer:
                phase("rollout")
                options = {
                    "max_response_length": config.max_response_length,
                    "seed": derived_seed(self.seed, step, draw),
                    "on_done": scorer.take,
                }
                greedy: list[Rollout] = []
                with timed(seconds, "gen"):
                    prompts, position, found = self._prompts(step, draw, position)
                    perplexities += found
                    temperature = self._temperature(prompts)
                    fresh = self.sampler.generate(
                        prompts, group_size=config.group_size, temperature=temperature, **options
                    )
                    if self.greedy_baseline:
                        greedy = self.sampler.generate(prompts, group_size=1, temperature=0.0, **options)
                phase("reward")
                with timed(seconds, "reward"):  # the time that scoring takes after the last response is complete
                    scorer.finish([*fresh, *greedy])
            baselines = {rollout.prompt.uid: rollout.reward for rollout in greedy}
            own = {} if self.prompt_policy is None else dict(zip([p.uid for p in prompts], temperature, strict=True))
            for rollout in fresh:
                rollout.baseline = baselines.get(rollout.prompt.uid)
                rollout.temperature = own.get(rollout.prompt.uid)
            drawn += fresh
            groups = [fresh[i : i + config.group_size] for i in range(0, len(fresh), config.group_size)]
            if config.filter_zero_variance:
                groups = [g for g in groups if any(r.reward != g[0].reward for r in g)]
            kept += [r for g in groups for r in g]
            if len(kept) >= config.prompts_per_step * config.group_size:
                break
        groups_kept, accepts = len(kept) // config.group_size, config.on_shortfall == "accept"
        if groups_kept < (1 if accepts else config.prompts_per_step):
            raise RuntimeError(
                f"step {step}: rollout.filter_zero_variance kept {groups_kept} groups of "
                f"{len(drawn) // config.group_size} in {draw + 1} draws, and a step needs {config.prompts_per_step}: "
                f"in the others all rewards are equal (mean {mean(r.reward for r in drawn):.3f}). The task is too hard "
                "or too easy for this policy; raise rollout.max_draws or group_size, "
                + ("" if accepts else "train on fewer groups with rollout.on_shortfall=accept, ")
                + "or switch the filter off"
            )
        metrics = _described(drawn, config.group_size) | {"training/generation_batches": draw + 1}
        metrics |= {f"timing_s/{name}": value for name, value in seconds.items()}
        if self.prompt_policy is not None:
            metrics |= {"prompts/candidates": float(position - began)}
            metrics |= spread("prompts/temperature", [r.temperature for r in drawn])
            metrics |= spread("prompts/perplexity", perplexities) if perplexities else {}
        return Collected(kept[: config.prompts_per_step * config.group_size], position, metrics, _outcomes(drawn))

    def _prompts(self, step: int, draw: int, position: int) -> tuple[list[Prompt], int, list[float]]:
        """The prompts to sample, the position after all candidates, and the prompts' perplexities where they are known.

        Raises:
            RuntimeError: the policy leaves out nearly everything, or chooses what it must not.
        """
        wanted, policy = self.config.prompts_per_step, self.prompt_policy
        if policy is None:
            return self.stream.take(position, wanted), position + wanted, []
        prompts: list[Prompt] = []
        perplexities: list[float] = []
        for again in range(_MOST_CHOICES):
            missing = wanted - len(prompts)
            candidates = self.stream.take(position, missing * policy.oversample)
            position += len(candidates)
            logprob = self.sampler.prompt_logprobs(candidates) if policy.needs_logprob else None
            seed = derived_seed(self.seed, step, draw, again, _CHOICE)
            chosen = policy.choose(candidates, logprob, missing, self.progress, seed=seed)
            known = set(chosen) & set(range(len(candidates)))
            if len(known) < len(chosen) or len(chosen) > missing:
                raise RuntimeError(
                    f"prompt policy {policy.name}: choose must return at most {missing} different indices below "
                    f"{len(candidates)}, got {chosen}"
                )
            prompts += [candidates[i] for i in chosen]
            perplexities += [perplexity(logprob[i]) for i in chosen] if logprob is not None else []
            if len(prompts) == wanted:
                return prompts, position, perplexities
        raise RuntimeError(
            f"step {step}: prompt policy {policy.name} chose {len(prompts)} prompts of {wanted} in {_MOST_CHOICES} "
            "rounds"
        )

    def _temperature(self, prompts: Sequence[Prompt]) -> float | list[float]:
        """As `Sampler.generate` takes it."""
        base = self.config.temperature
        if self.prompt_policy is None:
            return base
        return [self.prompt_policy.temperature(prompt, base, self.progress) for prompt in prompts]


@contextmanager
def timed(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _outcomes(drawn: Sequence[Rollout]) -> list[Outcome]:
    groups: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in drawn:
        groups[rollout.prompt.uid].append(rollout)
    return [Outcome(group[0].prompt.row, tuple(float(r.reward) for r in group)) for group in groups.values()]


def _described(drawn: list[Rollout], group_size: int) -> dict[str, float]:
    """Metrics of all sampled rollouts before the filter: rewards, lengths, time-outs of the reward, answers."""
    groups = [drawn[i : i + group_size] for i in range(0, len(drawn), group_size)]
    right, group = torch.tensor([r.reward >= RIGHT for r in drawn]), torch.tensor([r.prompt.uid for r in drawn])
    answers = Answers.of(drawn)
    sure = answers.calibration
    return {
        **spread("critic/score", [r.reward for r in drawn]),
        **_component_means(drawn),
        "reward/timeouts": float(sum(r.timed_out for r in drawn)),
        **spread("response_length", [len(r.tokens) for r in drawn]),
        "response_length/clip_ratio": mean(not r.finished for r in drawn),
        "prompt_length/mean": mean(len(r.prompt.tokens) for r in drawn),
        "training/zero_variance_groups": mean(all(r.reward == g[0].reward for r in g) for g in groups),
        **{f"training/groups_{name}_right": share for name, share in solved_shares(right, group).items()},
        "training/distinct_answers": answers.distinct,
        **({} if sure is None else {f"calibration/{n}": getattr(sure, n) for n in ("ece", "confidence", "accuracy")}),
    }


def _component_means(drawn: list[Rollout]) -> dict[str, float]:
    names = drawn[0].components or ()
    return {f"critic/score/{name}": mean((r.components or {}).get(name, 0.0) for r in drawn) for name in names}


def mean(values) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def spread(prefix: str, values: list[float]) -> dict[str, float]:
    return {f"{prefix}/mean": mean(values), f"{prefix}/max": float(max(values)), f"{prefix}/min": float(min(values))}


def tensor_spread(prefix: str, values: torch.Tensor) -> dict[str, float]:
    """`spread` of a tensor."""
    least, most = values.aminmax()
    return {
        f"{prefix}/mean": float(values.double().mean()),
        f"{prefix}/max": float(most),
        f"{prefix}/min": float(least),
    }
