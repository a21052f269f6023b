"""The diagnostics: numbers by hand, float64 oracles, the order of the tokens, and what the definitions promise."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from entcov.diagnostics import (
    CLASSES,
    TOP_SHARES,
    Calibration,
    calibration,
    entropy_by_position,
    entropy_change,
    group_answers,
    solved_shares,
    token_classes,
    token_metrics,
    top_covariance,
)
from entcov.verify import reference


def rollout(tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Columns of made-up tokens in responses of 1 to 40 tokens."""
    draw = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 41, (tokens,), generator=draw)
    return {
        "logprob": -torch.rand(tokens, generator=draw) * 3,
        "entropy": torch.rand(tokens, generator=draw) * 2,
        "entropy_drift": torch.randn(tokens, generator=draw),
        "advantage": torch.randint(-1, 2, (tokens,), generator=draw).float() * torch.rand(tokens, generator=draw),
        "covariance": torch.randn(tokens, generator=draw) ** 3,
        "position": (torch.rand(tokens, generator=draw) * length).long(),
        "length": length,
    }


def test_top_covariance_by_hand():
    """Of ten tokens the smallest shares are the largest token, 20 percent two and 50 percent five."""
    found = top_covariance(torch.tensor([3.0, -5, 1, 10, 0, 2, -1, 4, -2, 6]))
    assert {share: float(mean) for share, mean in found.items()} == {0.0002: 10, 0.002: 10, 0.02: 10, 0.2: 8, 0.5: 5}
    assert float(top_covariance(torch.zeros(1))[0.5]) == 0


@pytest.mark.parametrize("tokens", [500, 5000, 20_001])
def test_top_covariance_against_sorting_in_float64(tokens):
    covariance = rollout(tokens)["covariance"]
    largest = np.sort(covariance.double().numpy())[::-1]
    counts = {500: (1, 1, 10, 100, 250), 5000: (1, 10, 100, 1000, 2500), 20_001: (5, 41, 401, 4001, 10_001)}[tokens]
    for share, count in zip(TOP_SHARES, counts, strict=True):
        assert float(top_covariance(covariance)[share]) == pytest.approx(largest[:count].mean(), abs=1e-10)


def test_token_classes_by_hand():
    """Probability 1/2 is likely; advantage 0 is in no class. The changes are -3, 1, -1, 3 of sizes that sum to 8."""
    p = torch.tensor([0.5, 0.9, 0.4, 0.6, 0.1, 0.2, 0.9])
    drift = torch.tensor([-1.0, -0.5, 0.5, 1.0, -1.5, 0.0, 7.0])
    advantage = torch.tensor([2.0, 2.0, 2.0, -1.0, -2.0, -1.0, 0.0])
    found = token_classes(p.log(), drift, advantage)
    assert {name: (float(a), float(b)) for name, (a, b) in found.items()} == {
        "rewarded_likely": (pytest.approx(2 / 7), -3 / 8),
        "rewarded_unlikely": (pytest.approx(1 / 7), 1 / 8),
        "punished_likely": (pytest.approx(1 / 7), -1 / 8),
        "punished_unlikely": (pytest.approx(2 / 7), 3 / 8),
    }
    assert float(token_classes(p.log(), drift, advantage, likely=0.3)["rewarded_likely"][0]) == pytest.approx(3 / 7)
    nothing = token_classes(p.log(), drift, 0 * advantage)
    assert all(float(tokens) == 0 and math.isnan(change) for tokens, change in nothing.values())


def test_entropy_by_position_by_hand():
    """The middles of three places are at 1/6, 1/2 and 5/6: the first part of three holds the first, and so on."""
    entropy, position = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]), torch.tensor([0, 1, 2, 0, 0])
    length = torch.tensor([3, 3, 3, 1, 2])
    means = entropy_by_position(entropy, position, length, bins=3)
    assert means.tolist() == [(1 + 20) / 2, (2 + 10) / 2, 3]
    tenths = entropy_by_position(entropy, position, length)
    assert [i for i, mean in enumerate(tenths.tolist()) if not math.isnan(mean)] == [1, 2, 5, 8]


def test_no_order_of_the_tokens_changes_a_bit_and_the_metrics_are_complete():
    columns = rollout(3000)
    found = token_metrics(**columns)
    assert len(found) == len(TOP_SHARES) + 2 * len(CLASSES) + 10
    shuffled = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    assert token_metrics(**{name: column[shuffled] for name, column in columns.items()}) == found
    parts = [found[f"token_classes/{name}/change"] for name in CLASSES]
    assert sum(map(abs, parts)) == pytest.approx(1)
    change = (columns["entropy_drift"] * columns["advantage"]).double()
    likely, rewarded = columns["logprob"].double() >= math.log(0.5), columns["advantage"] > 0
    sums = {f"{r}_{k}": float(change[(rewarded == (r == "rewarded")) & (likely == (k == "likely"))].sum())
            for r in ("rewarded", "punished") for k in ("likely", "unlikely")}  # fmt: skip
    total = sum(map(abs, sums.values()))
    assert parts == pytest.approx([sums[name] / total for name in CLASSES], abs=1e-6)
    few = token_metrics(**{name: column[:1] for name, column in columns.items()})
    assert sum(name.startswith("entropy_by_position/") for name in few) == 1  # parts without a token are left out


def policies(seed: int, size: float, states: int = 6, actions: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    old = 3 * torch.randn(states, actions, generator=draw, dtype=torch.float64)
    return old, old + size * torch.randn(states, actions, generator=draw, dtype=torch.float64)


def every_token(old: torch.Tensor, new: torch.Tensor, rollout: torch.Tensor):
    """(predicted, measured) [states, actions] of every token that could have been sampled."""
    before, after, sampler = (reference.log_probs(logits) for logits in (old, new, rollout))
    entropies = (reference.entropy_of(x)[:, None].expand_as(x).flatten() for x in (after, before))
    entropy, old_entropy = entropies
    found = entropy_change(
        after.flatten(), entropy, old_logprob=before.flatten(), old_entropy=old_entropy,
        rollout_logprob=sampler.flatten(),
    )  # fmt: skip
    return [x.view(old.shape) for x in found]


@pytest.mark.parametrize("size", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("off_policy", [0.0, 0.5])
def test_the_expected_prediction_is_the_covariance_of_the_logits_change(size, off_policy):
    """Exactly, for changes of any size, whatever policy has sampled: every token is weighted by its probability."""
    old, new = policies(0, size)
    sampler = old + off_policy * policies(1, 1.0)[0]
    predicted, measured = every_token(old, new, sampler)
    exact = reference.logit_covariance(old, new)
    p = sampler.softmax(-1)
    torch.testing.assert_close((p * predicted).sum(-1), exact["predicted_entropy_change"], atol=1e-12, rtol=1e-10)
    for column in measured.T:
        torch.testing.assert_close(column, exact["entropy_change"], atol=1e-12, rtol=1e-10)


def test_a_token_s_prediction_errs_by_the_square_of_the_change():
    """Half the change, a quarter of the spread: means over few tokens tell the first order from the second."""
    spread = []
    for size in (0.02, 0.01, 0.005):
        predicted, measured = every_token(*policies(3, size), policies(3, 0.0)[0])
        spread.append(float((predicted - measured).abs().max()))
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.1) and spread[1] / spread[2] == pytest.approx(4, rel=0.1)


def test_solved_shares_by_hand():
    right = torch.tensor([True, False, True, True, False, False, False, True])
    group = torch.tensor([9, 9, 4, 4, 7, 7, 7, 1])
    assert solved_shares(right, group) == {"none": 1 / 4, "some": 1 / 4, "all": 1 / 2}


def test_group_answers_by_hand():
    """Groups by rising number: 2 has no answer in one of four responses; 5 a tie, of which the first counts; 8 none."""
    answer = ["x", "3", "y", "4", None, "3", "x", "y", None]
    group = torch.tensor([5, 2, 5, 2, 2, 2, 5, 5, 8])
    right = torch.tensor([True, True, False, False, False, True, False, False, False])
    found = group_answers(answer, right, group)
    assert found.distinct.tolist() == [2, 2, 0]
    assert found.confidence.tolist() == [2 / 4, 2 / 4, 0]
    assert found.accuracy.tolist() == [1.0, 0.5, 0.0]


def test_calibration_by_hand():
    """0.1 is in the first bin with 0, 0.3 = 3/10 in the third, 0.31 in the fourth with 0.4, 1 in the last."""
    confidence = torch.tensor([0.0, 0.1, 3 / 10, 0.31, 0.4, 1.0], dtype=torch.float64)
    accuracy = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    found = calibration(confidence, accuracy)
    assert [count for count, _, _ in found.bins] == [2, 1, 2, 1]
    assert found.bins[0] == pytest.approx((2, 0.05, 0.5)) and found.bins[2] == pytest.approx((2, 0.355, 0.75))
    assert found.ece == pytest.approx((2 * 0.45 + 0.3 + 2 * 0.395 + 0) / 6)
    assert found.confidence == pytest.approx(2.11 / 6) and found.accuracy == pytest.approx(3.5 / 6)


def test_calibration_against_the_definition():
    draw = np.random.default_rng(0)
    size = 24
    confidence = draw.integers(0, size + 1, 4000) / size
    accuracy = (draw.random(4000) < confidence**2).astype(float)
    bins = [[i for i in range(4000) if c / 10 < confidence[i] <= (c + 1) / 10 or (c == 0 and confidence[i] == 0)]
            for c in range(10)]  # fmt: skip
    expected = sum(abs(accuracy[own].sum() - confidence[own].sum()) for own in bins) / 4000
    found = calibration(torch.tensor(confidence), torch.tensor(accuracy))
    assert found.ece == pytest.approx(expected, abs=1e-12) and 0.1 < found.ece < 0.2  # E[c - c^2] = 1/6
    honest = calibration(torch.tensor(confidence), torch.tensor((draw.random(4000) < confidence).astype(float)))
    assert honest.ece < 0.03 and Counter(map(len, honest.bins)) == {3: 10}


ONES, NONE = torch.ones(3), torch.ones(0)
BAD = {
    "no token": (lambda: top_covariance(NONE), ValueError, "covariance must have at least one entry, got none"),
    "NaN": (lambda: top_covariance(ONES * torch.nan), ValueError, "covariance must be finite: 3 of 3 values are not"),
    "integers": (lambda: top_covariance(ONES.long()), TypeError, "covariance must be torch.float32 or torch.float64"),
    "other shapes": (lambda: token_classes(ONES, ONES[:2], ONES), ValueError, r"entropy_drift must have shape \(3,\)"),
    "a percent": (lambda: token_classes(ONES, ONES, ONES, likely=50), ValueError, r"likely must be in \[0, 1\]"),
    "a threshold of 0": (lambda: token_classes(ONES, ONES, ONES, likely=0), ValueError, "likely must be greater"),
    "a place behind the end": (
        lambda: entropy_by_position(ONES, torch.tensor([0, 1, 3]), torch.tensor([3, 3, 3])), ValueError,
        r"position must be in \[0, length\) for every token: 1 of 3 are not \(first: \[2\] is 3 of 3\)",
    ),
    "no bins": (
        lambda: entropy_by_position(ONES, 0 * ONES.long(), ONES.long(), bins=0), ValueError, "bins must be at least 1",
    ),
    "old of another length": (
        lambda: entropy_change(ONES, ONES, old_logprob=ONES[:1], old_entropy=ONES, rollout_logprob=ONES), ValueError,
        r"old_logprob must have shape \(3,\)",
    ),
    "answers missing": (
        lambda: group_answers(["1"], ONES.bool(), ONES.long()), ValueError,
        "answer must have one entry a response, 3, got 1",
    ),
    "numbers for verdicts": (lambda: solved_shares(ONES, ONES.long()), TypeError, "right must be torch.bool"),
    "no response": (lambda: solved_shares(NONE.bool(), NONE.long()), ValueError, "right must have at least one entry"),
    "a confidence above 1": (
        lambda: calibration(ONES * 1.5, ONES), ValueError, r"confidence must be in \[0, 1\], got 1.5 to 1.5",
    ),
    "an accuracy in percent": (
        lambda: calibration(ONES, torch.tensor([0.0, 50, 100])), ValueError, r"accuracy must be .*, got 0 to 100",
    ),
    "no prediction": (lambda: Calibration(()).ece, ValueError, "bins must hold at least one prediction, got none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
