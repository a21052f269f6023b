"""entropy_ratio_clip and adaptive_clip: hand values, the published code's formulas, what rounding must not do."""

from dataclasses import replace

import pytest
import torch

from entcov.controls import KLCov, check_composition, check_objective, make_control
from entcov.controls.adaptive_clip import AdaptiveClip
from entcov.controls.entropy_ratio_clip import EntropyRatioClip
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens
from tests.support.objective_oracle import PROGRESS, make_tokens


def tokens_of(ratio=(), advantage=None, **fields):
    make = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    log_ratio = make(ratio).log()
    old = torch.full_like(log_ratio, -3.0)
    advantage = torch.ones_like(old) if advantage is None else make(advantage)
    fields = {name: make(value) for name, value in fields.items()}
    return Tokens((old + log_ratio).requires_grad_(), old, advantage, torch.ones(len(old)) > 0, **fields)


def gradient(tokens, control, **config):
    """(d loss / d logprob times the number of tokens, metrics)."""
    loss, metrics = policy_loss(tokens, PolicyLossConfig(**config), controls=[control])
    (found,) = torch.autograd.grad(loss, tokens.logprob)
    return found * len(found), {name: float(value) for name, value in metrics.items()}


# ---- entropy_ratio_clip ----------------------------------------------------------------------------------------------


def test_the_entropy_ratio_decides_which_tokens_train():
    """Ratios 0.94, 0.96, 1, 1.04, 1.06 of entropy 0.5, range 0.05: the first and the last are stopped, and count."""
    entropy = [0.47, 0.48, 0.5, 0.52, 0.53]
    tokens = tokens_of([1.1] * 5, entropy=entropy, old_entropy=[0.5] * 5)
    found, metrics = gradient(tokens, EntropyRatioClip())
    assert found.tolist() == pytest.approx([0.0, -1.1, -1.1, -1.1, 0.0])
    assert metrics["actor/entropy_ratio_clipfrac"] == pytest.approx(0.4)
    assert metrics["actor/pg_loss"] == pytest.approx(-1.1 * 3 / 5)
    found, _ = gradient(tokens, EntropyRatioClip(entropy_ratio_low=0.07, entropy_ratio_high=0.03))
    assert found.tolist() == pytest.approx([-1.1, -1.1, -1.1, 0.0, 0.0])


def test_the_entropy_ratio_has_the_gradient_of_the_published_formula():
    """torch.where(inside, pg, pg.detach()) of the clipped loss, with (H + 1e-8) / (H_old + 1e-8)."""
    tokens, _ = make_tokens(3)
    tokens.old_entropy = tokens.entropy * (1 + 0.1 * torch.sin(7.0 * torch.arange(len(tokens.entropy))))
    tokens.logprob.requires_grad_()
    found, metrics = gradient(tokens, EntropyRatioClip(), clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    mask = tokens.loss_mask
    r, a = (tokens.logprob - tokens.old_logprob).exp(), tokens.advantage
    pg = torch.maximum(-a * r, -a * r.clamp(0.8, 1.28))
    pg = torch.where(a < 0, torch.minimum(pg, -10 * a), pg)
    ratio = (tokens.entropy + 1e-8) / (tokens.old_entropy + 1e-8)
    inside = (ratio > 0.95) & (ratio < 1.05)
    theirs = torch.where(inside, pg, pg.detach())[mask].sum() / mask.sum()
    (expected,) = torch.autograd.grad(theirs, tokens.logprob)
    torch.testing.assert_close(found / len(found), torch.where(mask, expected, 0.0), rtol=1e-12, atol=0)
    stopped = float((~inside & mask).sum() / mask.sum())
    assert 0 < stopped < 1 and metrics["actor/entropy_ratio_clipfrac"] == pytest.approx(stopped)


def test_no_entropy_at_all_stops_nothing_and_divides_by_nothing():
    """Rounding can make an entropy of 0 as small as -1e-8, where the published ratio is 1e-8 / 0."""
    tokens = tokens_of([1.0] * 4, entropy=[0.0, -1e-8, 0.0, -3e-8], old_entropy=[0.0, -1e-8, -1e-8, 0.0])
    found, metrics = gradient(tokens, EntropyRatioClip())
    assert found.tolist() == pytest.approx([-1.0] * 4) and metrics["actor/entropy_ratio_clipfrac"] == 0


def test_the_entropy_of_the_rollout_is_named_where_it_is_missing():
    tokens = tokens_of([1.0], entropy=[0.5])
    with pytest.raises(ValueError, match="tokens.old_entropy must be given, control entropy_ratio_clip reads it"):
        policy_loss(tokens, controls=[EntropyRatioClip()])
    with pytest.raises(ValueError, match="tokens.entropy must be given, control entropy_ratio_clip reads it"):
        policy_loss(replace(tokens, entropy=None, old_entropy=tokens.entropy), controls=[EntropyRatioClip()])


# ---- adaptive_clip ---------------------------------------------------------------------------------------------------


def test_the_adaptive_clip_stops_what_leaves_its_interval():
    """epsilon 0.6: [0.4, 2.5 + k]. The loss's own clip at 0.2 and dual clip at 1.5 have no effect."""
    ratio, advantage = [3.0, 2.4, 0.3, 3.0, 0.35, 0.5, 3.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0]
    control, tokens = AdaptiveClip(), tokens_of(ratio, advantage, entropy=[0.1] * 7)
    found, metrics = gradient(tokens, control, clip_low=0.2, clip_high=0.2, dual_clip=1.5)
    assert found.tolist() == pytest.approx([0.0, -2.4, -0.3, 3.0, 0.0, 0.5, 0.0])
    assert metrics["actor/adaptive_clipfrac"] == pytest.approx(2 / 7)
    assert metrics["actor/pg_clipfrac"] == metrics["actor/pg_clipfrac_lower"] == 0
    for _ in range(3):  # 2.5 + 0.75
        control.after_update({"entropy": 0.1}, PROGRESS)
    assert gradient(tokens, control)[0].tolist() == pytest.approx([-3.0, -2.4, -0.3, 3.0, 0.0, 0.5, 0.0])


def test_the_adaptive_clip_steps_towards_its_target():
    control = AdaptiveClip(target=0.3, step_size=0.25, relaxation_max=0.6)
    seen = []
    for entropy in (0.5, 0.1, 0.29, 0.2, 0.3, 0.31):
        control.after_update({"entropy": entropy}, PROGRESS)
        seen.append(control.relaxation)
    assert seen == [0.0, 0.25, 0.5, 0.6, 0.6, pytest.approx(0.35)]
    metrics = control.after_step({}, PROGRESS)  # the last update's, not the coming one's
    assert metrics == {"actor/adaptive_clip_upper": pytest.approx(3.1), "actor/entropy_target": 0.3}
    assert control.upper == pytest.approx(2.85)


def test_without_relaxation_the_adaptive_clip_is_ppo_s():
    """The gradient of ppo with clip_low 0.2 and clip_high 1 / 0.8 - 1, on tokens that both bounds act on."""
    tokens, _ = make_tokens(1)
    tokens.logprob.requires_grad_()
    found, metrics = gradient(tokens, AdaptiveClip(epsilon=0.2))
    loss, _ = policy_loss(tokens, PolicyLossConfig(clip_low=0.2, clip_high=0.25))
    (expected,) = torch.autograd.grad(loss, tokens.logprob)
    torch.testing.assert_close(found / len(found), expected, rtol=1e-12, atol=0)
    assert 0 < metrics["actor/adaptive_clipfrac"] < 1


def test_the_adaptive_clip_is_for_ppo_alone_and_beside_no_other_clip():
    tokens = tokens_of([1.0], entropy=[0.5])
    with pytest.raises(ValueError, match="objective must be one of ppo for control adaptive_clip"):
        check_objective([AdaptiveClip()], PolicyLossConfig(objective="cispo"))
    with pytest.raises(ValueError, match="objective must be one of ppo, cispo, gpg, dro for a control that drops"):
        policy_loss(tokens, PolicyLossConfig(objective="ce_gppo"), controls=[AdaptiveClip()])
    with pytest.raises(ValueError, match="control: kl_cov and adaptive_clip both set the clip of the ratio"):
        check_composition([KLCov(), AdaptiveClip()])


@pytest.mark.parametrize(
    "name, knobs, message",
    [
        ("entropy_ratio_clip", {"entropy_ratio_low": 5.0}, "entropy_ratio_low must be in .0, 1., got 5.0; .*percent"),
        ("entropy_ratio_clip", {"entropy_ratio_high": -0.1}, "entropy_ratio_high must be in .0, inf., got -0.1"),
        ("adaptive_clip", {"target": 0.0}, "target must be greater than 0, got 0.0"),
        ("adaptive_clip", {"epsilon": 1.0}, r"epsilon must be in \[0, 0.99\], got 1.0"),
        ("adaptive_clip", {"step_size": -1.0}, r"step_size must be in \[0, inf\], got -1.0"),
        ("adaptive_clip", {"relaxation_max": -1.0}, r"relaxation_max must be in \[0, inf\], got -1.0"),
    ],
)
def test_bad_knobs_are_named(name, knobs, message):
    with pytest.raises(ValueError, match=message):
        make_control(name, **knobs)
