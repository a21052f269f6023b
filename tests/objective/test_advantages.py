"""Advantages: hand-worked numbers, and a loop over groups and tokens as oracle."""

import math
import statistics
from fractions import Fraction

import pytest
import torch

from entcov.objective.advantages import ADVANTAGES, make_estimator
from entcov.objective.responses import Responses
from entcov.objective.tokens import Tokens

PLAIN = ["grpo", "dr_grpo", "qae", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo"]


def advantage(name, reward, group=None, length=None, **knobs):
    """The estimator's values for these rewards, by default of one group and one token each."""
    group = torch.zeros(len(reward), dtype=torch.int64) if group is None else torch.as_tensor(group)
    length = torch.ones(len(reward), dtype=torch.int64) if length is None else torch.as_tensor(length)
    return make_estimator(name, **knobs)(Responses.of(torch.as_tensor(reward), group, length)).value


def test_grpo_hand_values():
    assert advantage("grpo", [1.0, 0, 0, 0]).tolist() == pytest.approx([1.499997] + [-0.499999] * 3, abs=1e-6)
    two_of_eight = advantage("grpo", [1.0, 1.0, *[0.0] * 6])
    assert two_of_eight.tolist() == pytest.approx([1.620182] * 2 + [-0.540061] * 6, abs=1e-6)


def test_grpo_scales():
    """Groups (1, 0) and (1, 1): the std of all four rewards is 1/2; "none" is dr_grpo."""
    reward, group = [1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]
    batch = advantage("grpo", reward, group, scale_rewards="batch")
    assert batch.tolist() == pytest.approx([0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6), 0.0, 0.0], rel=1e-6)
    assert torch.equal(advantage("grpo", reward, group, scale_rewards="none"), advantage("dr_grpo", reward, group))
    assert advantage("grpo", [3.0], scale_rewards="batch").tolist() == pytest.approx([3.0 / (1 + 1e-6)])
    with pytest.raises(ValueError, match="scale_rewards must be one of group, batch, none; got 'std'"):
        make_estimator("grpo", scale_rewards="std")


def test_qae_hand_values():
    """Eight responses, K = 0.4: the fourth smallest reward is the baseline, 0 up to four right ones, 1 from five on."""
    for right in range(9):
        reward = [1.0] * right + [0.0] * (8 - right)
        std = statistics.stdev(reward) + 1e-6
        hard = [1 / std] * right + [0.0] * (8 - right)  # right ones alone
        easy = [0.0] * right + [-1 / std] * (8 - right)
        expected = hard if right / 8 <= 0.6 else easy
        assert advantage("qae", reward).tolist() == pytest.approx(expected, rel=1e-6), right
    # Groups apart, of several sizes, in any order: (3, 1, 2) has the baseline 2, (5, 4) 4, one response none.
    got = advantage("qae", [3.0, 5.0, 1.0, 9.0, 4.0, 2.0], [2, 7, 2, 1, 7, 2])
    one, half = 1 + 1e-6, math.sqrt(0.5) + 1e-6
    assert got.tolist() == pytest.approx([1 / one, 1 / half, -1 / one, 9 / one, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.28, 0.3, 0.4, 0.5, 0.7, 0.9])
def test_qae_s_quantile_is_the_smallest_reward_that_enough_do_not_exceed(fraction):
    """inf {v: F(v) >= K} by counting, for sizes where K times the size is a whole number but for rounding, and others;
    the reference's is torch.quantile."""
    for size in (2, 3, 5, 10, 16, 25, 30):
        reward = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(size)).float()
        std = reward.double().std() + 1e-6
        exact = Fraction(str(fraction))
        smallest = min(v for v in reward.tolist() if Fraction(int((reward <= v).sum()), size) >= exact)
        got = advantage("qae", reward, quantile_k=fraction)
        torch.testing.assert_close(got, ((reward.double() - smallest) / std).float(), rtol=1e-6, atol=1e-7)
        linear = torch.quantile(reward.double(), fraction)
        got = advantage("qae", reward, quantile_k=fraction, semantics="reference")
        torch.testing.assert_close(got, ((reward.double() - linear) / std).float(), rtol=1e-5, atol=1e-6)


def test_qae_s_two_readings_agree_on_groups_of_16():
    for right in range(17):
        reward = [1.0] * right + [0.0] * (16 - right)
        assert torch.equal(advantage("qae", reward), advantage("qae", reward, semantics="reference"))
    five_of_eight = [1.0] * 5 + [0.0] * 3
    assert (advantage("qae", five_of_eight)[:5] == 0).all()
    assert (advantage("qae", five_of_eight, semantics="reference") != 0).all()
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"quantile_k must be greater than 0 and less than 1, got {bad}"):
            make_estimator("qae", quantile_k=bad)
    with pytest.raises(ValueError, match="semantics must be one of paper, reference; got 'linear'"):
        make_estimator("qae", semantics="linear")


def test_rloo_hand_values():
    assert advantage("rloo", [1.0, 0, 0, 0]).tolist() == pytest.approx([1.0] + [-1 / 3] * 3, rel=1e-7)


def test_gpg_hand_values():
    """Groups (1, 0), (1, 1), (0, 0) and 2 alone: three of seven have a gradient, four a reward."""
    reward, group = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 2.0], [0, 0, 1, 1, 2, 2, 3]
    paper = advantage("gpg", reward, group)
    assert paper.tolist() == pytest.approx([7 / 6, -7 / 6, 0, 0, 0, 0, 14 / 3])
    assert advantage("gpg", reward, group, semantics="reference").tolist() == pytest.approx(
        [7 / 8, -7 / 8, 0, 0, 0, 0, 14 / 4]
    )
    assert advantage("gpg", [0.0, 0.0]).tolist() == [0.0, 0.0] == advantage("gpg", [1.0, 1.0]).tolist()
    with pytest.raises(ValueError, match="semantics must be one of paper, reference; got 'verl'"):
        make_estimator("gpg", semantics="verl")


def test_dr_grpo_hand_values():
    assert advantage("dr_grpo", [1.0, 0, 0, 0]).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_reinforce_pp_hand_values():
    """Rewards 1, 0 with 3 and 1 tokens: mean 3/4 over the four tokens, unbiased variance 1/4."""
    sd = math.sqrt(0.25 + 1e-8)
    alone = advantage("reinforce_pp", [1.0, 0.0], [0, 1], [3, 1])
    assert alone.tolist() == pytest.approx([0.25 / sd, -0.75 / sd], rel=1e-6)
    # With the group mean 1/2 taken off first the spread is the same: +-1/2 over 3 and 1 tokens.
    together = advantage("reinforce_pp_baseline", [1.0, 0.0], [7, 7], [3, 1])
    assert together.tolist() == pytest.approx([0.25 / sd, -0.75 / sd], rel=1e-6)


def test_opo_hand_values():
    """Rewards 1, 0 with 3 and 1 tokens: the baseline is 3/4; a group of one has none."""
    assert advantage("opo", [1.0, 0.0, 5.0], [0, 0, 1], [3, 1, 2]).tolist() == [0.25, -0.75, 5.0]


def test_remax_hand_values():
    table = Responses.of(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="baseline of the responses must be given for the advantage remax, got None"):
        make_estimator("remax")(table)
    table.baseline = torch.tensor([1.0, 1.0, 0.25])
    assert make_estimator("remax")(table).value.tolist() == [0.0, -1.0, 0.75]


def test_grpo_passk_hand_values():
    """(3, 1, 0, 0): the best has 3 - 1 over the std sqrt(2); two equal best have 0."""
    reward, group = [3.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 0, 1, 1, 1]
    expected = [2.0 / (math.sqrt(2.0) + 1e-6)] + [0.0] * 6
    assert advantage("grpo_passk", reward, group).tolist() == pytest.approx(expected, rel=1e-6)
    assert advantage("grpo_passk", reward, group, scale_rewards="none").tolist() == [2.0] + [0.0] * 6


def test_gdpo_hand_values():
    """Two components of scales 1 and 100 in a group: each is normalised alone, then the weighted sum is whitened."""
    length = torch.tensor([2, 1, 1])
    components = {"format": torch.tensor([100.0, 0.0, 0.0]), "right": torch.tensor([0.0, 1.0, 0.0])}
    table = Responses.of(components["format"] + components["right"], torch.zeros(3, dtype=torch.int64), length)
    with pytest.raises(ValueError, match="components of the responses must be given .* must return a dict"):
        make_estimator("gdpo")(table)
    table.components = components

    def normalised(values):
        return [(v - statistics.fmean(values)) / (statistics.stdev(values) + 1e-6) for v in values]

    for weights in (None, {"format": 0.5, "right": 2.0}):
        w, v = (weights or {"format": 1.0, "right": 1.0}), [normalised(components[n].tolist()) for n in components]
        total = [w["format"] * a + w["right"] * b for a, b in zip(*v, strict=True)]
        tokens = [total[0], *total]
        mean, variance = statistics.fmean(tokens), statistics.variance(tokens)
        got = make_estimator("gdpo", weights=weights)(table).value.tolist()
        assert got == pytest.approx([(x - mean) / math.sqrt(variance + 1e-8) for x in total], rel=1e-6)
    with pytest.raises(ValueError, match="weights must name the components format, right, got right, wrong"):
        make_estimator("gdpo", weights={"right": 1.0, "wrong": 1.0})(table)
    with pytest.raises(TypeError, match="weights.right must be a number, got 'x'"):
        make_estimator("gdpo", weights={"right": "x"})


def test_maxrl_hand_values():
    """k of n correct: (n - k) / k and -1, up to the 1e-6 in the division; a group without reward has 0."""
    got = advantage("maxrl", [1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1])
    assert got.tolist() == pytest.approx([3.0, -1, -1, -1, 0, 0], rel=1e-5)
    with pytest.raises(ValueError, match="reward must be at least 0 for the advantage maxrl, got -1"):
        advantage("maxrl", [1.0, -1.0])


@pytest.mark.parametrize("name", ["grpo_passk", "maxrl"])
def test_smallest_group(name):
    with pytest.raises(ValueError, match=f"at least 2 responses for the advantage {name}, group 9 has 1"):
        advantage(name, [1.0, 0.0, 0.5], [4, 4, 9])


def test_positive_and_negative_sample_reinforcement():
    """Hand values of RLVR-Decomposed with a shaped reward: A = R, R - 1, and 0.1 R beside R - 1."""
    score, reward = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, -0.5, 0.75])
    table = Responses.of(score, torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.int64))
    table.reward = reward
    psr, nsr, both = (make_estimator(name)(table) for name in ("psr", "nsr", "w_reinforce"))
    assert (psr.value.tolist(), psr.keep.tolist()) == ([1.0, 0.0, 0.75], [True, False, True])
    assert (nsr.value.tolist(), nsr.keep.tolist()) == ([0.0, -1.5, 0.0], [False, True, False])
    assert both.value.tolist() == pytest.approx([0.1, -1.5, 0.075]) and both.keep is None
    assert make_estimator("w_reinforce", weight=0.0)(table).value.tolist() == [0.0, -1.5, 0.0]
    table.score = torch.tensor([1.0, 0.25, 1.0])
    for name in ("psr", "nsr", "w_reinforce"):
        with pytest.raises(ValueError, match=f"score must be 0 or 1 for the advantage {name}, .* got 0.25"):
            make_estimator(name)(table)
    with pytest.raises(ValueError, match="weight must be in .* got -0.1"):
        make_estimator("w_reinforce", weight=-0.1)


# ---- the optimal token baseline --------------------------------------------------------------------------------------


def path_tokens(sequence, position, logprob, collision):
    n = len(sequence)
    return Tokens(
        torch.tensor(logprob), torch.tensor(logprob), torch.zeros(n), torch.ones(n, dtype=torch.bool),
        collision=torch.tensor(collision), sequence=torch.tensor(sequence), position=torch.tensor(position),
    )  # fmt: skip


def test_optimal_token_baseline_hand_values():
    """Two responses of a group, 2 and 1 tokens: energies 1 - 2 pi + c: 0.5, 0.25, 1.5, so paths 0.5, 0.75 and 1.5."""
    table = Responses.of(torch.tensor([1.0, 0.0, 4.0]), torch.tensor([3, 3, 8]), torch.tensor([2, 1, 1]))
    logs = [math.log(0.5), math.log(0.75), math.log(0.125), math.log(0.5)]
    tokens = path_tokens([0, 0, 1, 2], [0, 1, 0, 0], logs, [0.5, 0.75, 0.75, 0.5])
    first = 0.5 / 2.0  # (1 * 0.5 + 0 * 1.5) / (0.5 + 1.5); at the second token the first response is alone
    expected = [1 - first, 0.0, -first, 4.0]
    assert make_estimator("optimal_token_baseline")(table, tokens).value.tolist() == pytest.approx(expected, abs=1e-6)
    tail = make_estimator("optimal_token_baseline", handle_zero_tail=True)(table, tokens).value
    assert tail.tolist() == pytest.approx([1 - first, 1.0, -first, 4.0], abs=1e-6)


def test_optimal_token_baseline_matches_a_loop_in_any_order():
    g = torch.Generator().manual_seed(0)
    length = [3, 5, 1, 4, 2, 2]
    group, number = torch.tensor([1, 1, 1, 0, 0, 7]), torch.tensor([4, 0, 9, 2, 3, 5])
    reward = torch.randn(6, generator=g)
    table = Responses(reward, reward, group, torch.tensor(length), number, torch.zeros_like(number))
    sequence = [int(n) for n, k in zip(number, length, strict=True) for _ in range(k)]
    position = [t for k in length for t in range(k)]
    p, c = torch.rand(17, generator=g) * 0.9 + 0.05, torch.rand(17, generator=g)
    order = torch.randperm(17, generator=g)
    tokens = path_tokens(*([x[i] for i in order] for x in (sequence, position, p.log().tolist(), c.tolist())))
    got = make_estimator("optimal_token_baseline")(table, tokens).value
    starts = [sum(length[:b]) for b in range(6)]
    path = {(b, t): sum(1 - 2 * float(p[starts[b] + j]) + float(c[starts[b] + j]) for j in range(t + 1))
            for b in range(6) for t in range(length[b])}  # fmt: skip
    expected = []
    for b in range(6):
        for t in range(length[b]):
            others = [o for o in range(6) if group[o] == group[b] and t < length[o]]
            baseline = sum(float(reward[o]) * path[o, t] for o in others) / (sum(path[o, t] for o in others) + 1e-8)
            expected.append(float(reward[b]) - (baseline if (group == group[b]).sum() > 1 else 0.0))
    assert got.tolist() == pytest.approx([expected[i] for i in order], rel=1e-5, abs=1e-6)


def test_optimal_token_baseline_names_what_is_missing():
    table = Responses.of(torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    tokens = path_tokens([3], [0], [-1.0], [0.5])
    with pytest.raises(ValueError, match="sequence must hold numbers of the responses, got 3"):
        make_estimator("optimal_token_baseline")(table, tokens)
    tokens.collision = None
    with pytest.raises(ValueError, match="tokens.collision must be given, the advantage optimal_token"):
        make_estimator("optimal_token_baseline")(table, tokens)
    with pytest.raises(TypeError, match="handle_zero_tail must be true or false, got 1"):
        make_estimator("optimal_token_baseline", handle_zero_tail=1)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, 1.0, -3.7])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "qae", "rloo", "opo"])
def test_equal_rewards_give_exactly_zero(name, value):
    assert not advantage(name, [value] * 7, length=[3, 1, 40, 7, 7, 2, 11]).any()


@pytest.mark.parametrize("name, expected", [("grpo", 2.0 / (1 + 1e-6)), ("dr_grpo", 2.0), ("rloo", 2.0), ("opo", 2.0)])
def test_singleton_group_keeps_its_reward(name, expected):
    assert float(advantage(name, [2.0, 5.0, 1.0], [4, 9, 9])[0]) == pytest.approx(expected, rel=1e-7)


def loop_oracle(name, reward, group, length):
    """Python floats, one response and one token at a time."""
    members = {g: [r for r, h in zip(reward, group, strict=True) if h == g] for g in group}
    out = []
    for r, g in zip(reward, group, strict=True):
        others = members[g]
        mean = statistics.fmean(others) if len(others) > 1 else 0.0
        if name == "grpo":
            out.append((r - mean) / ((statistics.stdev(others) if len(others) > 1 else 1.0) + 1e-6))
        elif name == "qae":
            baseline = sorted(others)[math.ceil(0.4 * len(others)) - 1] if len(others) > 1 else 0.0
            out.append((r - baseline) / ((statistics.stdev(others) if len(others) > 1 else 1.0) + 1e-6))
        elif name == "opo":
            own = [(x, k) for x, k, h in zip(reward, length, group, strict=True) if h == g]
            out.append(r - (sum(x * k for x, k in own) / sum(k for _, k in own) if len(own) > 1 else 0.0))
        elif name == "rloo":
            out.append(r - (sum(others) - r) / (len(others) - 1) if len(others) > 1 else r)
        else:
            out.append(r if name == "reinforce_pp" else r - mean)
    if name.startswith("reinforce"):
        tokens = [v for v, n in zip(out, length, strict=True) for _ in range(n)]
        mean, variance = statistics.fmean(tokens), statistics.variance(tokens)
        out = [(v - mean) / math.sqrt(variance + 1e-8) for v in out]
    return out


@pytest.mark.parametrize("name", PLAIN)
def test_matches_loop_for_groups_in_any_order(name):
    g = torch.Generator().manual_seed(0)
    group = torch.tensor([5, -2, 5, 900, -2, 5, 10**12, 900, 5, -2])  # sizes 4, 3, 2, 1
    reward = torch.randn(10, generator=g)
    length = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 5, 3])
    got = advantage(name, reward, group, length)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(loop_oracle(name, reward.tolist(), group.tolist(), length.tolist()), rel=2e-6)
    order = torch.randperm(10, generator=g)
    assert torch.allclose(advantage(name, reward[order], group[order], length[order]), got[order], rtol=1e-6)


def test_whitening_is_over_tokens_not_responses():
    got = advantage("reinforce_pp", [1.0, 0.0], [0, 1], [90, 10])
    assert float(90 * got[0] + 10 * got[1]) == pytest.approx(0.0, abs=1e-4)
    assert float(got[0]) == pytest.approx(0.1 / math.sqrt(0.09 * 100 / 99), rel=1e-5)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_errors(name):
    one = torch.tensor([1, 1])

    def call(reward, group=one, length=one):
        table = Responses.of(reward, group, length)
        table.baseline, table.components = reward, {"a": reward}
        tokens = path_tokens([0, 1], [0, 0], [-1.0, -1.0], [0.5, 0.5])
        tokens.token_reward = torch.zeros(2)
        return make_estimator(name)(table, tokens)

    assert call(torch.ones(2)).value.shape == (2,)
    with pytest.raises(ValueError, match="reward must be finite: 1 of 2 values are not .first: .1. is nan"):
        call(torch.tensor([1.0, math.nan]))
    with pytest.raises(TypeError, match="group must be torch.int64, got torch.float32"):
        call(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="reward must be .*got torch.int64"):
        call(one)
    with pytest.raises(ValueError, match=r"length must have shape \(2,\)"):
        call(torch.ones(2), one, one[:1])
    with pytest.raises(ValueError, match="reward must hold at least one response"):
        call(torch.ones(0), one[:0], one[:0])
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        call(torch.ones(2), one, -one)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_needs_two_tokens(name):
    with pytest.raises(ValueError, match="at least 2 tokens to whiten over, got 1"):
        advantage(name, [1.0, 0.0], [0, 0], [1, 0])


def test_a_table_keeps_its_columns_in_every_choice():
    table = Responses.of(torch.tensor([1.0, 2.0]), torch.tensor([3, 4]), torch.tensor([5, 6]))
    table.baseline, table.components = torch.tensor([7.0, 8.0]), {"a": torch.tensor([9.0, 10.0])}
    part = table.at(torch.tensor([1])).to("cpu")
    assert (part.reward.item(), part.baseline.item(), part.components["a"].item()) == (2.0, 8.0, 10.0)
    with pytest.raises(ValueError, match=r"components.a must have shape \(1,\)"):
        Responses(*[getattr(part, n) for n in ("reward", "score", "group", "length", "number", "lag")],
                  components={"a": torch.ones(2)})  # fmt: skip
