"""Importance weights between sampler and trainer, and rejection: hand values for every level and mode."""

import math

import pytest
import torch

from entcov.objective.mismatch import RolloutRejection
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens

LN2 = math.log(2)
# Three responses: ratios 2, 2, 1/2 (product 2); 4, 1/2 (product 2); 1/8 (product 1/8).
LOG_RATIO = [LN2, LN2, -LN2, 2 * LN2, -LN2, -3 * LN2]
SEQUENCE = [5, 5, 5, 2, 2, 9]


def batch(mask=(True,) * 6):
    zero = torch.zeros(6, dtype=torch.float64)
    rollout = -torch.tensor(LOG_RATIO, dtype=torch.float64)
    rollout[~torch.tensor(mask)] = torch.nan
    return Tokens(
        zero.clone().requires_grad_(), zero, zero + 1.0, torch.tensor(mask), rollout_logprob=rollout,
        sequence=torch.tensor(SEQUENCE),
    )  # fmt: skip


@pytest.mark.parametrize(
    "knobs, weights, outside",
    [
        ({"tis_cap": 1.5}, [1.5, 1.5, 0.5, 1.5, 0.5, 0.125], 3),
        ({"tis_cap": 3.0, "tis_floor": 0.6}, [2, 2, 0.6, 3, 0.6, 0.6], 4),
        ({"tis_cap": 3.0, "tis_floor": 0.5, "tis_mode": "mask"}, [2, 2, 0.5, 0, 0.5, 0], 2),
        ({"tis_cap": 1.5, "tis_level": "sequence"}, [1.5] * 5 + [0.125], 5),
        ({"tis_cap": 3.0, "tis_level": "sequence", "tis_floor": 0.25}, [2] * 5 + [0.25], 1),
        ({"tis_cap": 3.0, "tis_level": "sequence", "tis_floor": 0.25, "tis_mode": "mask"}, [2] * 5 + [0], 1),
    ],
)
def test_weights_by_hand(knobs, weights, outside):
    """Loss and gradient are the weights', divided by all six tokens: a weight of 0 leaves no denominator."""
    tokens = batch()
    loss, metrics = policy_loss(tokens, PolicyLossConfig(**knobs))
    loss.backward()
    assert tokens.logprob.grad.tolist() == pytest.approx([-w / 6 for w in weights], rel=1e-12)
    assert loss.item() == pytest.approx(-sum(weights) / 6)
    assert float(metrics["actor/tis_weight"]) == pytest.approx(sum(weights) / 6)
    assert float(metrics["actor/tis_capfrac"]) == pytest.approx(outside / 6)


def test_the_weight_of_a_response_is_bounded_in_its_logarithm():
    tokens = batch()
    tokens.rollout_logprob = tokens.rollout_logprob - 15.0  # three tokens: 45 and more
    loss, _ = policy_loss(tokens, PolicyLossConfig(tis_cap=1e30, tis_level="sequence"))
    assert loss.item() == pytest.approx(-(5 * math.exp(20) + math.exp(15) / 8) / 6)


@pytest.mark.parametrize(
    "threshold, with_rollout, masked",
    [
        # mean of -log pi over each response: 0.4, 0.1, 0.5 from the old policy (0); A of the last is positive
        (0.3, False, [1, 0, 1, 0, 0, 0]),
        (0.09, False, [1, 0, 1, 1, 1, 0]),
        (0.4, False, [0, 0, 0, 0, 0, 0]),
        # the sampler's are 1 higher in the second response: 1.1
        (0.5, True, [0, 0, 0, 1, 1, 0]),
    ],
)
def test_off_policy_mask_by_hand(threshold, with_rollout, masked):
    """Tokens with A < 0 of responses that the policy has left lose their gradient, and count in the denominator."""
    make = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    tokens = Tokens(
        make(-0.9, torch.nan, 0.1, -0.3, 0.1, -0.5).requires_grad_(), make(0, 0, 0, 0, 0, 0),
        make(-1, -1, -1, -1, -1, 1), torch.tensor([True, False, True, True, True, True]),
        rollout_logprob=make(0, torch.nan, 0, 1, 1, 0) if with_rollout else None, sequence=torch.tensor(SEQUENCE),
    )  # fmt: skip
    config = dict(clip_low=1.0, clip_high=math.inf)
    plain = torch.autograd.grad(policy_loss(tokens, PolicyLossConfig(**config))[0], tokens.logprob)[0]
    loss, metrics = policy_loss(tokens, PolicyLossConfig(**config, off_policy_mask_threshold=threshold))
    (gradient,) = torch.autograd.grad(loss, tokens.logprob)
    kept = ~torch.tensor(masked).bool()
    assert gradient.tolist() == torch.where(kept, plain, 0.0).tolist() and plain[kept & tokens.loss_mask].all()
    assert float(metrics["actor/off_policy_maskfrac"]) == pytest.approx((~kept & tokens.loss_mask).sum().item() / 5)


@pytest.mark.parametrize(
    "knobs, rejected",
    [
        ({"level": "token", "high": 3.0}, [0, 0, 0, 1, 0, 0]),
        ({"level": "token", "low": 0.3, "high": 3.0}, [0, 0, 0, 1, 0, 1]),
        ({"level": "sequence", "high": 1.9}, [1, 1, 1, 1, 1, 0]),
        ({"level": "sequence", "low": 0.2}, [0, 0, 0, 0, 0, 1]),
        ({"level": "geometric", "high": 1.3}, [0, 0, 0, 1, 1, 0]),  # 2^(1/3) = 1.26 and 2^(1/2) = 1.41
        ({"level": "geometric", "low": 0.2, "high": 1.2}, [1, 1, 1, 1, 1, 1]),
        ({"level": "sequence", "high": 9.0, "veto": 0.6}, [1, 1, 1, 1, 1, 1]),
        ({"level": "sequence", "high": 9.0, "veto": 0.2}, [0, 0, 0, 0, 0, 1]),
        # k2 of 2, 4, 1/8: 0.240, 0.961, 2.162; k3 of 2, 1/2, 4, 1/8: 0.307, 0.193, 1.614, 1.204
        ({"estimator": "k2", "level": "token", "high": 0.5}, [0, 0, 0, 1, 0, 1]),
        ({"estimator": "k3", "level": "token", "high": 0.25}, [1, 1, 0, 1, 0, 1]),
        ({"estimator": "k2", "level": "sequence", "high": 0.75}, [0, 0, 0, 1, 1, 1]),  # 0.721, 1.201, 2.162
        ({"estimator": "k3", "level": "geometric", "high": 0.9}, [0, 0, 0, 1, 1, 1]),  # 0.269, 0.903, 1.204
        ({"estimator": "k3", "level": "geometric", "high": 0.91}, [0, 0, 0, 0, 0, 1]),
        ({"estimator": "k3", "level": "max", "high": 1.5}, [0, 0, 0, 1, 1, 0]),
        ({"estimator": "k2", "level": "max", "high": 1.5, "veto": 0.6}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rejection_by_hand(knobs, rejected):
    assert RolloutRejection(**knobs).rejected(batch()).tolist() == [bool(x) for x in rejected]


def test_tokens_outside_the_mask_decide_nothing():
    """Without its first token the first response has ratios 2 and 1/2: product 1."""
    mask = (False, True, True, True, True, True)
    assert RolloutRejection("sequence", high=1.5).rejected(batch(mask)).tolist() == [False] * 3 + [True] * 2 + [False]
    assert RolloutRejection("geometric", high=1.3).rejected(batch(mask)).tolist() == [False] * 3 + [True] * 2 + [False]


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"level": "response"}, "level must be one of token, sequence, geometric, max; got 'response'"),
        ({"level": "token"}, "low or high must be given for level token, got None for both"),
        ({"high": 2.0}, "high has no effect without level, got 2.0"),
        ({"veto": 0.1}, "veto has no effect without level"),
        ({"estimator": "k3"}, "estimator has no effect without level, got k3"),
        ({"level": "token", "high": 2.0, "estimator": "k4"}, "estimator must be one of k1, k2, k3; got 'k4'"),
        ({"level": "max", "high": 2.0}, "estimator must be k2 or k3 for level max, got k1"),
        (
            {"level": "token", "low": 0.5, "high": 0.5, "estimator": "k2"},
            "high must be given and low must not for .* k2",
        ),
        ({"level": "token", "estimator": "k2"}, "high must be given .* got high None and low None"),
        ({"level": "token", "high": -1.0, "estimator": "k2"}, r"high must be in \[0, inf\], got -1.0"),
        ({"level": "token", "low": 1.5}, r"low must be in \[0, 1\], got 1.5"),
        ({"level": "token", "low": 0}, "low must be greater than 0"),
        ({"level": "token", "high": 0.9}, r"high must be in \[1, inf\], got 0.9"),
        ({"level": "token", "high": 2.0, "veto": 2.0}, r"veto must be in \[0, 1\], got 2.0"),
    ],
)
def test_rejection_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        RolloutRejection(**knobs)
