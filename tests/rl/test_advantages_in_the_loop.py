"""What leaves the loss, and what changes the rewards, between scoring and the updates: one scripted step by hand."""

from __future__ import annotations

import math

import pytest
import torch

from entcov.rl.batch import pack
from entcov.rl.collect import Collector, pack_rollouts, unpack_rollouts
from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.types import Example, Prompt, Rollout
from tests.support.list_batch import said
from tests.support.scripted_loop import POLICY, RESPONSES, Actor, Sampler, Stream, reward
from tests.support.tiny_run import recipe

REFERENCE = 0.25  # the reference policy's log-probabilities are lower by this, nats


class Scoring(Actor):
    """With a reference policy, and the sum of the squared probabilities that a uniform policy over 2 tokens has."""

    def compute_logprobs(self, batch):
        scored = super().compute_logprobs(batch)
        half = torch.full((len(batch.tokens),), 0.5)
        return scored | {"ref_logprob": scored["logprob"] - REFERENCE, "collision": half}


class Greedy(Sampler):
    """Its greedy response to the first prompt is right, that to the second one wrong."""

    def generate(self, prompts, *, group_size, temperature, **options):
        self.options = options
        out = super().generate(prompts, group_size=group_size, temperature=temperature, max_response_length=8, seed=1)
        for rollout in out if temperature == 0 else ():
            rollout.text = "1" if rollout.prompt.uid == 0 else "0"
        return out


def loop_of(reward_fn=reward, **overrides) -> Loop:
    changes = {"rollout": {"prompts_per_step": 2, "group_size": 2}, "actor.updates_per_rollout": 2, "seed": 7}
    config = parse_config(recipe("unused", **(changes | overrides)))
    return Loop(config, Scoring(), Greedy(), Stream(), [], reward_fn)


def trained(loop) -> dict[int, list[float]]:
    """Number of each response that the updates saw -> the advantages of its loss tokens."""
    found = {}
    for _, batch in loop.actor.updates:
        for s in range(batch.num_sequences):
            one = batch.subset([s])
            found[int(one.responses.number)] = one.advantage[one.loss_mask].tolist()
            assert set(one.sequence_length.tolist()) == {one.num_loss_tokens}
    return found


@pytest.mark.parametrize(
    "name, expected, dropped",
    [
        ("psr", {0: [1.0] * 2, 2: [1.0] * 3}, 0.5),
        ("nsr", {1: [-1.0], 3: [-1.0] * 2}, 0.5),
        ("w_reinforce", {0: [0.1] * 2, 1: [-1.0], 2: [0.1] * 3, 3: [-1.0] * 2}, None),
    ],
)
def test_responses_that_the_estimator_drops_leave_the_denominators(name, expected, dropped):
    loop = loop_of(advantage=name)
    metrics = loop.step()
    assert trained(loop) == {key: pytest.approx(value) for key, value in expected.items()}
    assert metrics.get("training/dropped_responses") == dropped


def test_a_step_without_anything_to_train_on():
    loop = loop_of(lambda example, text: 0.0, advantage="psr")
    metrics = loop.step()
    assert metrics["training/updates"] == 0 and metrics["training/dropped_responses"] == 1.0
    assert loop.steps_done == 1 and not loop.actor.updates


def test_remax_samples_a_greedy_response_to_each_prompt():
    loop = loop_of(advantage="remax")
    loop.step()
    assert [(call["uids"], call["temperature"]) for call in loop.sampler.calls] == [([0, 1], 1.0), ([0, 1], 0.0)]
    assert trained(loop) == {0: [0.0, 0.0], 1: [-1.0], 2: [1.0] * 3, 3: [0.0, 0.0]}


def test_components_of_the_reward_reach_the_estimator():
    loop = loop_of(lambda example, text: {"right": float(text), "short": 3.0 - float(text)}, advantage="gdpo")
    loop.config.advantages["gdpo"] = {"weights": {"right": 1.0, "short": 0.0}}
    loop._estimator = loop.config.build_estimator()
    metrics = loop.step()
    weighted = trained(loop)
    assert metrics["critic/score/mean"] == 3.0 and metrics["critic/score/short"] == 2.5
    assert weighted[0][0] > 0 > weighted[1][0]  # the sum is 3 for every response
    with pytest.raises(ValueError, match="the same components for every response, got .* and for the first one"):
        loop_of(lambda example, text: {text: 1.0}, advantage="gdpo").step()


def test_kl_leaves_the_reward_before_the_advantage():
    """k1 is 0.25 a token: the response with n tokens loses 0.1 * 0.25 n; the controller sees the mean 0.25."""
    settings = {"coef": 0.1, "target": 0.05, "horizon": 40}
    loop = loop_of(advantage="dr_grpo", kl_in_reward=settings)
    metrics = loop.step()
    first, second = (1 - 0.05) - (0 - 0.025), (1 - 0.075) - (0 - 0.05)
    expected = {0: [first / 2] * 2, 1: [-first / 2], 2: [second / 2] * 3, 3: [-second / 2] * 2}
    assert trained(loop) == {key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(REFERENCE)
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.1
    assert metrics["critic/score/mean"] == 0.5  # scores are as they were
    assert loop.kl_reward_coef == pytest.approx(0.1 * (1 + 0.2 * 4 / 40))
    again = loop_of(advantage="dr_grpo", kl_in_reward=settings)
    again.load_state_dict(loop.state_dict())
    assert again.kl_reward_coef == loop.kl_reward_coef
    assert again.step()["actor/reward_kl_penalty_coeff"] == loop.kl_reward_coef


def test_tokens_keep_the_score():
    """What controls see of a response's reward is as scored, whatever shaping or KL took off."""
    batch = pack([Rollout(Prompt(0, Example("test", (), "1"), (5,)), 0, [7], [-1.0], True, 0, reward=1.0)])
    batch.old_logprob = batch.rollout_logprob
    batch.responses.reward = batch.responses.reward - 0.5
    assert batch.loss_tokens(batch.loss_mask, batch.rollout_logprob[batch.loss_mask]).reward.tolist() == [1.0]


def test_rejected_tokens_leave_the_loss():
    """Of the first response exp(-1.1 + 1) and exp(-1.8 + 2): the second is above 1.1. All others are below."""
    loop = loop_of(advantage="dr_grpo", rollout_rs={"level": "token", "high": 1.1})
    metrics = loop.step()
    pairs = [pair for tokens, logs, *_ in RESPONSES.values() for pair in zip(tokens, logs, strict=True)]
    ratios = [math.exp(POLICY[token] - sampled) for token, sampled in pairs]
    assert metrics["training/rejected_tokens"] == sum(r > 1.1 for r in ratios) / 8 == 1 / 8
    assert trained(loop) == {0: [0.5], 1: [-0.5], 2: [0.5] * 3, 3: [-0.5, -0.5]}


def test_rejected_responses_leave_the_loss_and_stay_in_their_group():
    """The product of the last response's ratios is exp(-0.4)."""
    loop = loop_of(advantage="dr_grpo", rollout_rs={"level": "sequence", "low": 0.7})
    metrics = loop.step()
    assert trained(loop) == {0: [0.5, 0.5], 1: [-0.5], 2: [0.5] * 3}
    assert metrics["training/rejected_tokens"] == 2 / 8


def test_the_optimal_token_baseline_is_of_the_scored_policy():
    loop = loop_of(advantage="optimal_token_baseline")
    loop.step()
    energy = {t: 1.5 - 2 * math.exp(lp) for t, lp in POLICY.items()}
    right, wrong = energy[11], energy[13]
    baseline = right / (right + wrong)
    assert trained(loop)[0] == pytest.approx([1 - baseline, 0.0], abs=1e-6)
    assert trained(loop)[1] == pytest.approx([-baseline], abs=1e-6)


def test_packed_rollouts_keep_components_and_baselines():
    prompts = {uid: Prompt(uid, Example("test", (), "1"), (5,)) for uid in (3, 4)}
    rollouts = [Rollout(prompts[uid], 0, [7], [-1.0], True, 0, reward=1.0) for uid in (3, 4)]
    rollouts[0].components, rollouts[1].baseline = {"a": 1.0}, 0.5
    assert [said(r) for r in unpack_rollouts(pack_rollouts(rollouts), prompts)] == [said(r) for r in rollouts]
    packed = pack_rollouts(rollouts)
    del packed["components"], packed["baseline"]  # as earlier versions stored them
    assert [(r.components, r.baseline) for r in unpack_rollouts(packed, prompts)] == [(None, None)] * 2


def test_no_greedy_response_is_sampled_for_other_estimators():
    loop = loop_of()
    collected = Collector(loop.config.rollout, 7, loop.sampler, Stream(), reward).collect(1, 0)
    assert [call["temperature"] for call in loop.sampler.calls] == [1.0]
    assert all(rollout.baseline is None for rollout in collected.rollouts)
