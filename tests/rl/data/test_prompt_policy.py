"""Prompt policies: which prompts, at which temperature, by hand; and that their state is all that they remember."""

from __future__ import annotations

import json
import math

import pytest

from entcov.controls import Progress
from entcov.rl.data.prompt_policy import ERPO, GRESO, PREPO, PROMPT_POLICIES, Outcome, perplexity
from entcov.rl.types import Example, Prompt

EXAMPLE = Example("test", (), "1")


def prompts(rows) -> list[Prompt]:
    return [Prompt(100 + i, EXAMPLE, (1, 2), row) for i, row in enumerate(rows)]


def at(step: int, steps: int = 5, epoch: int | None = 1) -> Progress:
    return Progress(step=step, steps=steps, update=0, epoch=epoch, epochs=epoch)


def test_perplexity_by_hand():
    assert perplexity([-math.log(2), -math.log(8)]) == pytest.approx(4)
    assert perplexity([]) == 1.0  # a prompt of one token


def test_prepo_moves_its_window_from_low_to_high_perplexity():
    """10 candidates, 4 wanted: the window begins at floor(rho * 6), rho = 0, 1/4, ... 1."""
    names = [3, 7, 1, 9, 0, 5, 8, 2, 6, 4]  # rank of each candidate's perplexity
    logprob = [[-0.1 * rank] * (1 + rank % 3) for rank in names]  # of different lengths: the mean decides
    for step, first in ((1, 0), (2, 1), (3, 3), (4, 4), (5, 6)):
        chosen = PREPO().choose(prompts(range(10)), logprob, 4, at(step), seed=0)
        assert [names[i] for i in chosen] == list(range(first, first + 4))
    assert [names[i] for i in PREPO().choose(prompts(range(10)), logprob, 4, at(1, steps=1), seed=0)] == [0, 1, 2, 3]
    assert PREPO().choose(prompts(range(4)), [[-1.0]] * 4, 2, at(5), seed=0) == [2, 3]  # equal: the stream's order
    assert PREPO().oversample == 5 and PREPO.needs_logprob and not PREPO.needs_rows


def test_erpo_raises_the_temperature_of_prompts_that_were_all_right():
    policy = ERPO(increment=0.1, max_temperature=1.25)
    (prompt,) = prompts([7])
    seen = [policy.temperature(prompt, 1.0, at(1))]
    for scores in ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0)):
        policy.observe([Outcome(7, scores), Outcome(8, (0.0, 1.0))], at(1))
        seen.append(policy.temperature(prompt, 1.0, at(1)))
    assert seen == pytest.approx([1.0, 1.1, 1.1, 1.2, 1.2, 1.25])
    assert policy.temperature(prompts([8])[0], 1.0, at(1)) == 1.0
    assert policy.temperature(prompt, 1.5, at(1)) == 1.5  # never below the recipe's


def test_greso_skips_by_the_last_groups_of_a_prompt():
    """After z all-right groups in a row 1 - max(p^z, 0.01) are left out; a group that differs ends the row."""
    policy = GRESO()
    right, wrong, mixed = (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)
    histories = [[], [right], [right, right], [wrong] * 3, [right] * 9, [right, mixed], [wrong, right], [right, wrong]]
    for row, history in enumerate(histories):
        for scores in history:
            policy.observe([Outcome(row, scores)], at(1))
    assert [policy._skipped(row) for row in range(8)] == pytest.approx([0, 0.5, 0.75, 0.875, 0.99, 0, 0.5, 0.5])
    kept = len(policy.choose(prompts([2] * 4000), None, 4000, at(2), seed=1))
    assert kept == pytest.approx(1000, abs=4 * math.sqrt(4000 * 0.75 * 0.25))
    candidates = prompts([0, 1, 2, 3, 4, 5, 6, 7] * 4)
    chosen = policy.choose(candidates, None, 5, at(2), seed=3)
    assert chosen == policy.choose(candidates, None, 5, at(9), seed=3) == sorted(chosen) and len(chosen) == 5
    assert chosen != policy.choose(candidates, None, 5, at(2), seed=4)


def test_greso_adapts_from_the_second_epoch_on():
    """Targets 0.25 / 3 and 0.25 * 2 / 3, change 0.01, both kept in [0.05, 0.95]."""
    policy = GRESO()
    right, wrong, mixed = ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0))
    step = [Outcome(row, scores) for row, scores in enumerate([right] + [wrong] + [mixed] * 8)]  # a tenth each
    assert policy.observe(step, at(1, epoch=1))["prompts/p_easy"] == 0.5
    metrics = policy.observe(step, at(2, epoch=2))  # 0.1 >= 0.083 of easy ones: skip more; 0.1 < 0.167 of hard: fewer
    assert (metrics["prompts/p_easy"], metrics["prompts/p_hard"]) == pytest.approx((0.49, 0.51))
    assert (metrics["prompts/all_right"], metrics["prompts/zero_variance_not_right"]) == (0.1, 0.1)
    for _ in range(60):
        metrics = policy.observe(step, at(3, epoch=2))
    assert (metrics["prompts/p_easy"], metrics["prompts/p_hard"]) == pytest.approx((0.05, 0.95))


@pytest.mark.parametrize("name", list(PROMPT_POLICIES))
def test_state_is_json_and_brings_everything_back(name):
    whole, again = PROMPT_POLICIES.make(name), PROMPT_POLICIES.make(name)
    for step in range(4):
        outcomes = [Outcome(row, (1.0, float(row % 3 == step))) for row in range(9)]
        whole.observe([*outcomes, Outcome(3, (1.0, 1.0))], at(2, epoch=2))
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert again == whole and again.state_dict() == whole.state_dict()
    logprob = [[-0.1 * i] for i in range(20)]
    for policy in (whole, again):
        before = policy.state_dict()
        policy.choose(prompts(range(20)), logprob, 4, at(3), seed=5)
        policy.temperature(prompts([3])[0], 1.0, at(3))
        assert policy.state_dict() == before  # what a copy has decided is not lost with it
    assert whole.choose(prompts(range(20)), logprob, 4, at(3), seed=5) == again.choose(
        prompts(range(20)), logprob, 4, at(3), seed=5
    )
