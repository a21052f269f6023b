"""The loop: prompts -> rollouts -> rewards -> advantages -> updates -> weight sync, and what is recorded of it.

It talks to the actor and the sampler through a handful of methods and does not know which engine is behind them:
    actor:   score(batch), update(batch, step=), named_weights(), weight_version, device, state_dict, load_state_dict
    sampler: generate(prompts, ..., on_done=), sync(weight_version, named_weights)
Every random choice comes from (seed, step), every prompt from its position in the stream, so the whole state of a run
is the weights, the optimizer, the controls, the step and one position: a resumed run continues bit for bit.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from entcov.advantages import ADVANTAGES
from entcov.controls import Control
from entcov.covariance import covariance_summary, token_covariance
from entcov.rl.batch import Batch, mini_batches, pack
from entcov.rl.config import Config
from entcov.rl.data import PromptStream
from entcov.rl.rewards import RewardFunction
from entcov.rl.scoring import Scorer
from entcov.rl.types import Rollout


def derived_seed(seed: int, *path: int) -> int:
    """A 63-bit seed that depends on every number of the path."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class Loop:
    """One run's moving parts and its position. `step()` is one round; everything else serves it."""

    config: Config
    actor: Any
    sampler: Any
    stream: PromptStream
    controls: Sequence[Control]
    score: RewardFunction
    phase: Callable[[str], None] = lambda name: None  # told what is going on, for the display
    steps_done: int = 0
    position: int = 0  # prompts taken from the stream so far
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self):
        self.sync_weights()  # a sampler that keeps a copy has none yet

    def step(self) -> dict[str, float]:
        """One round. Returns the step's metrics under verl's names."""
        self._seconds.clear()
        started, step = time.perf_counter(), self.steps_done + 1
        metrics: dict[str, float] = {"training/global_step": step}

        rollouts = self.rollouts(step, metrics)
        self.assign_advantages(rollouts)
        batch = pack(rollouts).to(self.actor.device)
        with self.timed("old_log_prob"):
            step_means = self.score_policy(batch, metrics)
        with self.timed("update_actor"):
            self.update(batch, rollouts, step, metrics)
        for control in self.controls:
            metrics |= control.after_step(step_means)
        with self.timed("weight_sync"):
            self.sync_weights()
        self.steps_done = step

        seconds = time.perf_counter() - started
        tokens = len(batch.tokens)
        metrics |= {f"timing_s/{name}": value for name, value in self._seconds.items()}
        metrics |= {"timing_s/step": seconds, "perf/total_num_tokens": tokens, "perf/throughput": tokens / seconds}
        return metrics

    def rollouts(self, step: int, metrics: dict[str, float]) -> list[Rollout]:
        """The step's scored rollouts, whole groups; with dynamic sampling only groups that can teach something."""
        config = self.config.rollout
        kept: list[Rollout] = []
        drawn: list[Rollout] = []
        for draw in range(config.max_draws if config.filter_zero_variance else 1):
            with Scorer(self.score) as scorer:
                with self.timed("gen"):
                    fresh = self.sampler.generate(
                        self.stream.take(self.position, config.prompts_per_step),
                        group_size=config.group_size,
                        temperature=config.temperature,
                        max_response_length=config.max_response_length,
                        seed=derived_seed(self.config.seed, step, draw),
                        on_done=scorer.take,
                    )
                with self.timed("reward"):  # what is left of it when the last response is complete
                    scorer.finish(fresh)
            self.position += config.prompts_per_step
            drawn += fresh
            groups = [fresh[i : i + config.group_size] for i in range(0, len(fresh), config.group_size)]
            if config.filter_zero_variance:
                groups = [g for g in groups if any(r.reward != g[0].reward for r in g)]
            kept += [r for g in groups for r in g]
            if len(kept) >= config.prompts_per_step * config.group_size:
                break
        if not kept:
            raise RuntimeError(
                f"step {step}: rollout.filter_zero_variance left nothing of {len(drawn)} rollouts: in every group all "
                f"rewards are equal (mean {_mean(r.reward for r in drawn):.3f}). The task is too hard or too easy for "
                "this policy; raise rollout.max_draws or group_size, or switch the filter off"
            )
        _describe_rollouts(drawn, config.group_size, metrics)
        metrics["training/generation_batches"] = draw + 1
        return kept[: config.prompts_per_step * config.group_size]

    def assign_advantages(self, rollouts: list[Rollout]) -> None:
        advantage = ADVANTAGES[self.config.advantage](
            torch.tensor([r.reward for r in rollouts]),
            torch.tensor([r.prompt.uid for r in rollouts]),
            torch.tensor([len(r.tokens) for r in rollouts]),
        )
        for rollout, value in zip(rollouts, advantage.tolist(), strict=True):
            rollout.advantage = value

    def score_policy(self, batch: Batch, metrics: dict[str, float]) -> dict[str, float]:
        """Fills `batch.old_logprob` with the trainer's own values; returns the step's means for the controls."""
        self.phase("old log-probs")
        scored = self.actor.score(batch)
        batch.old_logprob, batch.ref_logprob = scored["logprob"], scored.get("ref_logprob")
        batch.scored_version = self.actor.weight_version
        at = batch.loss_mask
        bad = int((~scored["logprob"].isfinite() & at).sum())
        if bad:
            raise RuntimeError(
                f"step {self.steps_done + 1}: the policy's log-probabilities must be finite, {bad} of {int(at.sum())} "
                "are not: its weights or logits hold NaN or infinities. Nothing was updated; go back to a checkpoint"
            )
        means = {name: float(scored[name][at].mean()) for name in scored if name.endswith("entropy")}
        means["sampled_entropy"] = -float(scored["logprob"][at].mean())
        covariance = token_covariance(scored["logprob"], batch.advantage, at)
        metrics |= {name: float(value) for name, value in covariance_summary(covariance).items()}
        gap = (scored["logprob"] - batch.rollout_logprob)[at].abs()
        metrics["actor/entropy"] = means["entropy"]
        metrics["actor/entropy_drift"] = float((scored["entropy_drift"] * batch.advantage)[at].mean())
        metrics["training/mismatch"], metrics["training/mismatch_max"] = float(gap.mean()), float(gap.max())
        advantage = batch.advantage[at]
        metrics |= _spread("critic/advantages", advantage.tolist())
        return means

    def update(self, batch: Batch, rollouts: list[Rollout], step: int, metrics: dict[str, float]) -> None:
        """Every mini-batch once per epoch; the metrics are means over the optimizer steps."""
        groups = mini_batches([r.prompt.uid for r in rollouts], self.config.actor.updates_per_rollout)
        gathered: dict[str, list[float]] = defaultdict(list)
        for epoch in range(self.config.actor.epochs):
            order = np.random.default_rng(derived_seed(self.config.seed, step, epoch, 1)).permutation(len(groups))
            for number, g in enumerate(order):
                self.phase(f"update {epoch * len(groups) + number + 1}/{self.config.actor.epochs * len(groups)}")
                for name, value in self.actor.update(batch.subset(groups[g]), step=step).items():
                    gathered[name].append(value)
        metrics |= {name: _mean(values) for name, values in gathered.items() if name not in metrics}

    def sync_weights(self) -> None:
        self.sampler.sync(self.actor.weight_version, self.actor.named_weights)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "position": self.position,
            "actor": self.actor.state_dict(),
            "controls": [control.state_dict() for control in self.controls],
            "torch_rng": torch.get_rng_state(),  # for models and rewards that draw from the global generator
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["controls"]) != len(self.controls):
            raise RuntimeError(
                f"checkpoint: holds the state of {len(state['controls'])} controls, the recipe has {len(self.controls)}"
            )
        self.steps_done, self.position = state["steps_done"], state["position"]
        self.actor.load_state_dict(state["actor"])
        for control, saved in zip(self.controls, state["controls"], strict=True):
            control.load_state_dict(saved)
        torch.set_rng_state(state["torch_rng"])
        self.sync_weights()

    @contextmanager
    def timed(self, name: str):
        self.phase({"gen": "rollout", "update_actor": "update", "weight_sync": "weight sync"}.get(name, name))
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start


def _describe_rollouts(drawn: list[Rollout], group_size: int, metrics: dict[str, float]) -> None:
    """Rewards and lengths of everything that was drawn, before any filter."""
    groups = [drawn[i : i + group_size] for i in range(0, len(drawn), group_size)]
    metrics |= _spread("critic/score", [r.reward for r in drawn])
    metrics |= _spread("response_length", [len(r.tokens) for r in drawn])
    metrics["response_length/clip_ratio"] = _mean(not r.finished for r in drawn)
    metrics["prompt_length/mean"] = _mean(len(r.prompt.tokens) for r in drawn)
    metrics["training/zero_variance_groups"] = _mean(all(r.reward == g[0].reward for r in g) for g in groups)


def _mean(values) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def _spread(prefix: str, values: list[float]) -> dict[str, float]:
    return {f"{prefix}/mean": _mean(values), f"{prefix}/max": float(max(values)), f"{prefix}/min": float(min(values))}
