"""Reward shaping by hand, from the papers' formulas and the numbers of their scripts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from entcov.objective.advantages import GRPO, DrGRPO
from entcov.objective.responses import Responses
from entcov.rl.rewards.shaping import Overlong, Reactivate, RelativeLength, shape_rewards, with_pseudo
from entcov.rl.types import Example, Prompt, Rollout


def group(*responses: tuple[float, int], uid: int = 0) -> list[Rollout]:
    """Of (score, length)."""
    prompt = Prompt(uid, Example("test", (), "1"), (1,))
    return [
        Rollout(prompt, i, [2] * length, [-1.0] * length, True, 0, reward=score)
        for i, (score, length) in enumerate(responses)
    ]


def test_overlong_is_linear_over_the_buffer():
    """DAPO's runs: nothing up to 16384 of 20480 tokens, -1/2 in the middle of the buffer, -1 at the limit."""
    lengths = [(1.0, n) for n in (1, 16384, 16385, 18432, 20479, 20480)]
    expected = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1]
    assert Overlong().bonus(group(*lengths), max_response_length=20480) == pytest.approx(expected)
    assert Overlong(buffer=4, factor=0.5).bonus(group((0.0, 9), (1.0, 7)), max_response_length=10) == [-0.375, -0.125]
    assert Overlong(buffer=10).bonus(group((0.0, 5)), max_response_length=10) == [-0.5]
    with pytest.raises(ValueError, match="buffer: must be at most rollout.max_response_length = 10, got 11"):
        Overlong(buffer=11).bonus(group((0.0, 9)), max_response_length=10)


def test_relative_length_compares_right_responses_with_their_mean():
    """Mean of 100, 500 and 3000 is 1200: (1200 - n) / 500 in [-0.5, 1]; the wrong one gets nothing."""
    responses = group((1.0, 100), (1.0, 500), (0.0, 5), (1.0, 3000))
    assert RelativeLength().bonus(responses, max_response_length=4096) == [1.0, 1.0, 0.0, -0.5]
    slow = RelativeLength(length_base=4000.0)
    assert slow.bonus(responses, max_response_length=4096) == pytest.approx([0.275, 0.175, 0, -0.45])
    # Three of four are right, which is the threshold itself; two of four are not enough.
    half = group((1.0, 100), (0.0, 500), (0.0, 5), (1.0, 3000))
    assert RelativeLength().bonus(half, max_response_length=4096) == [0.0] * 4
    assert RelativeLength(corr_ratio=0.0).bonus(group((0.0, 3), (0.5, 9)), max_response_length=4096) == [0.0, 0.0]


def test_shaped_rewards_add_up_and_scores_stay():
    rollouts = group((1.0, 2), (1.0, 10), uid=4) + group((0.0, 10), (0.0, 4), uid=9)
    shapings = [Overlong(buffer=4), RelativeLength(length_base=8.0)]
    metrics = shape_rewards(shapings, rollouts, max_response_length=10)
    assert [r.shaped_reward for r in rollouts] == pytest.approx([1 + 0.5, 1 - 1 - 0.5, -1, 0])
    assert [r.reward for r in rollouts] == [1, 1, 0, 0]
    assert metrics == pytest.approx({"critic/shaping/overlong": -0.5, "critic/shaping/rlr": 0.0})
    shape_rewards(shapings[::-1], rollouts, max_response_length=10)  # again, in another order: nothing is added twice
    assert [r.shaped_reward for r in rollouts] == pytest.approx([1 + 0.5, 1 - 1 - 0.5, -1, 0])
    assert shape_rewards([], rollouts, max_response_length=10) == {}
    assert [r.shaped_reward for r in rollouts] == [1, 1, 0, 0]


@pytest.mark.parametrize("pseudo", [0.0, -1.0])
def test_reactivate_gives_all_right_groups_an_advantage(pseudo):
    """With one more response of another reward GRPO gives each of the G 1 / sqrt(G + 1), whatever that reward is."""
    score = torch.tensor([1.0] * 8 + [1.0, 0.0, 1.0, 0.0] + [0.0] * 4)
    groups = torch.tensor([5] * 8 + [3] * 4 + [9] * 4)
    plain = Responses.of(score, groups, torch.full((16,), 7))
    plain = replace(plain, baseline=score, components={"a": score})
    table = with_pseudo([Reactivate(pseudo_reward=pseudo)], plain)
    assert table.reward.tolist() == [*score.tolist(), pseudo] and table.group[-1] == 5 and table.length[-1] == 0
    advantage = GRPO()(table).value[:16]
    assert advantage[:8].tolist() == pytest.approx([1 / math.sqrt(9)] * 8, rel=1e-5)
    assert torch.equal(advantage[8:], GRPO()(plain).value[8:])
    centred = DrGRPO()(table).value[:16]
    assert centred[:8].tolist() == pytest.approx([(1 - pseudo) / 9] * 8)
    assert with_pseudo([Overlong()], plain) is plain
