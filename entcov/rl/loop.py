"""The loop: prompts -> rollouts -> rewards -> advantages -> updates -> weight sync, and the metrics of each step.

It knows the actor and the sampler by their interfaces alone (entcov/rl/interfaces.py). Every random choice comes from
(seed, step), every prompt from its position in the stream, so the whole state of a run is the weights, the optimizer,
the controls, the prompt policy, the step and one position: a resumed run continues bit for bit.

With `rollout.max_staleness: 1` the rollouts of step k + 1 are sampled while step k updates the policy, so by the
weights that step k began with; at the end of step k they are complete, and only then does the sampler get the new
weights. They are part of the checkpoint, since the weights that sampled them are gone.
"""

import copy
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from entcov.controls import Control, Progress, begin
from entcov.diagnostics import ENTROPY_CHANGE, token_metrics
from entcov.objective.advantages import Advantages, Estimator
from entcov.objective.responses import Responses
from entcov.objective.token_covariance import covariance_summary, token_covariance
from entcov.objective.tokens import Tokens
from entcov.rl.batch import Batch, mini_batches, pack
from entcov.rl.collect import Collected, Collector, derived_seed, mean, spread, tensor_spread, timed
from entcov.rl.config import Config
from entcov.rl.data.prompt_policy import PromptPolicy
from entcov.rl.data.stream import PromptStream
from entcov.rl.interfaces import Actor, PolicyStats, RewardModel, Sampler
from entcov.rl.record.token_record import TokenRecord, Watched
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.rewards.shaping import RewardShaping, shape_rewards, with_pseudo
from entcov.rl.threads import in_background
from entcov.rl.types import Rollout

_ENTROPIES = ("actor/entropy", "actor/sampled_entropy", "actor/clamped_entropy")  # of the updates' metrics


@dataclass
class Loop:
    """The state of a run: the policy, the controls, the position in the data. `step()` is one step.

    unstorable: why the state cannot be stored, "" where it can. A step that fails before its first update has changed
        nothing but the position, which is remembered; one that fails later leaves the weights between two steps.
    """

    config: Config
    actor: Actor
    sampler: Sampler
    stream: PromptStream
    controls: Sequence[Control]
    reward_fn: RewardFunction
    reward_model: RewardModel | None = None
    phase: Callable[[str], None] = lambda name: None  # called with the name of each phase, for the display
    shapings: Sequence[RewardShaping] = ()  # what is added to the scores
    prompt_policy: PromptPolicy | None = None  # which prompts are sampled, and how hot; None: as the stream gives them
    token_record: TokenRecord | None = None  # of some responses, token by token
    watched: Watched | None = field(init=False, default=None)  # what the last step adds to it; None: nothing
    steps_done: int = 0
    position: int = 0  # prompts taken from the stream so far
    _first: int = 0  # the position before the current step's prompts
    unstorable: str = ""
    kl_reward_coef: float = field(init=False)  # the weight of `kl_in_reward`, which may adapt
    _estimator: Estimator = field(init=False)
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _next: Future[Collected] | None = None  # rollouts of the next step, where they are sampled ahead
    _before: dict[str, Any] | None = None  # the state at the beginning of the current step; None between steps
    _versions: deque[int] = field(init=False)  # weight versions that rollouts may come from, the current one last

    def __post_init__(self):
        self.kl_reward_coef = self.config.kl_in_reward.coef
        self._estimator = self.config.build_estimator()
        self._versions = deque([self.actor.weight_version], maxlen=1 + self.config.rollout.max_staleness)
        self.sync_weights()  # a sampler that keeps a copy of the weights has none yet

    def step(self) -> dict[str, float]:
        """One step of the algorithm. Returns its metrics under verl's names."""
        self._seconds.clear()
        self._before = self._here()
        started, step = time.perf_counter(), self.steps_done + 1
        metrics: dict[str, float] = {"training/global_step": step}

        rollouts = self.rollouts(step, metrics)
        if self.config.rollout.max_staleness:
            collector, ahead = self._collector(step + 1), self.position
            self._next = in_background(lambda: collector.collect(step + 1, ahead), "entcov-rollouts")
        batch = self.actor.once_a_node(partial(pack, rollouts))
        tokens = len(batch.tokens)
        with timed(self._seconds, "old_log_prob"):
            scored = self.compute_old_logprobs(batch, metrics)
        self.watched = self.token_record and self.token_record.watch(step, rollouts, batch)
        if self.reward_model is not None:
            self.phase("reward model")
            self.unstorable = f"step {step} has begun to change the reward model"
            with timed(self._seconds, "reward_model"):
                batch.token_reward, found = self.reward_model.token_rewards(batch, step=step)
            metrics |= found
        with timed(self._seconds, "adv"):
            batch = self._advantages_once_a_node(batch, metrics)
        self.unstorable = f"step {step} has begun to change the weights"
        if "actor/reward_kl_penalty" in metrics:
            kl = metrics["actor/reward_kl_penalty"]
            self.kl_reward_coef = self.config.kl_in_reward.adapted(self.kl_reward_coef, kl, len(rollouts))
        with timed(self._seconds, "update_actor"):
            self.actor.on_selection = self.watched and self.watched.selected
            updated = self.update(batch, step, metrics)
        if self.watched is not None:
            with timed(self._seconds, "token_record"):
                self.watched.updated(self.actor.compute_logprobs(self.watched.batch)["logprob"], self.actor.anywhere)
        if metrics["training/updates"]:
            for control in self.controls:
                metrics |= control.after_step(scored | updated, self._progress())
        if self._next is not None:
            self.phase("rollout")
            with timed(self._seconds, "gen_wait"):  # by how much sampling took longer than the update
                self._next.result()
        self.phase("weight sync")
        with timed(self._seconds, "weight_sync"):
            self.sync_weights()
        self._versions.append(self.actor.weight_version)
        self.steps_done, self._before, self.unstorable = step, None, ""

        seconds = time.perf_counter() - started
        metrics |= {f"timing_s/{name}": value for name, value in self._seconds.items()}
        metrics |= {"timing_s/step": seconds, "perf/total_num_tokens": tokens, "perf/throughput": tokens / seconds}
        return metrics

    def rollouts(self, step: int, metrics: dict[str, float]) -> list[Rollout]:
        """The step's scored rollouts: those that were sampled ahead, or fresh ones.

        Raises:
            RuntimeError: one comes from weights that lag further behind than `rollout.max_staleness` steps.
        """
        if self._next is not None:
            collected, self._next = self._next.result(), None
        else:
            collected = self._collector(step).collect(step, self.position, self.phase)
        # The weight sync comes before any other response, unless the next step's are sampled ahead.
        self.sampler.sleep(sync_follows=not self.config.rollout.max_staleness)
        self._first, self.position = self.position, collected.position
        metrics |= collected.metrics
        if self.prompt_policy is not None:
            metrics |= self.prompt_policy.observe(collected.outcomes, self._progress())
        length = self.config.rollout.max_response_length
        metrics |= shape_rewards(self.shapings, collected.rollouts, max_response_length=length)
        metrics |= spread("critic/rewards", [rollout.shaped_reward for rollout in collected.rollouts])
        lags = {version: lag for lag, version in enumerate(reversed(self._versions))}
        for rollout in collected.rollouts:
            if rollout.weight_version not in lags:
                raise RuntimeError(
                    f"step {step}: a rollout was sampled by weights of version {rollout.weight_version}; with "
                    f"rollout.max_staleness={self.config.rollout.max_staleness} it must be one of {sorted(lags)}"
                )
            rollout.lag = lags[rollout.weight_version]
        metrics["training/staleness"] = mean(rollout.lag for rollout in collected.rollouts)
        return collected.rollouts

    def _collector(self, step: int) -> Collector:
        """It has a copy of the prompt policy, which nothing changes while it collects."""
        return Collector(
            self.config.rollout, self.config.seed, self.sampler, self.stream, self.reward_fn,
            copy.deepcopy(self.prompt_policy), self._progress(step, self.position),
            greedy_baseline="baseline" in self._estimator.needs,
        )  # fmt: skip

    def compute_old_logprobs(self, batch: Batch, metrics: dict[str, float]) -> dict[str, float]:
        """Fills in what the current policy says of the batch; returns the rollout's means for the controls."""
        self.phase("old log-probs")
        policy = self.actor.compute_logprobs(batch)
        batch.assign_scores(policy, self.actor.weight_version)
        bad, means, found = self.actor.once_a_node(partial(_described, policy, batch))
        if bad:
            self.unstorable = "the weights or logits hold NaN or infinities"
            raise RuntimeError(
                f"step {self.steps_done + 1}: the policy's log-probabilities must be finite, {bad} of "
                f"{batch.num_loss_tokens} are not: its weights or logits hold NaN or infinities. Nothing was updated; "
                "go back to a checkpoint. On GPUs, ranks called differently get NaN too; TORCH_DISTRIBUTED_DEBUG="
                "DETAIL names what differs"
            )
        metrics |= found
        return means

    def _advantages_once_a_node(self, batch: Batch, metrics: dict[str, float]) -> Batch:
        """`assign_advantages` of one process of the node; what it changes is changed in all of them."""

        def assigned() -> tuple[Batch, dict[str, float], Watched | None, list[dict[str, Any]]]:
            found: dict[str, float] = {}
            changed = self.assign_advantages(batch, found)
            return changed, found, self.watched, [vars(control) for control in self.controls]

        changed, found, self.watched, states = self.actor.once_a_node(assigned)
        for control, state in zip(self.controls, states, strict=True):
            vars(control).update(state)
        metrics |= found
        return changed

    def assign_advantages(self, batch: Batch, metrics: dict[str, float]) -> Batch:
        """The batch with its advantages, as the controls shape them, and without what the estimator and they drop.

        On the host, over the whole rollout, without communication: every node computes the same numbers. A GPU's sums
        would depend on the order of its threads, and so would what is rejected.
        """
        tokens = self._scored_tokens(batch)
        responses = self._less_kl(batch.responses, tokens, metrics)
        table = with_pseudo(self.shapings, responses)
        advantages = self._estimator(table, tokens)
        if table is not responses:  # pseudo responses are at its end, and have no tokens
            advantages = Advantages(advantages.value[: batch.num_sequences])
        batch.assign_advantages(advantages.value)
        dropped = torch.zeros_like(tokens.loss_mask)
        if advantages.keep is not None:
            dropped = ~advantages.keep[batch.sequence[batch.loss_mask]]
            metrics["training/dropped_responses"] = float((~advantages.keep).double().mean())
        if self.config.rollout_rs.level is not None:
            rejected = self.config.rollout_rs.rejected(tokens)
            metrics["training/rejected_tokens"] = float(rejected.double().mean())
            dropped = dropped | rejected
        if dropped.any():
            batch.drop(dropped)
            if not batch.num_loss_tokens:
                return batch.subset([])
        del tokens  # of many bytes, and the next ones have the advantages
        tokens, at = self._scored_tokens(batch), batch.loss_mask
        shaped = begin(self.controls, tokens, self._progress())
        batch.assign_advantages(shaped.advantage)
        for name, chosen in shaped.selected.items():
            batch.selected[name] = torch.zeros_like(at)
            batch.selected[name][at] = chosen
        covariance = token_covariance(tokens.logprob, shaped.advantage, tokens.loss_mask)
        metrics |= {name: float(value) for name, value in covariance_summary(covariance).items()}
        if self.watched is not None:
            values = {"advantage": shaped.advantage, "covariance": covariance.value}
            self.watched.shaped(tokens.token_id, shaped.drop, **values)
        metrics["actor/entropy_drift"] = float((tokens.entropy_drift * shaped.advantage).mean())
        metrics |= token_metrics(
            logprob=tokens.logprob, entropy=tokens.entropy, entropy_drift=tokens.entropy_drift,
            advantage=shaped.advantage, covariance=covariance.value, position=tokens.position,
            length=batch.responses.length[batch.sequence[at]],
        )  # fmt: skip
        metrics |= tensor_spread("critic/advantages", shaped.advantage) | shaped.metrics
        if shaped.drop is not None:
            batch.drop(shaped.drop)
            metrics["training/dropped_tokens"] = float(shaped.drop.double().mean())
        batch.entropy_drift = batch.clamped_entropy = batch.collision = None  # no update reads them
        kept = batch.sequence[batch.loss_mask].unique().tolist()
        return batch if len(kept) == batch.num_sequences else batch.subset(kept)

    def _scored_tokens(self, batch: Batch) -> Tokens:
        """The loss tokens of the batch with the statistics of the policy that scored them."""
        at = batch.loss_mask
        names = ("entropy", "entropy_drift", "clamped_entropy", "collision")
        values = {name: getattr(batch, name) for name in names}
        return batch.loss_tokens(at, batch.old_logprob[at], **{n: v if v is None else v[at] for n, v in values.items()})

    def _less_kl(self, responses: Responses, tokens: Tokens, metrics: dict[str, float]) -> Responses:
        """The responses with the penalty of `kl_in_reward` taken off their rewards."""
        if not self.config.kl_in_reward.coef:
            return responses
        total, kl = self.config.kl_in_reward.of_responses(tokens, len(responses.reward))
        metrics["actor/reward_kl_penalty"], metrics["actor/reward_kl_penalty_coeff"] = kl, self.kl_reward_coef
        return replace(responses, reward=(responses.reward - self.kl_reward_coef * total).to(responses.reward.dtype))

    def update(self, batch: Batch, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Updates on every mini-batch once per epoch; returns the means over the tokens of all updates.

        The metrics are means over these updates. A batch of which controls have dropped everything has none.
        """
        groups = mini_batches(batch.responses.group.tolist(), self.config.actor.updates_per_rollout)
        gathered: dict[str, list[float]] = defaultdict(list)
        weights: list[int] = []  # tokens of each update
        for epoch in range(self.config.actor.epochs):
            order = np.random.default_rng(derived_seed(self.config.seed, step, epoch, 1)).permutation(len(groups))
            for number, g in enumerate(order):
                self.phase(f"update {epoch * len(groups) + number + 1}/{self.config.actor.epochs * len(groups)}")
                mini_batch = self.actor.once_a_node(partial(batch.subset, groups[g]))
                own = self.actor.update(mini_batch, step=step)
                weights.append(mini_batch.num_loss_tokens)
                for name, value in own.items():
                    # Before the first update nothing has changed, and after the first epoch all tokens are trained on.
                    if name not in ENTROPY_CHANGE or (number and not epoch):
                        gathered[name].append(value)
                means = {name.removeprefix("actor/"): own[name] for name in _ENTROPIES if name in own}
                for control in self.controls:
                    control.after_update(means, self._progress())
        metrics["training/updates"] = len(weights)
        metrics |= {name: mean(values) for name, values in gathered.items() if name not in metrics}
        return {
            name.replace("actor/", "updated/"): float(np.average(gathered[name], weights=weights))
            for name in _ENTROPIES
            if name in gathered
        }

    def _progress(self, step: int | None = None, first: int | None = None) -> Progress:
        """Of the current step, or of one whose prompts begin at position `first`."""
        config, rows = self.config, self.stream.num_rows
        step, first = step or self.steps_done + 1, self._first if first is None else first
        done = {"step": step, "steps": config.steps, "update": self.actor.weight_version}
        if rows is None:
            return Progress(**done)
        candidates = config.rollout.prompts_per_step * (self.prompt_policy.oversample if self.prompt_policy else 1)
        planned = -(-config.steps * candidates // rows)
        return Progress(**done, epoch=first // rows + 1, epochs=max(planned, first // rows + 1))

    def sync_weights(self) -> None:
        self.sampler.sync(self.actor.weight_version, self.actor.named_weights)

    def state_dict(self) -> dict[str, Any]:
        """The state after `steps_done` steps, without the weights.

        Raises:
            RuntimeError: the loop is `unstorable`.
        """
        if self.unstorable:
            raise RuntimeError(f"the state after step {self.steps_done} cannot be stored: {self.unstorable}")
        state = self._before or self._here()
        ahead = state["next"]
        return state | {
            "next": None if ahead is None else ahead.result().state_dict(),
            "actor": self.actor.state_dict(),
            "reward_model": None if self.reward_model is None else self.reward_model.state_dict(),
        }

    def _here(self) -> dict[str, Any]:
        """The current state without the actor's."""
        return {
            "steps_done": self.steps_done,
            "position": self.position,
            "next": self._next,
            "controls": copy.deepcopy([control.state_dict() for control in self.controls]),
            "prompt_policy": None if self.prompt_policy is None else copy.deepcopy(self.prompt_policy.state_dict()),
            "kl_reward_coef": self.kl_reward_coef,
            "torch_rng": torch.get_rng_state(),  # for models and rewards that draw from the global generator
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["controls"]) != len(self.controls):
            raise RuntimeError(
                f"checkpoint: holds the state of {len(state['controls'])} controls, the recipe has {len(self.controls)}"
            )
        self.steps_done, self.position = state["steps_done"], state["position"]
        self.unstorable, self._before = "", None
        self.kl_reward_coef = state.get("kl_reward_coef", self.kl_reward_coef)  # earlier versions had none
        self.actor.load_state_dict(state["actor"])
        if self.reward_model is not None:
            self.reward_model.load_state_dict(state["reward_model"])
        for control, saved in zip(self.controls, state["controls"], strict=True):
            control.load_state_dict(saved)
        if self.prompt_policy is not None:
            self.prompt_policy.load_state_dict(state["prompt_policy"])
        torch.set_rng_state(state["torch_rng"])
        self._next = None
        self._versions.clear()
        if state["next"] is not None:
            self._next = Future()
            self._next.set_result(Collected.from_state(state["next"], self.stream))
            self._versions.append(self._next.result().rollouts[0].weight_version)
        self._versions.append(self.actor.weight_version)
        self.sync_weights()


def _described(policy: PolicyStats, batch: Batch) -> tuple[int, dict[str, float], dict[str, float]]:
    """(log-probabilities that are not finite, the rollout's means for the controls, metrics) of a scored batch."""
    at = batch.loss_mask
    means = {f"scored/{name}": float(policy[name][at].mean()) for name in policy if name.endswith("entropy")}
    means["scored/sampled_entropy"] = -float(policy["logprob"][at].mean())
    gap = (policy["logprob"] - batch.rollout_logprob)[at].abs()
    return int((~policy["logprob"].isfinite() & at).sum()), means, {
        "actor/entropy": means["scored/entropy"],
        "actor/entropy_response_mean": float(batch.response_means(policy["entropy"]).mean()),
        "training/mismatch": float(gap.mean()),
        "training/mismatch_max": float(gap.max()),
    }  # fmt: skip
