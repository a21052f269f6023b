"""The loop with a scripted actor and sampler: every number of a step by hand, and what a resume brings back."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from entcov.controls import Control, Progress, Shaping
from entcov.diagnostics import ENTROPY_CHANGE
from entcov.rl.collect import Collected, Collector, derived_seed
from entcov.rl.config import EvalConfig
from entcov.rl.data.prompt_policy import Outcome, PromptPolicy
from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.rewards.shaping import Overlong, Reactivate
from tests.support.list_batch import said
from tests.support.scripted_loop import POLICY, Actor, Sampler, Stream, reward
from tests.support.tiny_run import recipe

A = 0.5 / (math.sqrt(0.5) + 1e-6)  # GRPO's advantage of rewards 1 and 0


class Watching(Control):
    """Counts its steps."""

    name, state = "watching", ("steps",)

    def __init__(self):
        self.seen, self.steps = [], 0

    def after_step(self, means, progress):
        self.seen.append(means)
        self.steps += 1
        return {"actor/entropy_coef": float(self.steps)}


def drawn_reward(example, text):
    """One that draws from the global generator."""
    return float(text) + float(torch.rand(()))


def loop_of(reward_fn=reward, takes_weights=True, **overrides) -> Loop:
    changes = {"rollout": {"prompts_per_step": 2, "group_size": 2}, "actor.updates_per_rollout": 2, "seed": 7}
    config = parse_config(recipe("unused", **(changes | overrides)))
    return Loop(config, Actor(), Sampler(takes_weights), Stream(), [Watching()], reward_fn)


def test_one_step_by_hand():
    loop = loop_of(**{"rollout.temperature": 0.7})
    metrics = loop.step()
    assert loop.sampler.calls == [{"uids": [0, 1], "temperature": 0.7, "seed": derived_seed(7, 1, 0)}]
    (totals,) = loop.controls[0].seen  # once a step, although there were two updates
    first, second = (batch.num_loss_tokens for _, batch in loop.actor.updates)
    assert {first, second} == {3, 5}
    assert totals == pytest.approx({
        "scored/entropy": 116 / 80, "scored/sampled_entropy": 11.1 / 8,
        "updated/entropy": (11 * first + 12 * second) / 8,
    })  # fmt: skip
    expected = {
        "actor/entropy": 116 / 80,
        "actor/entropy_response_mean": (1.15 + 1.3 + 1.5 + 1.75) / 4,  # each response counts once, whatever its length
        "training/mismatch": 1.0 / 8,  # 0.1 + 0.2 + 0.3 + 0.4, of both signs
        "training/mismatch_max": 0.4,
        "actor/entropy_drift": A * (1 + 4 - 9 + 16 + 25 + 36 - 49 - 64) / 8,
        "actor/entropy_coef": 1.0,
        "actor/pg_loss": 1.5,  # of the two updates
        "critic/score/mean": 0.5,
        "critic/advantages/max": A,
        "critic/advantages/min": -A,
        "response_length/mean": 2.0,
        "response_length/clip_ratio": 0.25,
        "prompt_length/mean": 1.5,
        "training/staleness": 0.0,
        "training/zero_variance_groups": 0.0,
        "training/global_step": 1,
        "training/groups_none_right": 0.0,
        "training/groups_some_right": 1.0,
        "training/groups_all_right": 0.0,
        "training/distinct_answers": 2.0,  # the source has no rule for a final answer: texts are compared
        # Token 13 alone has a probability of at least 1/2; the sizes of the changes add up to 204 A.
        "token_classes/rewarded_likely/tokens": 0.0,
        "token_classes/rewarded_likely/change": 0.0,
        "token_classes/rewarded_unlikely/tokens": 5 / 8,
        "token_classes/rewarded_unlikely/change": 82 / 204,
        "token_classes/punished_likely/tokens": 1 / 8,
        "token_classes/punished_likely/change": -9 / 204,
        "token_classes/punished_unlikely/tokens": 2 / 8,
        "token_classes/punished_unlikely/change": -113 / 204,
        # Middles of places: 1/4 and 3/4 of two tokens, 1/2 of one, 1/6, 1/2 and 5/6 of three.
        "entropy_by_position/2": 1.4,
        "entropy_by_position/3": (1.1 + 1.7) / 2,
        "entropy_by_position/6": (1.3 + 1.5) / 2,
        "entropy_by_position/8": (1.2 + 1.8) / 2,
        "entropy_by_position/9": 1.6,
        "actor/cov_top_0.0002": metrics["actor/cov_max"],
        "actor/cov_top_0.5": A * (1.0125 * 1.25 + 0.6125 * 1.25 + 2 * 0.3875 * 0.75) / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert sum(name.startswith("entropy_by_position/") for name in metrics) == 5
    assert not [name for name in metrics if name.startswith("calibration/")]
    assert loop.position == 2 and loop.steps_done == 1
    assert (loop.sampler.weight_version, loop.sampler.weight) == (2, 1.0)


class Changing(Actor):
    """Its n-th update finds an entropy change of n, which was predicted as 2 n."""

    def update(self, batch, *, step):
        metrics = super().update(batch, step=step)
        change = float(self.weight_version)
        return metrics | dict(zip(ENTROPY_CHANGE, (2 * change, change, change), strict=True))


@pytest.mark.parametrize(("updates", "mean"), [(2, 2.0), (1, None)])
def test_the_entropy_change_is_that_of_tokens_that_no_earlier_update_was_trained_on(updates, mean):
    """Of two epochs' updates 1, 2, 3, 4 the second alone: before the first nothing has changed."""
    loop = loop_of(**{"actor.updates_per_rollout": updates, "actor.epochs": 2})
    loop.actor = Changing()
    metrics = loop.step()
    assert metrics["actor/pg_loss"] == (1 + 2 * updates) / 2
    found = [metrics.get(name) for name in ENTROPY_CHANGE]
    assert found == ([None] * 3 if mean is None else [2 * mean, mean, mean])


def test_an_update_gets_the_trainers_own_log_probabilities_and_whole_groups():
    loop = loop_of()
    loop.step()
    seen = {}
    for step, batch in loop.actor.updates:
        at = batch.loss_mask
        assert step == 1 and batch.logprob_version == 0
        ids = batch.target[at].tolist()
        assert batch.old_logprob[at].tolist() == pytest.approx([POLICY[t] for t in ids])
        seen[tuple(ids)] = batch.advantage[at].tolist()
    assert seen == {
        (11, 12, 13): pytest.approx([A, A, -A]),
        (14, 15, 16, 17, 18): pytest.approx([A, A, A, -A, -A]),
    }


def test_advantages_are_weighted_by_response_tokens():
    """REINFORCE++ over 2, 1, 3 and 2 tokens with rewards 1, 0, 1, 0: mean 5/8, variance 120/448."""
    metrics = loop_of(advantage="reinforce_pp").step()
    assert metrics["critic/advantages/max"] == pytest.approx(3 / 8 / math.sqrt(120 / 448), rel=1e-5)
    assert metrics["critic/advantages/min"] == pytest.approx(-5 / 8 / math.sqrt(120 / 448), rel=1e-5)


def test_every_step_has_prompts_noise_and_an_order_of_its_own():
    loop = loop_of(**{"rollout.prompts_per_step": 4, "actor.updates_per_rollout": 4, "actor.epochs": 2})
    orders = []
    for step in range(1, 7):
        loop.step()
        made = [int(batch.tokens[0]) * 100 + int(batch.token_id[0]) for s, batch in loop.actor.updates if s == step]
        assert sorted(made[:4]) == sorted(made[4:]) and len(set(made)) == 4  # every mini-batch once an epoch
        orders += [tuple(np.argsort(made[:4])), tuple(np.argsort(made[4:]))]
    assert [call["uids"] for call in loop.sampler.calls] == [list(range(4 * i, 4 * i + 4)) for i in range(6)]
    seeds = [call["seed"] for call in loop.sampler.calls]
    assert seeds == [derived_seed(7, step, 0) for step in range(1, 7)] and len(set(seeds)) == 6
    assert len(set(orders)) > 6  # 12 draws out of 24 orders
    assert derived_seed(7, 1, 0) != derived_seed(8, 1, 0) != derived_seed(8, 0, 1)


class Shapes(Control):
    """Drops the tokens whose targets are in `dropped`, doubles the advantage of the others; notes what it is shown."""

    name = "shapes"

    def __init__(self, *dropped):
        self.dropped, self.begun, self.updates, self.steps = dropped, [], [], []

    def begin(self, rollout, progress):
        self.begun.append((rollout, progress))
        target = (-rollout.logprob * 10).round().int()  # POLICY is unlike for the tokens that the tests drop
        drop = torch.isin(target, torch.tensor([int(-10 * POLICY[t]) for t in self.dropped]))
        return Shaping(multiplier=torch.full_like(rollout.advantage, 2.0), drop=drop if self.dropped else None)

    def after_update(self, means, progress):
        self.updates.append((means, progress.update))

    def after_step(self, means, progress):
        self.steps.append(progress)
        return {}


def test_begin_sees_the_scored_rollout_and_shapes_its_advantages():
    loop = loop_of()
    loop.controls[:] = [shapes] = [Shapes()]
    loop.stream.num_rows = 1
    metrics = loop.step()
    ((rollout, progress),) = shapes.begun
    assert rollout.logprob.tolist() == pytest.approx([POLICY[t] for t in range(11, 19)])
    assert torch.equal(rollout.logprob, rollout.old_logprob)
    assert rollout.entropy.tolist() == pytest.approx([t / 10 for t in range(11, 19)])
    assert rollout.entropy_drift.tolist() == [float((t - 10) ** 2) for t in range(11, 19)]
    assert rollout.sequence.tolist() == [0, 0, 1, 2, 2, 2, 3, 3] and rollout.group.tolist() == [0] * 3 + [1] * 5
    assert rollout.position.tolist() == [0, 1, 0, 0, 1, 2, 0, 1]
    assert rollout.reward.tolist() == [1, 1, 0, 1, 1, 1, 0, 0] and rollout.lag.tolist() == [0] * 8
    assert progress == Progress(step=1, steps=3, update=0, epoch=1, epochs=6)
    assert metrics["critic/advantages/max"] == pytest.approx(2 * A, rel=1e-5)
    assert [update for _, update in shapes.updates] == [1, 2]
    assert [means for means, _ in shapes.updates] == [{"entropy": 11.0}, {"entropy": 12.0}]
    loop.step()
    assert shapes.begun[1][1] == Progress(step=2, steps=3, update=2, epoch=3, epochs=6)
    assert [p.step for p in shapes.steps] == [1, 2]


def test_a_dropped_token_leaves_the_batch_and_its_denominators():
    loop = loop_of(**{"actor.updates_per_rollout": 1})
    loop.controls[:] = [Shapes(12, 13, 18)]  # one of two tokens, a whole response, one of two tokens
    metrics = loop.step()
    ((_, batch),) = loop.actor.updates
    at = batch.loss_mask
    assert batch.target[at].tolist() == [11, 14, 15, 16, 17]
    for length in (batch.sequence_length[at], batch.loss_tokens(at, batch.old_logprob[at]).sequence_length):
        assert length.tolist() == [1, 3, 3, 3, 1]
    assert (batch.num_sequences, batch.num_loss_tokens) == (3, 5)
    assert batch.responses.number.tolist() == [0, 2, 3]
    assert batch.advantage[at].tolist() == pytest.approx([2 * A] * 4 + [-2 * A], rel=1e-5)
    assert metrics["training/dropped_tokens"] == 3 / 8


def test_a_rollout_of_which_everything_is_dropped_has_no_update():
    loop = loop_of()
    loop.controls[:] = [shapes] = [Shapes(*range(11, 19))]
    metrics = loop.step()
    assert (metrics["training/updates"], metrics["training/dropped_tokens"]) == (0, 1)
    assert (loop.actor.updates, shapes.updates, shapes.steps, loop.steps_done) == ([], [], [], 1)


class Alternating(Sampler):
    """The first prompt of a call has equal rewards."""

    def generate(self, prompts, **options):
        out = super().generate(prompts, **options)
        for rollout in out[:2]:
            rollout.text = "1"
        return out


def test_dynamic_sampling_draws_other_prompts_with_other_noise():
    config = loop_of(**{"rollout.filter_zero_variance": True, "rollout.max_draws": 3}).config
    sampler = Alternating()
    collected = Collector(config.rollout, config.seed, sampler, Stream(), reward).collect(5, 10)
    assert [call["uids"] for call in sampler.calls] == [[10, 11], [12, 13]]
    assert [call["seed"] for call in sampler.calls] == [derived_seed(7, 5, 0), derived_seed(7, 5, 1)]
    assert [r.prompt.uid for r in collected.rollouts] == [11, 11, 13, 13] and collected.position == 14
    assert collected.metrics["training/zero_variance_groups"] == 0.5  # of all four groups
    assert collected.metrics["training/generation_batches"] == 2


def test_a_shortfall_ends_the_run_unless_the_recipe_accepts_it():
    """Of two groups a draw one is kept; the default is that of the papers' scripts, which raise."""

    def collect(**settings):
        config = loop_of(**{"rollout.filter_zero_variance": True, "rollout.max_draws": 1} | settings).config
        return Collector(config.rollout, config.seed, Alternating(), Stream(), reward).collect(5, 10)

    with pytest.raises(RuntimeError, match=r"step 5: .* kept 1 groups of 2 in 1 draws, and a step needs 2: "):
        collect()
    accepted = collect(**{"rollout.on_shortfall": "accept"})
    assert [r.prompt.uid for r in accepted.rollouts] == [11, 11] and accepted.position == 12


def test_rollouts_of_other_weights_are_refused():
    loop = loop_of(takes_weights=False)
    loop.step()
    with pytest.raises(RuntimeError, match=r"step 2: .* version 0; with rollout.max_staleness=0 .* one of \[2\]"):
        loop.step()


def test_a_resumed_loop_goes_on_where_the_other_stopped():
    """Position, step, weights, control and the global generator: the reward draws from it."""
    torch.manual_seed(3)
    straight = loop_of(reward_fn=drawn_reward)
    straight.step()
    state = straight.state_dict()
    expected = straight.step()
    torch.manual_seed(4)
    resumed = loop_of(reward_fn=drawn_reward)
    resumed.load_state_dict(state)
    assert (resumed.sampler.weight_version, resumed.sampler.weight) == (2, 1.0)
    got = resumed.step()
    timeless = [{k: v for k, v in m.items() if not k.startswith(("timing", "perf/"))} for m in (got, expected)]
    assert timeless[0] == timeless[1]
    assert resumed.sampler.calls == straight.sampler.calls[1:]
    assert (resumed.actor.weight, resumed.controls[0].steps, resumed.position) == (2.0, 2, 4)


def test_rollouts_sampled_ahead_are_resumed_as_they_were():
    """They come from weights that are gone; with the same seed and position others would be sampled now."""
    ahead = {"rollout.sampler": "vllm", "rollout.max_staleness": 1}
    straight = loop_of(**ahead)
    straight.step()
    state = straight.state_dict()
    resumed = loop_of(**ahead)
    resumed.load_state_dict(state)
    metrics = resumed.step()
    assert metrics["training/staleness"] == 1 and metrics["response_length/clip_ratio"] == 0.25
    resumed.state_dict()  # waits for the rollouts of step 3
    assert [call["uids"] for call in resumed.sampler.calls] == [[4, 5]]  # those of step 2 were not sampled again


def same_collected(found: Collected, expected: Collected) -> None:
    assert [said(rollout) for rollout in found.rollouts] == [said(rollout) for rollout in expected.rollouts]
    assert replace(found, rollouts=[]) == replace(expected, rollouts=[])
    assert all((r.tokens.dtype, r.logprob.dtype) == ("int32", "float32") for r in found.rollouts)


def test_kept_rollouts_are_the_same_rollouts():
    rollouts = Sampler().generate(Stream().take(4, 2), group_size=2, temperature=1.0, max_response_length=3, seed=0)
    for number, rollout in enumerate(rollouts):
        rollout.reward, rollout.weight_version, rollout.temperature = number / 4, 3, 1 + number / 8
    kept = Collected(rollouts, 6, {"a": 1.0}, [Outcome(None, (0.0, 1.0)), Outcome(7, (0.5,))])
    same_collected(Collected.from_state(kept.state_dict(), Stream()), kept)


def test_rollouts_that_an_earlier_version_kept_are_read():
    """It did not store whether the time for a reward ran out."""
    (rollout,) = Sampler().generate(Stream().take(3, 1), group_size=1, temperature=1.0, max_response_length=9, seed=0)
    rollout.reward = 0.5
    state = Collected([rollout], 4).state_dict()
    state["each"] = [each[:7] for each in state["each"]]
    state["tokens"], state["logprob"] = state["tokens"].long(), state["logprob"].double()  # and wider numbers
    same_collected(Collected.from_state(state, Stream()), Collected([rollout], 4))


def test_evaluation_has_the_same_noise_at_every_step_and_none_of_training(monkeypatch):
    from types import SimpleNamespace

    from entcov.rl import run

    seeds = []

    def evaluated(sampler, prompts, reward_fn, *, seed, **settings):
        seeds.append(seed)
        return {}, []

    monkeypatch.setattr(run, "evaluate", evaluated)
    loop = loop_of()
    loop.stream.held_out = lambda n: []
    loop.config.eval = EvalConfig(every=1, prompts=4)
    quiet = SimpleNamespace(phase=lambda name: None)
    whole = run._Run(loop.config, SimpleNamespace(is_rank0=False), loop, None, quiet, None)
    for step in (0, 1, 20):
        whole.evaluation(step)
    assert len(set(seeds)) == 1
    assert seeds[0] not in {derived_seed(7, step, draw) for step in range(30) for draw in range(3)}


# ---- the data level: prompt policies and reward shaping --------------------------------------------------------------


class Rows(Stream):
    """A data set of five rows, read in order."""

    num_rows = 5

    def take(self, position, n):
        return [replace(prompt, row=prompt.uid % 5) for prompt in super().take(position, n)]


class Perplexed(Sampler):
    """A prompt's log-probability falls with its distance from uid 6."""

    def prompt_logprobs(self, prompts):
        self.calls.append({"scored": [p.uid for p in prompts]})
        return [[-abs(p.uid - 6.0)] for p in prompts]


@dataclass
class Curious(PromptPolicy):
    """Chooses the candidates whose rows it has seen least often, and samples a row hotter each time."""

    name, needs_logprob, needs_rows, oversample = "curious", True, True, 2
    seen: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def __deepcopy__(self, memo):
        return Curious(dict(self.seen), self.asked)  # the record is shared: it sees what copies are asked

    def choose(self, candidates, prompt_logprob, count, progress, *, seed):
        self.asked.append((progress.step, progress.epoch, dict(self.seen), seed))
        keys = [(self.seen.get(p.row, 0), -own[0]) for p, own in zip(candidates, prompt_logprob, strict=True)]
        return sorted(range(len(candidates)), key=keys.__getitem__)[:count]

    def temperature(self, prompt, base, progress):
        return base + 0.1 * self.seen.get(prompt.row, 0)

    def observe(self, outcomes, progress):
        for outcome in outcomes:
            assert outcome.scores == (1.0, 0.0)
            self.seen[outcome.row] = self.seen.get(outcome.row, 0) + 1
        return {"prompts/seen": float(len(self.seen)), "prompts/epoch": float(progress.epoch)}

    def state_dict(self):
        return {"seen": [list(item) for item in self.seen.items()]}

    def load_state_dict(self, state):
        self.seen = {row: times for row, times in state["seen"]}


def curious_loop(**overrides) -> Loop:
    loop = loop_of(**overrides)
    return Loop(loop.config, Actor(), Perplexed(), Rows(), [], reward, prompt_policy=Curious())


def test_a_prompt_policy_chooses_and_heats_prompts():
    loop = curious_loop()
    first, second = loop.step(), loop.step()
    scored = [call["scored"] for call in loop.sampler.calls if "scored" in call]
    made = [call for call in loop.sampler.calls if "uids" in call]
    assert scored == [[0, 1, 2, 3], [4, 5, 6, 7]]  # two candidates for each prompt
    # Rows 3 and 2 are nearest to uid 6. Then of uids 4 to 7, rows 4, 0, 1, 2: row 2 was seen, uid 6 is nearest, then 5.
    assert [call["uids"] for call in made] == [[3, 2], [6, 5]]
    assert [call["temperature"] for call in made] == [[1.0, 1.0], [1.0, 1.0]]
    assert first["prompts/candidates"] == 4 and loop.position == 8
    assert first["prompts/perplexity/max"] == pytest.approx(math.exp(4)) and first["prompts/seen"] == 2
    assert (first["prompts/epoch"], second["prompts/epoch"]) == (1, 1)
    loop.step()  # uids 8 to 11, rows 3, 4, 0, 1: row 4 is new, of the others uid 8 is nearest; 0.1 hotter, in epoch 2
    assert loop.sampler.calls[-1]["uids"] == [9, 8] and loop.sampler.calls[-1]["temperature"] == [1.0, 1.1]
    assert [(step, epoch) for step, epoch, _, _ in loop.prompt_policy.asked] == [(1, 1), (2, 1), (3, 2)]
    batches = [batch for step, batch in loop.actor.updates if step == 3]
    assert sorted(temperature for batch in batches for temperature in batch.temperatures) == [1.0, 1.0, 1.1, 1.1]
    assert len({seed for *_, seed in loop.prompt_policy.asked}) == 3


def test_a_policy_that_chooses_too_few_is_asked_again_and_one_that_chooses_badly_is_refused():
    class Picky(PromptPolicy):
        name, oversample = "picky", 2

        def choose(self, candidates, prompt_logprob, count, progress, *, seed):
            return [i for i, prompt in enumerate(candidates) if prompt.uid % 3 == 0][:count]

    config = loop_of(**{"rollout.prompts_per_step": 3}).config
    sampler = Sampler()
    collected = Collector(config.rollout, 7, sampler, Stream(), reward, Picky()).collect(1, 1)
    assert sampler.calls[0]["uids"] == [3, 6, 9]  # of 1 to 6, then of 7 and 8, which has none, then of 9 and 10
    assert collected.position == 11
    assert [outcome.scores for outcome in collected.outcomes] == [(1.0, 0.0)] * 3
    for bad in ([0, 0], [0, 6], [0, 1, 2, 3], [-1]):
        policy = Picky()
        policy.choose = lambda *_, seed, bad=bad: bad
        with pytest.raises(RuntimeError, match="prompt policy picky: choose must return at most 3 different indices"):
            Collector(config.rollout, 7, Sampler(), Stream(), reward, policy).collect(1, 1)
    policy.choose = lambda *_, seed: []
    with pytest.raises(RuntimeError, match="step 1: prompt policy picky chose 0 prompts of 3 in 10000 rounds"):
        Collector(config.rollout, 7, Sampler(), Stream(), reward, policy).collect(1, 1)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_prompt_policy_is_resumed_bit_for_bit(staleness):
    """It chooses for step k + 1 after observing step k, also where step k + 1 is sampled ahead."""
    options = {"rollout.sampler": "vllm", "rollout.max_staleness": staleness}
    straight, rows, states = curious_loop(**options), [], []
    for _ in range(5):
        rows.append(straight.step())
        states.append(copy.deepcopy(straight.state_dict()))
    asked = {step: seen for step, _, seen, _ in straight.prompt_policy.asked}
    assert [sum(asked[step].values()) for step in range(1, 6)] == [0, 2, 4, 6, 8]
    assert states[2]["prompt_policy"] == json.loads(json.dumps(states[2]["prompt_policy"]))
    resumed = curious_loop(**options)
    resumed.load_state_dict(states[2])
    again = [resumed.step(), resumed.step()]
    keep = lambda row: {k: v for k, v in row.items() if not k.startswith(("timing", "perf/"))}  # noqa: E731
    assert [keep(row) for row in again] == [keep(row) for row in rows[3:]]
    resumed.state_dict(), straight.state_dict()  # wait for what is sampled ahead
    made = [call for call in resumed.sampler.calls if "uids" in call]
    assert made == [call for call in straight.sampler.calls if "uids" in call][3 + staleness :]
    assert resumed.state_dict()["prompt_policy"] == straight.state_dict()["prompt_policy"]


def test_a_step_that_fails_before_its_update_forgets_what_the_policy_has_observed():
    loop = curious_loop()
    loop.step()
    before = loop.state_dict()["prompt_policy"]
    loop.actor.compute_logprobs = lambda batch: {}["nothing"]
    with pytest.raises(KeyError):
        loop.step()
    assert len(loop.prompt_policy.seen) > 2
    assert loop.state_dict()["prompt_policy"] == before


def test_the_advantage_is_computed_from_shaped_rewards_and_the_score_stays():
    """Responses of 2, 1, 3 and 2 tokens with rewards 1, 0, 1, 0; a limit of 3 and a buffer of 2: -1/2, 0, -1, -1/2."""
    loop = loop_of(**{"rollout.max_response_length": 3, "advantage": "dr_grpo"})
    loop.shapings = [Overlong(buffer=2)]
    metrics = loop.step()
    assert (metrics["critic/score/mean"], metrics["critic/score/max"]) == (0.5, 1.0)
    assert (metrics["critic/rewards/mean"], metrics["critic/rewards/min"]) == (0.0, -0.5)
    assert metrics["critic/shaping/overlong"] == -0.5
    seen = {}
    for _, batch in loop.actor.updates:
        seen |= dict(zip(batch.target.tolist(), batch.advantage.tolist(), strict=True))
    assert [seen[token] for token in (11, 13, 14, 17)] == pytest.approx([0.25, -0.25, 0.25, -0.25])
    scores = {score for _, batch in loop.actor.updates for score in batch.responses.score.tolist()}
    assert scores == {0.0, 1.0}


def test_reactivated_groups_have_an_advantage_and_the_pseudo_response_is_not_trained_on():
    loop = loop_of(reward_fn=lambda example, text: 1.0)
    loop.shapings = [Reactivate()]
    metrics = loop.step()
    assert metrics["critic/advantages/min"] == pytest.approx(1 / math.sqrt(3), rel=1e-5)  # 1 / sqrt(G + 1), G = 2
    assert sum(batch.num_sequences for _, batch in loop.actor.updates) == 4
    assert metrics["critic/rewards/mean"] == 1.0


def test_the_filter_of_dynamic_sampling_looks_at_scores():
    """Shaping makes the rewards of an equal group differ; it is dropped all the same."""
    loop = loop_of(
        reward_fn=lambda example, text: 1.0, **{"rollout.filter_zero_variance": True, "rollout.max_draws": 1}
    )
    loop.shapings = [Overlong(buffer=2)]
    with pytest.raises(RuntimeError, match="filter_zero_variance"):
        loop.step()


def test_a_prompt_policy_hears_of_groups_that_the_filter_drops():
    config = loop_of(**{"rollout.filter_zero_variance": True, "rollout.max_draws": 3}).config
    collected = Collector(config.rollout, config.seed, Alternating(), Rows(), reward).collect(5, 10)
    assert [r.prompt.uid for r in collected.rollouts] == [11, 11, 13, 13]
    expected = [(0, (1.0, 1.0)), (1, (1.0, 0.0)), (2, (1.0, 1.0)), (3, (1.0, 0.0))]
    assert [(outcome.row, outcome.scores) for outcome in collected.outcomes] == expected


def test_the_state_before_a_step_is_a_copy():
    """A policy that hands out what it goes on writing to."""
    loop = curious_loop()
    loop.prompt_policy.state_dict = lambda: {"seen": loop.prompt_policy.seen}
    before = loop._here()["prompt_policy"]
    loop.step()
    assert before == {"seen": {}}
