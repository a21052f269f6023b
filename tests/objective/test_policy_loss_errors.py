"""Inputs that the policy loss refuses: each error names the argument, the rule and the value."""

import math

import pytest
import torch

from entcov.controls import AEnt, ClipCov, EntropyBonus, Selection
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from tests.support.objective_oracle import make_tokens

INF = math.inf


@pytest.mark.parametrize(
    "knobs, error, message",
    [
        ({"clip_low": 1.5}, ValueError, r"clip_low must be in \[0, 1\], got 1.5; it is a fraction"),
        ({"clip_low": -0.1}, ValueError, r"clip_low must be in \[0, 1\], got -0.1"),
        ({"clip_low": "0.2"}, TypeError, "clip_low must be a number, got '0.2'"),
        ({"clip_low": True}, TypeError, "clip_low must be a number, got True"),
        ({"clip_high": 28}, ValueError, r"clip_high must be in \[0, 10\], got 28; it is a fraction, not a percent"),
        ({"clip_high": math.nan}, ValueError, "clip_high must be in .* got nan"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be greater than 1"),
        ({"dual_clip": 0.5}, ValueError, "dual_clip must be in .* got 0.5"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of token-mean, .*; got 'mean'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, ValueError, "max_response_length must be given"),
        ({"aggregation": "seq-mean-token-sum-norm", "max_response_length": 0}, ValueError, "at least 1, got 0"),
        ({"aggregation": "seq-mean-token-sum-norm", "max_response_length": 8.0}, TypeError, "must be an integer"),
        ({"max_response_length": 8}, ValueError, "max_response_length must be None unless .* would ignore 8"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef must be in .* got -0.1"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of k1, .* got 'k4'"),
        ({"kl_weight": "ratio"}, ValueError, "kl_weight must be left at none: there is no KL term"),
        ({"kl_coef": 1, "kl_weight": "r"}, ValueError, "kl_weight must be one of none, ratio; got 'r'"),
        ({"off_policy_mask_threshold": -1.0}, ValueError, "off_policy_mask_threshold must be in .* got -1.0"),
        ({"tis_cap": 0.0}, ValueError, "tis_cap must be greater than 0, got 0.0"),
        ({"tis_cap": -1}, ValueError, "tis_cap must be in .* got -1"),
    ],
)
def test_config_errors_name_key_rule_and_value(knobs, error, message):
    with pytest.raises(error, match=message):
        PolicyLossConfig(**knobs)


@pytest.mark.parametrize(
    "totals, error, message",
    [
        ((0, 1), ValueError, "num_tokens must be at least 1, got 0"),
        ((3, torch.tensor(0)), ValueError, "num_sequences must be at least 1, got 0"),
        ((3.0, 1), TypeError, "num_tokens must be an integer, got 3.0"),
        ((torch.tensor(3.0), 1), TypeError, "num_tokens must be a 0-d integer tensor"),
    ],
)
def test_totals_errors(totals, error, message):
    with pytest.raises(error, match=message):
        Totals(*totals)


@pytest.mark.parametrize("field", ["logprob", "old_logprob", "advantage", "ref_logprob", "rollout_logprob", "entropy"])
@pytest.mark.parametrize("bad", [math.nan, -INF])
def test_value_that_is_not_finite(field, bad):
    tokens, _ = make_tokens()
    first = int(tokens.loss_mask.nonzero()[0])
    getattr(tokens, field)[first] = bad
    with pytest.raises(ValueError, match=rf"{field} must be finite under the mask: 1 of .*first: \[{first}\] is {bad}"):
        policy_loss(tokens, PolicyLossConfig(kl_coef=0.1, tis_cap=2.0), controls=[EntropyBonus()])


@pytest.mark.parametrize(
    "field, knobs, controls, message",
    [
        ("ref_logprob", {"kl_coef": 0.1}, [], "tokens.ref_logprob must be given, kl_coef reads it"),
        ("rollout_logprob", {"tis_cap": 2.0}, [], "tokens.rollout_logprob must be given, tis_cap reads it"),
        ("sequence_length", {"aggregation": "seq-mean-token-mean"}, [], "tokens.sequence_length must be given"),
        ("entropy", {}, [EntropyBonus()], "tokens.entropy must be given, control entropy_bonus reads it"),
        ("clamped_entropy", {}, [AEnt()], "tokens.clamped_entropy must be given, control aent reads it"),
    ],
)
def test_missing_field_is_named(field, knobs, controls, message):
    tokens, _ = make_tokens()
    setattr(tokens, field, None)
    with pytest.raises(ValueError, match=message):
        policy_loss(tokens, PolicyLossConfig(**knobs), controls=controls)


def test_selection_errors():
    tokens, _ = make_tokens()
    with pytest.raises(ValueError, match="selections must hold what .*select chose for clip_cov, got None"):
        policy_loss(tokens, controls=[ClipCov()])
    with pytest.raises(ValueError, match="selections must have one entry a control: 1 controls, 2 given"):
        policy_loss(tokens, controls=[ClipCov()], selections=[None, None])
    with pytest.raises(ValueError, match="selection of control clip_cov must have shape"):
        policy_loss(tokens, controls=[ClipCov()], selections=[Selection(tokens.loss_mask[:3])])
    with pytest.raises(TypeError, match="selection of control clip_cov must be a Selection, got Tensor"):
        policy_loss(tokens, controls=[ClipCov()], selections=[tokens.loss_mask])
    with pytest.raises(TypeError, match="selection of control clip_cov must be torch.bool"):
        policy_loss(tokens, controls=[ClipCov()], selections=[Selection(tokens.loss_mask.long())])


def test_sequence_length_zero_under_the_mask():
    tokens, _ = make_tokens()
    tokens.sequence_length = torch.zeros_like(tokens.sequence_length)
    with pytest.raises(ValueError, match="sequence_length must be at least 1 under the mask"):
        policy_loss(tokens, PolicyLossConfig(aggregation="seq-mean-token-mean"), totals=Totals(10, 2))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logprob": torch.zeros(2, 2)}, ValueError, r"logprob must have one dimension .* got shape \(2, 2\)"),
        ({"logprob": torch.zeros(3).bfloat16()}, TypeError, "logprob must be torch.float32 or torch.float64"),
        ({"loss_mask": torch.ones(3)}, TypeError, "loss_mask must be torch.bool, got torch.float32"),
        ({"loss_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"loss_mask must have shape \(3,\)"),
        ({"old_logprob": None}, TypeError, "old_logprob must be a tensor, got NoneType"),
        ({"advantage": torch.zeros(4)}, ValueError, r"advantage must have shape \(3,\) as the others, got \(4,\)"),
        ({"entropy": torch.zeros(3).half()}, TypeError, "entropy must be torch.float32 or torch.float64"),
        ({"token_id": torch.zeros(3)}, TypeError, "token_id must be torch.int64, got torch.float32"),
        ({"advantage": torch.zeros(3, device="meta")}, ValueError, "advantage must be on cpu as the others, got meta"),
    ],
)
def test_token_errors(change, error, message):
    good = dict(
        logprob=torch.zeros(3),
        old_logprob=torch.zeros(3),
        advantage=torch.zeros(3),
        loss_mask=torch.ones(3, dtype=torch.bool),
    )
    Tokens(**good)
    with pytest.raises(error, match=message):
        Tokens(**good | change)


def test_cat_errors():
    tokens, _ = make_tokens()
    other, _ = make_tokens()
    other.token_id = None
    with pytest.raises(ValueError, match="token_id must be set in every micro-batch or in none, got None in number 1"):
        Tokens.cat([tokens, other])
    with pytest.raises(ValueError, match="parts must hold at least one micro-batch"):
        Tokens.cat([])
