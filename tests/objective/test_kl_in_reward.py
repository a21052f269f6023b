"""KL in the reward: sums over responses by hand, and the trace of the controller."""

import math

import pytest
import torch

from entcov.objective.kl_in_reward import KLInReward
from entcov.objective.tokens import Tokens


def tokens(old, reference, sequence):
    n = len(old)
    return Tokens(
        torch.zeros(n), torch.tensor(old), torch.zeros(n), torch.ones(n, dtype=torch.bool),
        ref_logprob=torch.tensor(reference), sequence=torch.tensor(sequence),
    )  # fmt: skip


@pytest.mark.parametrize(
    "estimator, kl",
    [
        ("k1", lambda d: -d),
        ("abs", abs),
        ("k2", lambda d: d * d / 2),
        ("k3", lambda d: math.exp(d) - d - 1),
    ],
)
def test_sums_and_means_by_hand(estimator, kl):
    """Responses 3 (d = -1, 0.5) and 8 (d = 2): the sums, and the mean over responses of the means over tokens."""
    total, mean = KLInReward(0.1, estimator).of_responses(tokens([-1.0, -2.0, -3.0], [-2.0, -1.5, -1.0], [3, 3, 8]), 2)
    assert total.dtype == torch.float64
    assert total.tolist() == pytest.approx([kl(-1.0) + kl(0.5), kl(2.0)], rel=1e-12)
    assert mean == pytest.approx(((kl(-1.0) + kl(0.5)) / 2 + kl(2.0)) / 2, rel=1e-12)


def test_controller_trace():
    """Ziegler's: target 6, horizon 1000, 100 responses a step: +2 % above, -2 % below, in proportion near it."""
    kl = KLInReward(0.2, target=6.0, horizon=1000)
    coef, trace = 0.2, []
    for seen in (60.0, 6.6, 6.0, 0.0):
        coef = kl.adapted(coef, seen, 100)
        trace.append(coef)
    assert trace == pytest.approx([0.204, 0.204 * 1.01, 0.204 * 1.01, 0.204 * 1.01 * 0.98], rel=1e-12)
    assert KLInReward(0.2).adapted(0.2, 60.0, 100) == 0.2


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"coef": -0.1}, "coef must be in .* got -0.1"),
        ({"coef": 0.1, "estimator": "k3+"}, r"estimator must be one of k1, abs, k2, k3; got 'k3\+'"),
        ({"coef": 0.1, "target": 0.0}, "target must be greater than 0, got 0.0"),
        ({"coef": 0.1, "target": 1.0, "horizon": 0}, "horizon must be at least 1, got 0"),
        ({"estimator": "k3"}, "estimator has no effect without coef, got 'k3' and coef 0"),
        ({"target": 0.1}, "target has no effect without coef"),
        ({"coef": 0.1, "horizon": 5}, "horizon has no effect without target, got 5 and target None"),
    ],
)
def test_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        KLInReward(**knobs)


def test_a_response_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="tokens must be of 3 responses, got 2"):
        KLInReward(0.1).of_responses(tokens([-1.0, -1.0], [-1.0, -1.0], [0, 2]), 3)
