"""Rewards are computed while others are still being generated, and nothing else changes."""

from __future__ import annotations

import threading

import pytest

from entcov.rl.rewards import rules
from entcov.rl.rewards import scorer as scoring
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.rollouts import _described
from entcov.rl.sandbox import isolation, run_program
from entcov.rl.sandbox.budget import Charge
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
    monkeypatch.setattr(rules, "_scorer", lambda example: lambda example, response: float(meeting.wait() >= 0))
    rollouts = [rollout("#12"), rollout("#12")]
    with Scorer(rules.score) as scorer:
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 1.0]


def test_an_error_of_the_reward_function_comes_out():
    def score(example, response):
        raise ValueError(f"cannot score {response}")

    with pytest.raises(ValueError, match="cannot score b"), Scorer(score) as scorer:
        scorer.take(rollout("b"))
        scorer.finish([])


# ---- where scoring could end a run ---------------------------------------------------------------------------------


def refuse_threads(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("own", [True, False])
def test_without_a_thread_the_caller_scores(monkeypatch, own):
    """A machine that has no thread left ended the run."""
    asked = []

    def score(example, response):
        asked.append((response, threading.current_thread()))
        return float(response == "right")

    if not own:
        monkeypatch.setattr(rules, "_scorer", lambda example: score)
    rollouts = [rollout("right"), rollout("wrong"), rollout("right")]
    refuse_threads(monkeypatch)
    with Scorer(score if own else rules.score) as scorer:
        scorer.take(rollouts[0])
        assert rollouts[0].reward == 1.0
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 1.0]
    assert asked == [(r.text, threading.current_thread()) for r in rollouts]  # each once


def test_where_some_threads_start_each_response_is_scored_once(monkeypatch):
    started, start, asked = [], threading.Thread.start, []

    def start_two(self):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(scoring, "free_cores", lambda: 8)
    monkeypatch.setattr(threading.Thread, "start", start_two)
    monkeypatch.setattr(rules, "_scorer", lambda example: lambda example, response: asked.append(response) or 1.0)
    rollouts = [rollout(str(i)) for i in range(200)]
    with Scorer(rules.score) as scorer:
        for each in rollouts:
            scorer.take(each)
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0] * 200 and sorted(asked) == sorted(r.text for r in rollouts)


def test_an_error_comes_out_where_the_caller_scores(monkeypatch):
    def score(example, response):
        raise ValueError(f"cannot score {response}")

    refuse_threads(monkeypatch)
    with pytest.raises(ValueError, match="cannot score b"), Scorer(score) as scorer:
        scorer.take(rollout("b"))
        scorer.finish([])


@pytest.mark.skipif(bool(isolation.missing()), reason=f"this system lacks {isolation.missing()}")
def test_a_step_waits_for_slow_answers_no_longer_than_its_budget():
    """Responses that time out are marked and counted; beyond the budget, sandboxes score nothing more of this step."""

    def score(example, response):
        if response == "no sandbox":
            return 1.0
        if response == "expensive":
            Charge.current().spend(scoring.STEP_LIMIT)
        return float(run_program(response, limit=0.3 if "while" in response else LIMIT).stdout == "1\n")

    texts = ["print(1)", "while 1: pass", "print(1)", "expensive", *["print(1)"] * 3, "no sandbox"]
    rollouts = [rollout(text) for text in texts]
    with Scorer(score) as scorer:
        scorer.finish(rollouts)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 1.0, *[0.0] * 4, 1.0]
    assert [r.timed_out for r in rollouts] == [False, True, False, *[True] * 4, False]
    assert _described(rollouts, group_size=4)["reward/timeouts"] == 5
    with Scorer(score) as scorer:  # the next step has a budget of its own
        again = rollout("print(1)")
        scorer.finish([again])
    assert (again.reward, again.timed_out) == (1.0, False)
