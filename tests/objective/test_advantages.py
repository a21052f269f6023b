"""Advantages: hand-worked numbers, and a loop over groups and tokens as oracle."""

import math
import statistics

import pytest
import torch

from entcov.objective.advantages import ADVANTAGES, dr_grpo, grpo, reinforce_pp, reinforce_pp_baseline, rloo


def one_group(*reward):
    return torch.tensor(reward), torch.zeros(len(reward), dtype=torch.int64), torch.ones(len(reward), dtype=torch.int64)


def test_grpo_hand_values():
    assert grpo(*one_group(1.0, 0.0, 0.0, 0.0)).tolist() == pytest.approx([1.499997] + [-0.499999] * 3, abs=1e-6)
    two_of_eight = grpo(*one_group(1.0, 1.0, *[0.0] * 6))
    assert two_of_eight.tolist() == pytest.approx([1.620182] * 2 + [-0.540061] * 6, abs=1e-6)


def test_rloo_hand_values():
    assert rloo(*one_group(1.0, 0.0, 0.0, 0.0)).tolist() == pytest.approx([1.0] + [-1 / 3] * 3, rel=1e-7)


def test_dr_grpo_hand_values():
    assert dr_grpo(*one_group(1.0, 0.0, 0.0, 0.0)).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_reinforce_pp_hand_values():
    """Rewards 1, 0 with 3 and 1 tokens: mean 3/4 over the four tokens, unbiased variance 1/4."""
    reward, group, length = torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.tensor([3, 1])
    sd = math.sqrt(0.25 + 1e-8)
    assert reinforce_pp(reward, group, length).tolist() == pytest.approx([0.25 / sd, -0.75 / sd], rel=1e-6)
    # With the group mean 1/2 taken off first the spread is the same: +-1/2 over 3 and 1 tokens.
    together = reinforce_pp_baseline(reward, torch.tensor([7, 7]), length)
    assert together.tolist() == pytest.approx([0.25 / sd, -0.75 / sd], rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 1.0, -3.7])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_give_exactly_zero(name, value):
    assert not ADVANTAGES[name](*one_group(*[value] * 7)).any()


@pytest.mark.parametrize("name, expected", [("grpo", 2.0 / (1 + 1e-6)), ("dr_grpo", 2.0), ("rloo", 2.0)])
def test_singleton_group_keeps_its_reward(name, expected):
    got = ADVANTAGES[name](torch.tensor([2.0, 5.0, 1.0]), torch.tensor([4, 9, 9]), torch.tensor([1, 1, 1]))
    assert float(got[0]) == pytest.approx(expected, rel=1e-7)


def loop_oracle(name, reward, group, length):
    """Python floats, one response and one token at a time."""
    members = {g: [r for r, h in zip(reward, group, strict=True) if h == g] for g in group}
    out = []
    for r, g in zip(reward, group, strict=True):
        others = members[g]
        mean = statistics.fmean(others) if len(others) > 1 else 0.0
        if name == "grpo":
            out.append((r - mean) / ((statistics.stdev(others) if len(others) > 1 else 1.0) + 1e-6))
        elif name == "rloo":
            out.append(r - (sum(others) - r) / (len(others) - 1) if len(others) > 1 else r)
        else:
            out.append(r if name == "reinforce_pp" else r - mean)
    if name.startswith("reinforce"):
        tokens = [v for v, n in zip(out, length, strict=True) for _ in range(n)]
        mean, variance = statistics.fmean(tokens), statistics.variance(tokens)
        out = [(v - mean) / math.sqrt(variance + 1e-8) for v in out]
    return out


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_matches_loop_for_groups_in_any_order(name):
    g = torch.Generator().manual_seed(0)
    group = torch.tensor([5, -2, 5, 900, -2, 5, 10**12, 900, 5, -2])  # sizes 4, 3, 2, 1
    reward = torch.randn(10, generator=g)
    length = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 5, 3])
    got = ADVANTAGES[name](reward, group, length)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(loop_oracle(name, reward.tolist(), group.tolist(), length.tolist()), rel=2e-6)
    order = torch.randperm(10, generator=g)
    assert torch.allclose(ADVANTAGES[name](reward[order], group[order], length[order]), got[order], rtol=1e-6)


def test_whitening_is_over_tokens_not_responses():
    reward, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 1])
    advantage = reinforce_pp(reward, group, torch.tensor([90, 10]))
    assert float(90 * advantage[0] + 10 * advantage[1]) == pytest.approx(0.0, abs=1e-4)
    assert float(advantage[0]) == pytest.approx(0.1 / math.sqrt(0.09 * 100 / 99), rel=1e-5)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_errors(name):
    call, one = ADVANTAGES[name], torch.tensor([1, 1])
    with pytest.raises(ValueError, match="reward must be finite: 1 of 2 values are not .first: .1. is nan"):
        call(torch.tensor([1.0, math.nan]), one, one)
    with pytest.raises(TypeError, match="group_id must be torch.int64, got torch.float32"):
        call(torch.ones(2), torch.ones(2), one)
    with pytest.raises(TypeError, match="reward must be .*got torch.int64"):
        call(one, one, one)
    with pytest.raises(ValueError, match=r"response_length must have shape \(2,\)"):
        call(torch.ones(2), one, one[:1])
    with pytest.raises(ValueError, match="reward must hold at least one response"):
        call(torch.ones(0), one[:0], one[:0])
    with pytest.raises(ValueError, match="response_length must be at least 0, got -1"):
        call(torch.ones(2), one, -one)


@pytest.mark.parametrize("call", [reinforce_pp, reinforce_pp_baseline])
def test_whitening_needs_two_tokens(call):
    with pytest.raises(ValueError, match="at least 2 tokens to whiten over, got 1"):
        call(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([1, 0]))
