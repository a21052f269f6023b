"""EntroPIC, the reweighting guided by entropy, the bonus by difficulty: traces by hand, and what they do to the loss.

Traces of adaptive_bonus and aent are in test_controls.py.
"""

import math
from dataclasses import replace

import pytest
import torch

from entcov.controls import (
    SENT,
    AEnt,
    DifficultyBonus,
    EntroPIC,
    PositiveAdvantageReweighting,
    begin,
    check_objective,
    select,
)
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens
from tests.support.objective_oracle import PROGRESS, make_tokens

CONFIG = PolicyLossConfig()
UNCLIPPED = PolicyLossConfig(clip_low=1.0, clip_high=math.inf)
GSPO = PolicyLossConfig(objective="gspo", aggregation="seq-mean-token-mean")


def loss_of(tokens, controls, config=CONFIG):
    """(loss, gradient of logprob, metrics) of one mini-batch in one piece."""
    selections, extra = select(controls, [tokens], step=0, config=config)
    logprob = tokens.logprob.clone().requires_grad_()
    loss, metrics = policy_loss(replace(tokens, logprob=logprob), config, controls=controls, selections=selections[0])
    loss.backward()
    return loss.item(), logprob.grad, metrics | extra


# --- EntroPIC ---------------------------------------------------------------------------------------------------------


def with_entropy(entropy):
    """Four tokens: two are likely. Ratios 1.1, 1, 1, 0.9; advantages 2, -1, 3, -2."""
    logprob = torch.tensor([0.97, 0.96, 0.5, 0.1], dtype=torch.float64).log()
    old = logprob - torch.tensor([1.1, 1.0, 1.0, 0.9], dtype=torch.float64).log()
    return Tokens(
        logprob, old, torch.tensor([2.0, -1.0, 3.0, -2.0], dtype=torch.float64), torch.ones(4, dtype=torch.bool),
        entropy=torch.tensor([entropy - 0.01, entropy + 0.01, entropy, entropy], dtype=torch.float64),
    )  # fmt: skip


def test_entropic_trace():
    """The integral is used before the update's own error joins it."""
    control = EntroPIC()
    alpha = []
    for entropy in (0.05, 0.08, 0.10, 0.14, 0.30):
        (row,), metrics = select([control], [with_entropy(entropy)], step=0, config=CONFIG)
        alpha.append(float(row[0].scalars["alpha"]))
        assert float(metrics["actor/entropic_alpha"]) == alpha[-1] and float(metrics["actor/entropic_share"]) == 0.5
        control.after_update({"entropy": entropy, "sampled_entropy": 99.0}, PROGRESS)
    assert alpha == pytest.approx([-0.05, -0.0205, -0.0007, 0.0393, 0.1997], abs=1e-12)
    assert control.integral == pytest.approx(0.67 - 5 * 0.1)
    for entropy, end in ((9.0, 1.0), (0.0, -1.0)):
        wild = EntroPIC(target=2.0, kp=10.0)
        assert float(select([wild], [with_entropy(entropy)], step=0, config=CONFIG)[0][0][0].scalars["alpha"]) == end


def test_entropic_paper_weighs_likely_tokens_inside_the_clip():
    """alpha = 0.4: weights 1.4, 0.6, 1, 1. Above 1.05 the first token's gradient is clipped."""
    control = EntroPIC(target=0.1, semantics="paper")
    gradient = loss_of(with_entropy(0.5), [control])[1]
    assert (-4 * gradient).tolist() == pytest.approx([2 * 1.4 * 1.1, -1 * 0.6, 3.0, -2 * 0.9])
    assert loss_of(with_entropy(0.5), [control], PolicyLossConfig(clip_high=0.05))[1][0] == 0


def test_entropic_reference_adds_a_mean_over_the_likely_tokens_without_the_clip():
    """alpha = 0.4, N / N_high = 2: weights 1.8, 0.2, 1, 1; a clip at 1.05 leaves the added 0.8 of the first."""
    control = EntroPIC(target=0.1)
    tokens = with_entropy(0.5)
    loss, gradient, _ = loss_of(tokens, [control])
    assert (-4 * gradient).tolist() == pytest.approx([2 * 1.8 * 1.1, -1 * 0.2, 3.0, -2 * 0.9])
    added = 0.4 * -(2 * 1.1 + 1 * 1.0) / 2
    assert loss == pytest.approx(loss_of(tokens, [])[0] + added)
    clipped = loss_of(tokens, [control], PolicyLossConfig(clip_high=0.05))[1]
    assert -4 * float(clipped[0]) == pytest.approx(2 * 0.8 * 1.1)


@pytest.mark.parametrize("semantics", ["paper", "reference"])
def test_entropic_without_an_error_or_a_likely_token_is_the_plain_loss(semantics):
    tokens, _ = make_tokens()
    tokens.logprob = tokens.logprob.clamp(max=-0.01)
    off = EntroPIC(target=float(tokens.entropy[tokens.loss_mask].mean()), semantics=semantics, prob_threshold=0.3)
    assert loss_of(tokens, [off])[1].tolist() == pytest.approx(loss_of(tokens, [])[1].tolist(), abs=1e-12)
    none = EntroPIC(target=0.01, semantics=semantics, prob_threshold=1.0)
    assert torch.equal(loss_of(tokens, [none])[1], loss_of(tokens, [])[1])
    some = EntroPIC(target=0.01, semantics=semantics, prob_threshold=0.3)
    assert not torch.equal(loss_of(tokens, [some])[1], loss_of(tokens, [])[1])


@pytest.mark.parametrize("control", [EntroPIC, SENT])
def test_the_reference_forms_refuse_objectives_of_whole_responses(control):
    check_objective([control(semantics="paper")], GSPO)
    check_objective([control()], PolicyLossConfig(objective="cispo"))
    with pytest.raises(
        ValueError, match=f"objective must be one of ppo, cispo, gpg, dro for control {control.name}.* gspo"
    ):
        check_objective([control()], GSPO)


def test_an_infinite_ratio_of_an_unlikely_token_stays_out_of_entropic():
    tokens = with_entropy(0.5)
    tokens.old_logprob[3] = -1e6
    assert loss_of(tokens, [EntroPIC()], UNCLIPPED)[1].isfinite().all()


# --- the weight of positive advantages --------------------------------------------------------------------------------


def test_the_positive_weight_follows_the_entropy_within_0_and_1():
    control = PositiveAdvantageReweighting(delta=0.4)
    weights = []
    for entropy in (0.25, 0.2, 0.3, 0.19, 0.1, 0.1, 0.1):
        control.after_step({"scored/entropy": entropy}, PROGRESS)
        weights.append(control.current)
    assert weights == pytest.approx([0.4, 0.8, 1.0, 0.6, 0.2, 0.0, 0.0])  # on the target it goes up


def test_the_other_schedules_do_not_follow_the_entropy():
    for schedule in ("stage", "epoch"):
        control = PositiveAdvantageReweighting(schedule)
        assert control.after_step({}, PROGRESS) == {} and control.current == 0.0


# --- the bonus by difficulty ------------------------------------------------------------------------------------------


def graded():
    """Three prompts in odd order with 2, 2 and 1 responses, of one or two tokens: accuracies 1/2, 0 and 1."""
    response = torch.tensor([0, 0, 1, 2, 2, 3, 4])
    prompt = torch.tensor([7, 3, 7, 3, 5])[response]
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])[response]
    logprob = torch.full((7,), -1.0)
    return Tokens(
        logprob, logprob.clone(), torch.zeros(7), torch.ones(7, dtype=torch.bool), entropy=torch.full((7,), 0.5),
        sequence=response, group=prompt, reward=reward,
    )  # fmt: skip


@pytest.mark.parametrize("rho, weights", [(0.5, {7: 0.5, 3: 1.0, 5: 0.0}), (0.4, {7: 0.0, 3: 1.0, 5: 0.0})])
def test_difficulty_bonus_weighs_by_the_accuracy_of_the_prompt(rho, weights):
    tokens = graded()
    control = DifficultyBonus(entropy_coef=0.01, rho=rho)
    out = begin([control], tokens, PROGRESS)
    assert out.metrics["actor/difficulty_weight"] == pytest.approx(sum(weights.values()) / 3)
    entropy = tokens.entropy.clone().requires_grad_()
    part = torch.tensor([6, 2, 0, 3])  # a micro-batch of some of them
    micro = Tokens(**{n: x[part] for n, x in vars(replace(tokens, entropy=entropy)).items() if x is not None})
    policy_loss(micro, controls=[control])[0].backward()
    expected = [0.0] * 7
    for i in part.tolist():
        expected[i] = -0.01 * weights[int(tokens.group[i])] / 4
    assert entropy.grad.tolist() == pytest.approx(expected)


def test_difficulty_bonus_follows_a_share_of_the_first_entropy():
    """Target 0.4 * 1.0 from the first step on; the coefficient moves by coef_lr times the distance."""
    control = DifficultyBonus(entropy_coef=1e-3)
    seen = []
    for entropy in (1.0, 0.5, 0.3, 0.1, 100.0):
        metrics = control.after_step({"scored/entropy": entropy}, PROGRESS)
        seen.append(metrics["actor/entropy_coef"])
        assert metrics["actor/entropy_target"] == pytest.approx(0.4)
    assert [*seen, control.coef] == pytest.approx([1e-3, 4e-4, 3e-4, 4e-4, 7e-4, 0.0])
    assert DifficultyBonus(coef_lr=1.0).after_step({"scored/entropy": 0.0}, PROGRESS)["actor/entropy_coef"] == 0.0


def test_difficulty_bonus_refuses_what_it_cannot_weigh():
    tokens = graded()
    control = DifficultyBonus(entropy_coef=0.01)
    with pytest.raises(ValueError, match="begin must have been called with the rollout before control difficulty_b"):
        policy_loss(tokens, controls=[control])
    with pytest.raises(ValueError, match=r"reward must be in \[0, 1\] for control difficulty_bonus.* got -1"):
        begin([control], replace(tokens, reward=2 * tokens.reward - 1), PROGRESS)
    begin([control], tokens, PROGRESS)
    with pytest.raises(ValueError, match="group must be of the rollout that begin was shown"):
        policy_loss(replace(tokens, group=tokens.group + 1), controls=[control])


# --- AEnt -------------------------------------------------------------------------------------------------------------


def test_aent_s_second_coefficient_is_that_of_the_updates_and_not_of_the_score_before_them():
    """Numbers of examples/tiny_cpu.yaml with control=[aent]: coefficient 0.03, step size 0.05, band up to 0.25.

    In its first step the clamped entropy was 0.463062 before the first update, and 0.458332 in the mean over the tokens
    of its eight updates, which is what the authors' code feeds: 0.03 - 0.05 (0.458332 - 0.25) = 0.0195834.
    """
    control = AEnt(0.03, 0.33, True, 0.15, 0.25, 0.05, 0.0, 0.06, warmup=0)
    control.after_step({"scored/clamped_entropy": 0.463062, "updated/clamped_entropy": 0.458332}, PROGRESS)
    assert control.coef == pytest.approx(0.0195834, abs=1e-7)
    assert control.coef != pytest.approx(0.0193469, abs=1e-5)  # of the score
