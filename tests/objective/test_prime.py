"""PRIME's token rewards and advantages: a group worked by hand, loops over responses as oracle, and bad input."""

import math
import statistics

import pytest
import torch

from entcov.objective.advantages import Prime
from entcov.objective.prime import ordered_pairs, outcome_loss, prime_advantage, token_rewards
from entcov.objective.responses import Responses
from entcov.objective.tokens import Tokens

# Two responses to one prompt: token rewards, outcomes.
REWARD, OUTCOME, LENGTH = [0.2, 0.0, 0.1, 0.3, 0.0], [1.0, 0.0], [2, 3]
COEFS = {"reward_dpo_coef": 1.0, "reward_gt_coef": 1.0}


def advantage(reward=REWARD, outcome=OUTCOME, group=(4, 4), length=LENGTH, dtype=torch.float64, **knobs):
    parts = torch.tensor(reward, dtype=dtype), torch.tensor(outcome), torch.tensor(group), torch.tensor(length)
    return prime_advantage(*parts, **knobs).tolist()


def whitened(returns):
    sd = math.sqrt(statistics.variance(returns) + 1e-8)
    return pytest.approx([(x - statistics.fmean(returns)) / sd for x in returns], rel=1e-6)


def test_one_group_by_hand():
    """Means over tokens .1 and .4/3, so .7/3 is taken off twice each reward; outcomes 2 - 1 and 0 - 1 at the ends."""
    process = [[0.4 - 0.7 / 3, -0.7 / 3], [0.2 - 0.7 / 3, 0.6 - 0.7 / 3, -0.7 / 3]]
    returns = [sum(process[0]) + 1, process[0][1] + 1, sum(process[1]) - 1, sum(process[1][1:]) - 1, process[1][2] - 1]
    assert returns == pytest.approx([2.8 / 3, 2.3 / 3, -2.7 / 3, -2.6 / 3, -3.7 / 3])
    assert advantage(prime_norm="none", **COEFS) == whitened(returns)


def test_the_norm_divides_by_the_greatest_return_of_token_rewards():
    """.4 = .1 + .3 + 0 of the second response."""
    expected = advantage([x / (0.4 + 1e-6) for x in REWARD], prime_norm="none")
    assert advantage(prime_norm="batch_norm") == advantage() == pytest.approx(expected, rel=1e-6)
    assert advantage([-x for x in REWARD]) == pytest.approx(
        advantage([-x / (0.4 + 1e-6) for x in REWARD], prime_norm="none"), rel=1e-6
    )


def test_without_token_rewards_the_advantage_is_whitened_rloo():
    assert advantage([0.0] * 5) == whitened([1.0, 1.0, -1.0, -1.0, -1.0])


def test_a_group_of_one_keeps_its_rewards():
    alone = advantage([0.5, 0.25], [1.0], [0], [2], prime_norm="none", **COEFS)
    assert alone == whitened([1.75, 1.25])


def oracle(reward, outcome, group, length, dpo, gt, norm):
    """Python floats, one response and one token at a time."""
    starts = [sum(length[:i]) for i in range(len(length))]
    rows = [reward[a : a + n] for a, n in zip(starts, length, strict=True)]
    if norm == "batch_norm":
        scale = max(abs(math.fsum(row[t:])) for row in rows for t in range(len(row))) + 1e-6
        rows = [[x / scale for x in row] for row in rows]
    returns = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if group[j] == group[i] and j != i]
        process, last = list(row), outcome[i]
        if others:
            # leave-one-out for the outcome; for tokens n/(n-1) r_t less the same sum of means, own mean included
            n = len(others) + 1
            means = math.fsum(math.fsum(rows[j]) / len(rows[j]) for j in [i, *others])
            process = [x * n / (n - 1) - means / (n - 1) for x in row]
            last = outcome[i] - math.fsum(outcome[j] for j in others) / len(others)
        steps = [dpo * x for x in process]
        steps[-1] += gt * last
        returns += [math.fsum(steps[t:]) for t in range(len(steps))]
    return whitened(returns)


@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_against_loops_with_groups_of_different_sizes_in_any_order(norm):
    generator = torch.Generator().manual_seed(3)
    group = [7, 2, 7, 5, 2, 7, 7, 9]
    length = torch.randint(1, 9, (8,), generator=generator).tolist()
    outcome = torch.randint(0, 2, (8,), generator=generator).float().tolist()
    reward = (0.1 * torch.randn(sum(length), generator=generator, dtype=torch.float64)).tolist()
    knobs = {"reward_dpo_coef": 5.0, "reward_gt_coef": 2.0, "prime_norm": norm}
    assert advantage(reward, outcome, group, length, **knobs) == oracle(reward, outcome, group, length, 5.0, 2.0, norm)


def test_token_rewards_are_the_scaled_log_ratios_of_all_but_last_tokens():
    ratio = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert token_rewards(ratio, torch.tensor([2, 1, 3]), 0.5).tolist() == [0.5, 0.0, 0.0, 2.0, 2.5, 0.0]


def test_the_outcome_loss_is_binary_cross_entropy():
    logit = torch.tensor([0.0, 2.0, -800.0, 800.0, 0.3], dtype=torch.float64, requires_grad=True)
    outcome = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25], dtype=torch.float64)
    loss, slope = outcome_loss(logit, outcome)
    assert loss[0].item() == pytest.approx(math.log(2)) and slope[0].item() == -0.5
    assert loss[2:4].tolist() == [0.0, 0.0] and slope[2:4].tolist() == [0.0, 0.0]
    p = logit[[0, 1, 4]].sigmoid()
    y = outcome[[0, 1, 4]]
    direct = -(y * p.log() + (1 - y) * (1 - p).log())
    assert loss[[0, 1, 4]].tolist() == pytest.approx(direct.tolist())
    assert slope[[0, 1, 4]].tolist() == pytest.approx(torch.autograd.grad(direct.sum(), logit)[0][[0, 1, 4]].tolist())


def test_ordered_pairs_by_hand():
    """Group 0: (1, 0) right, (1, .5) wrong at half the weight, (0, .5) right at half: 1.5 of 2. Group 1 has no pair."""
    score, outcome = torch.tensor([2.0, 1.0, 3.0, 9.0, 9.0]), torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0])
    assert ordered_pairs(score, outcome, torch.tensor([0, 0, 0, 1, 1])) == (1.5 / 2 + 0.5) / 2
    assert ordered_pairs(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0])) == 0.5  # equal scores


def test_the_estimator_reads_the_tokens_rewards_and_the_shaped_reward():
    nothing = torch.zeros(5)
    tokens = Tokens(nothing, nothing, nothing, nothing == 0, token_reward=torch.tensor(REWARD))
    responses = Responses.of(torch.tensor(OUTCOME), torch.tensor([4, 4]), torch.tensor(LENGTH))
    responses.score = torch.tensor([0.0, 0.0])
    assert Prime(prime_norm="none")(responses, tokens).value.tolist() == pytest.approx(
        advantage(prime_norm="none"), rel=1e-5
    )
    tokens.token_reward = None
    with pytest.raises(ValueError, match=r"tokens.token_reward must be given, the advantage prime reads it; got None"):
        Prime()(responses, tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantage(length=[2, 2]), "length must add up to the 5 tokens of token_reward, got 4"),
        (lambda: advantage([0.0, math.nan, 0.0, 0.0, 0.0]), r"token_reward must be finite.*\[1\] is nan"),
        (lambda: advantage(outcome=[math.inf, 0.0]), "reward must be finite"),
        (lambda: advantage([1.0], [1.0], [0], [1]), "token_reward must hold at least 2 tokens to whiten over, got 1"),
        (lambda: advantage(length=[5, 0]), "length must be at least 1, got 0"),
        (lambda: advantage(prime_norm="batch"), "prime_norm must be one of batch_norm, none; got 'batch'; did you"),
        (lambda: Prime(reward_dpo_coef=-1), r"reward_dpo_coef must be in \[0, 1e\+06\], got -1"),
        (lambda: Prime(0, 0), "reward_dpo_coef and reward_gt_coef must not both be 0"),
        (lambda: outcome_loss(torch.zeros(2), torch.tensor([0.0, -1.0])), r"outcome must be in \[0, 1\].*got -1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
