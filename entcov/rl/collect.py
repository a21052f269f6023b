"""Collects the rollouts of one step: samples, scores and filters them. Packs rollouts for checkpoints and ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entcov.rl.config import RolloutConfig
from entcov.rl.data.stream import PromptStream
from entcov.rl.interfaces import Sampler
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_SCORES = ("components", "baseline")  # fields of a rollout that are packed as columns


def derived_seed(seed: int, *path: int) -> int:
    """A 63-bit seed that depends on every number of the path."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1)


def as_rollout(
    prompt: Prompt, sample: int, tokens: list[int], logprob: list[float], version: int, tokenizer: Tokenizer
) -> Rollout:
    """A sampler's response as a rollout. It is finished if it ends in the end-of-sequence token."""
    finished = tokens[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(tokens[:-1] if finished else tokens)
    return Rollout(prompt, sample, tokens, logprob, finished, weight_version=version, text=text)


@dataclass
class Collected:
    """The rollouts that one step trains on, and their metrics."""

    rollouts: list[Rollout]  # whole groups, scored
    position: int  # prompts taken from the stream, these included
    metrics: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "metrics": dict(self.metrics), **pack_rollouts(self.rollouts)}

    @classmethod
    def from_state(cls, state: dict[str, Any], stream: PromptStream) -> Collected:
        prompts = {uid: stream.take(uid, 1)[0] for uid in {each[0] for each in state["each"]}}
        return cls(unpack_rollouts(state, prompts), state["position"], state["metrics"])


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The rollouts as plain values and tensors. A prompt is kept as its position in the stream."""
    return {
        "tokens": torch.tensor([t for r in rollouts for t in r.tokens], dtype=torch.int64),
        "logprob": torch.tensor([p for r in rollouts for p in r.logprob], dtype=torch.float64),
        "each": [
            (r.prompt.uid, r.sample, len(r.tokens), r.finished, r.weight_version, r.text, r.reward, r.timed_out)
            for r in rollouts
        ],
        **{name: [getattr(r, name) for r in rollouts] for name in _SCORES},
    }


def unpack_rollouts(packed: dict[str, Any], prompts: Mapping[int, Prompt]) -> list[Rollout]:
    """The rollouts that `pack_rollouts` was given; `prompts` by their position."""
    tokens, logprob, start = packed["tokens"].tolist(), packed["logprob"].tolist(), 0
    rollouts = []
    for uid, sample, length, finished, version, text, *scored in packed["each"]:
        at = slice(start, start + length)
        # Checkpoints of earlier versions do not say whether the time for a reward ran out.
        rollouts.append(Rollout(prompts[uid], sample, tokens[at], logprob[at], finished, version, text, *scored))
        start += length
    for name in _SCORES:  # checkpoints of earlier versions have none of them
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
    greedy_baseline: bool = False  # sample one greedy response to each prompt too, for `Rollout.baseline`

    def collect(self, step: int, position: int, phase: Callable[[str], None] = lambda name: None) -> Collected:
        """The rollouts of `step`, from the prompts at `position` and after it.

        With dynamic sampling (`filter_zero_variance`) groups whose rewards are all equal are dropped and more prompts
        are drawn, up to `max_draws` times. `on_shortfall: accept` goes on with fewer groups where that is not enough.

        Args:
            phase: called with the name of each phase.

        Raises:
            RuntimeError: dynamic sampling has left too few groups, or with `on_shortfall: accept` none.
        """
        config = self.config
        seconds: dict[str, float] = defaultdict(float)
        kept: list[Rollout] = []
        drawn: list[Rollout] = []
        for draw in range(config.max_draws if config.filter_zero_variance else 1):
            with Scorer(self.reward_fn) as scorer:
                phase("rollout")
                prompts = self.stream.take(position, config.prompts_per_step)
                options = {
                    "max_response_length": config.max_response_length,
                    "seed": derived_seed(self.seed, step, draw),
                    "on_done": scorer.take,
                }
                greedy: list[Rollout] = []
                with timed(seconds, "gen"):
                    fresh = self.sampler.generate(
                        prompts, group_size=config.group_size, temperature=config.temperature, **options
                    )
                    if self.greedy_baseline:
                        greedy = self.sampler.generate(prompts, group_size=1, temperature=0.0, **options)
                phase("reward")
                with timed(seconds, "reward"):  # the time that scoring takes after the last response is complete
                    scorer.finish([*fresh, *greedy])
            baselines = {rollout.prompt.uid: rollout.reward for rollout in greedy}
            for rollout in fresh:
                rollout.baseline = baselines.get(rollout.prompt.uid)
            position += config.prompts_per_step
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
        return Collected(kept[: config.prompts_per_step * config.group_size], position, metrics)


@contextmanager
def timed(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _described(drawn: list[Rollout], group_size: int) -> dict[str, float]:
    """Metrics of all sampled rollouts before the filter: rewards, lengths, time-outs of the reward."""
    groups = [drawn[i : i + group_size] for i in range(0, len(drawn), group_size)]
    return {
        **spread("critic/score", [r.reward for r in drawn]),
        **_component_means(drawn),
        "reward/timeouts": float(sum(r.timed_out for r in drawn)),
        **spread("response_length", [len(r.tokens) for r in drawn]),
        "response_length/clip_ratio": mean(not r.finished for r in drawn),
        "prompt_length/mean": mean(len(r.prompt.tokens) for r in drawn),
        "training/zero_variance_groups": mean(all(r.reward == g[0].reward for r in g) for g in groups),
    }


def _component_means(drawn: list[Rollout]) -> dict[str, float]:
    names = drawn[0].components or ()
    return {f"critic/score/{name}": mean((r.components or {}).get(name, 0.0) for r in drawn) for name in names}


def mean(values) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def spread(prefix: str, values: list[float]) -> dict[str, float]:
    return {f"{prefix}/mean": mean(values), f"{prefix}/max": float(max(values)), f"{prefix}/min": float(min(values))}
