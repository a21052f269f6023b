"""Rewards are computed while others are still being generated, and nothing else changes."""

from __future__ import annotations

import threading

import pytest

from entcov.rl import rewards, scoring
from entcov.rl.scoring import Scorer
from entcov.rl.types import Example, Prompt, Rollout

LIMIT = 60  # seconds until a wait that should end at once fails the test


def rollout(text: str, reward: float | None = None) -> Rollout:
    prompt = Prompt(0, Example("entcov/carry_arithmetic", (), "12"), (1,))
    return Rollout(prompt, 0, [2], [-0.5], True, 0, text=text, reward=reward)


def test_a_response_is_scored_before_the_next_one_is_complete():
    scored = threading.Event()

    def score(example, response):
        scored.set()
        return float(response == "right")

    rollouts = [rollout("right"), rollout("wrong")]
    with Scorer(score) as scorer:
        scorer.take(rollouts[0])
        assert scored.wait(LIMIT)  # without `finish`: the sampler would be generating the second one now
        scorer.take(rollouts[1])
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 0.0]


def test_what_the_sampler_did_not_announce_is_scored_at_the_end_and_what_has_a_reward_is_left():
    asked = []
    rollouts = [rollout("a"), rollout("b", reward=0.25), rollout("c")]
    with Scorer(lambda example, response: asked.append(response) or 1.0) as scorer:
        scorer.take(rollouts[2])
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 0.25, 1.0] and sorted(asked) == ["a", "c"]


def test_a_reward_function_of_your_own_is_never_called_twice_at_once():
    busy, together = threading.Lock(), []

    def score(example, response):
        together.append(not busy.acquire(blocking=False))
        threading.Event().wait(0.001)
        busy.release()
        return 1.0

    with Scorer(score) as scorer:
        rollouts = [rollout("x") for _ in range(20)]
        for each in rollouts:
            scorer.take(each)
        scorer.finish(rollouts)
    assert together == [False] * 20


def test_the_built_in_rewards_work_side_by_side(monkeypatch):
    meeting = threading.Barrier(2, timeout=LIMIT)  # passes only if two calls are under way together
    monkeypatch.setattr(scoring, "free_cores", lambda: 2)  # whatever the number of CPUs
    monkeypatch.setattr(rewards, "_scorer", lambda example: lambda example, response: float(meeting.wait() >= 0))
    rollouts = [rollout("#12"), rollout("#12")]
    with Scorer(rewards.score) as scorer:
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 1.0]


def test_an_error_of_the_reward_function_comes_out():
    def score(example, response):
        raise ValueError(f"cannot score {response}")

    with pytest.raises(ValueError, match="cannot score b"), Scorer(score) as scorer:
        scorer.take(rollout("b"))
        scorer.finish([])
