"""Controls that choose or weigh tokens: numbers by hand, identities with the plain loss, limits of what they do."""

import math
from dataclasses import replace

import pytest
import torch

from entcov.controls import (
    SENT,
    ClipB,
    ClipV,
    EntropyAdvantage,
    HighEntropyTokens,
    PerplexityShaping,
    PositionShaping,
    PositiveAdvantageReweighting,
    Progress,
    RelativeEntropy,
    begin,
    mini_batch_totals,
    select,
)
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens

CONFIG = PolicyLossConfig()
PROGRESS = Progress(step=1, steps=10, update=0)


def tokens_of(probability, advantage, entropy=None, old=None, lengths=None, **fields):
    """Float64 tokens by their probability; `lengths` of the responses, which are their prompts' only ones."""
    numbers = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    n = len(probability)
    lengths = torch.tensor(lengths or [n])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    return Tokens(
        numbers(probability).log(),
        numbers(old or probability).log(),
        numbers(advantage),
        torch.ones(n, dtype=torch.bool),
        entropy=numbers(entropy or [0.5] * n),
        token_id=torch.arange(n),
        sequence=sequence,
        group=sequence,
        position=torch.cat([torch.arange(int(k)) for k in lengths]),
        sequence_length=lengths[sequence],
        **{name: numbers(value) for name, value in fields.items()},
    )


def loss_of(tokens, controls, config=CONFIG):
    """(loss, gradient of logprob, metrics) of one mini-batch in one piece, from `select` on."""
    selections, extra = select(controls, [tokens], step=0, config=config)
    totals = mini_batch_totals([tokens], selections)
    logprob = tokens.logprob.clone().requires_grad_()
    loss, metrics = policy_loss(
        replace(tokens, logprob=logprob), config, totals=totals, controls=controls, selections=selections[0]
    )
    loss.backward()
    return loss.item(), logprob.grad, metrics | extra


def shaped(control, tokens, progress=PROGRESS):
    return begin([control], tokens, progress)


# --- Clip_B and Clip_V ------------------------------------------------------------------------------------------------


def test_clip_b_drops_negative_tokens_far_below_the_mean():
    """S = p (H + ln p): p = 0.1 with H = 0.1 gives S = -0.22026; the others have S = 0.05 or 0 or so."""
    tokens = tokens_of([0.1, 0.1, 0.9, 1.0, 0.9], [-1.0, 1.0, -1.0, -1.0, 0.0], [0.1, 0.1, 0.2, 0.05, 0.2])
    score = [0.1 * (0.1 + math.log(0.1))] * 2 + [0.9 * (0.2 + math.log(0.9)), 0.05, 0.9 * (0.2 + math.log(0.9))]
    mean = sum(score) / 5
    std = math.sqrt(sum((s - mean) ** 2 for s in score) / 5)
    distance = (mean - score[0]) / std  # 1.22 population standard deviations
    out = shaped(ClipB(mu=distance - 1e-9), tokens)
    assert out.drop.tolist() == [True, False, False, False, False]  # the second one's advantage is positive
    assert out.metrics == {"actor/clip_b_frac": 0.2}
    assert not shaped(ClipB(mu=distance + 1e-9), tokens).drop.any()
    assert shaped(ClipB(mu=0.0), tokens).drop.tolist() == [True, False, False, False, False]


def test_clip_b_keeps_all_where_all_scores_are_equal():
    tokens = tokens_of([0.5] * 4, [-1.0] * 4)
    assert not shaped(ClipB(mu=0.0), tokens).drop.any()


def test_clip_v_drops_the_largest_drifts_of_negative_tokens_and_all_of_zero_advantage():
    """Population std of the drifts is about 0.2; with mu 2 the threshold is about 0.4."""
    drift = [0.9, 0.8, 0.9, 0.7] + [0.0, 0.1, -0.2, 0.05] * 24
    advantage = [-1.0, -2.0, 1.0, 0.0] + [-1.0] * 96
    tokens = tokens_of([0.5] * 100, advantage, entropy_drift=drift)
    threshold = torch.tensor(drift, dtype=torch.float64).std(correction=0)
    assert 0.35 < 2 * threshold < 0.45
    dropped = {}
    for frac in (1e-4, 0.01, 0.02, 1.0):
        out = shaped(ClipV(mu=2.0, max_frac=frac), tokens)
        dropped[frac] = out.drop.nonzero().flatten().tolist()
        assert out.metrics["actor/clip_v_frac"] == len(dropped[frac]) / 100
    # At least one of the negative tokens, the worst first; the cap does not count the token without an advantage.
    assert dropped == {1e-4: [0, 3], 0.01: [0, 3], 0.02: [0, 1, 3], 1.0: [0, 1, 3]}
    assert not shaped(ClipV(), tokens).drop.any()  # 8.5 standard deviations
    shifted = replace(tokens, entropy_drift=0.5 + 0.1 * (torch.arange(100) % 2).double())
    assert int(shaped(ClipV(2.0, 1.0), shifted).drop.sum()) == 99  # the threshold 0.1 is not centred by the mean 0.55
    assert not shaped(ClipV(mu=0.0), replace(tokens, entropy_drift=torch.full((100,), 0.3).double())).drop.any()


def test_dropped_tokens_leave_the_denominators():
    """Eight tokens of which two are dropped: the other six weigh 1/6."""
    tokens = tokens_of([0.01] * 2 + [0.5] * 6, [-1.0] * 2 + [1.0] * 6, [0.1] * 2 + [0.7] * 6)
    out = shaped(ClipB(mu=1.0), tokens)
    assert out.drop.tolist() == [True] * 2 + [False] * 6
    kept = replace(tokens, loss_mask=~out.drop)
    assert loss_of(kept, [])[1].tolist() == pytest.approx([0.0] * 2 + [-1 / 6] * 6)


# --- 80/20 ------------------------------------------------------------------------------------------------------------

TWELVE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]  # of TRL's own test: the last two are padding


@pytest.mark.parametrize("denominator, weight", [("kept", 1 / 2), ("all", 1 / 10)])
def test_high_entropy_tokens_and_both_denominators(denominator, weight):
    tokens = tokens_of([0.5] * 12, [1.0] * 12, TWELVE)
    tokens.loss_mask[10:] = False
    loss, gradient, metrics = loss_of(tokens, [HighEntropyTokens(denominator=denominator)])
    assert gradient.tolist() == pytest.approx([0.0] * 8 + [-weight] * 2 + [0.0] * 2)
    assert loss == pytest.approx(-2 * weight) and float(metrics["actor/entropy_threshold"]) == pytest.approx(0.9)
    assert float(metrics["actor/entropy"]) == pytest.approx(0.95 if denominator == "kept" else 0.55)


@pytest.mark.parametrize("n, quantile, kept", [(10, 0.2, 2), (11, 0.2, 3), (1, 0.2, 1), (6, 0.5, 3), (7, 1.0, 7)])
def test_the_number_of_high_entropy_tokens_is_rounded_up(n, quantile, kept):
    tokens = tokens_of([0.5] * n, [1.0] * n, [0.3] * n)  # all equal: the hash takes some
    gradient = loss_of(tokens, [HighEntropyTokens(quantile)])[1]
    assert sorted(gradient.tolist()) == pytest.approx([-1 / kept] * kept + [0.0] * (n - kept))


def test_the_other_tokens_keep_their_penalties_only_in_the_denominators_of_all():
    tokens = tokens_of([0.5] * 10, [1.0] * 10, TWELVE[:10], ref_logprob=[-1.0] * 10)
    config = PolicyLossConfig(kl_coef=0.1)
    alone = {d: loss_of(tokens, [HighEntropyTokens(denominator=d)], config)[1] for d in ("kept", "all")}
    assert (alone["kept"][:8] == 0).all() and (alone["all"][:8] != 0).all()


# --- SENT -------------------------------------------------------------------------------------------------------------


def sent_case():
    """Ten tokens, the first eight of low entropy; their advantages and log-probabilities have these covariances."""
    probability = [0.9, 0.1, 0.9, 0.1, 0.5, 0.5, 0.6, 0.4, 0.99, 0.01]
    advantage = [2.0, -2.0, -1.0, 1.0, 0.5, -0.5, 0.5, -0.5, 9.0, -9.0]
    old = [0.8, 0.2, 0.8, 0.2, 0.4, 0.6, 0.5, 0.5, 0.9, 0.02]
    tokens = tokens_of(probability, advantage, [0.1] * 8 + [0.9] * 2, old, ref_logprob=[math.log(x) for x in old])
    x, a = tokens.logprob[:8], tokens.advantage[:8]
    return tokens, ((x - x.mean()) * (a - a.mean())).tolist()


def test_sent_reference_penalises_both_ends_of_the_covariance_over_low_entropy_tokens():
    tokens, covariance = sent_case()
    order = sorted(range(8), key=lambda i: covariance[i])
    control = SENT(kl_cov_ratio=0.25, ppo_kl_coef=1.0)  # int(0.25 * 8) = 2 at each end
    plain = PolicyLossConfig(clip_low=1.0, clip_high=math.inf)  # no clip
    loss, gradient, metrics = loss_of(tokens, [control], PolicyLossConfig(clip_low=0.01, clip_high=0.01))
    expected = [0.0] * 10
    for i in order[-2:]:
        expected[i] = 2.0
    for i in order[:2]:
        expected[i] = 0.5
    log_ratio = tokens.logprob - tokens.old_logprob
    base = loss_of(tokens, [], plain)
    assert loss - base[0] == pytest.approx(float((torch.tensor(expected) * log_ratio.abs()).mean()), rel=1e-6)
    assert (gradient - base[1]).tolist() == pytest.approx((torch.tensor(expected) * log_ratio.sign() / 10).tolist())
    assert float(metrics["actor/sent_klfrac"]) == pytest.approx(0.4)
    assert 8 not in order[:2] + order[-2:]  # the largest products of all have high entropy


def test_sent_takes_at_least_one_token_at_each_end_and_the_smaller_penalty_where_they_meet():
    tokens, _ = sent_case()
    selections, _ = select([SENT(ppo_kl_coef=1.0)], [tokens], step=0, config=CONFIG)
    assert sorted(selections[0][0].weight.tolist()) == [0.0] * 8 + [0.5, 2.0]
    one = replace(tokens, loss_mask=torch.arange(10) == 3)
    selections, _ = select([SENT(ppo_kl_coef=1.0)], [one], step=0, config=CONFIG)
    assert selections[0][0].weight.tolist() == [0.0] * 3 + [0.5] + [0.0] * 6
    paper = SENT(semantics="paper")  # the floor of 1.6e-3 tokens has none of high covariance
    selections, _ = select([paper], [tokens], step=0, config=CONFIG)
    assert selections[0][0].weight.tolist() == pytest.approx([5e-4] * 8 + [0.0] * 2)


def test_sent_paper_is_the_kl_to_the_reference_within_the_clip():
    tokens, covariance = sent_case()
    order = sorted(range(8), key=lambda i: covariance[i])
    control = SENT(kl_cov_ratio=0.25, semantics="paper", ppo_kl_coef=1.0)
    assert control.needs == {"selection", "entropy", "ref_logprob"} and SENT().needs == {"selection", "entropy"}
    loss, gradient, _ = loss_of(tokens, [control])
    base = loss_of(tokens, [])
    weight = torch.tensor([2.0 if i in order[-2:] else 0.5 for i in range(8)] + [0.0] * 2)
    d = tokens.ref_logprob - tokens.logprob
    assert loss - base[0] == pytest.approx(float((weight * (d.exp() - d - 1)).mean()), rel=1e-6)
    assert (gradient - base[1]).tolist() == pytest.approx((weight * (1 - d.exp()) / 10).tolist(), abs=1e-9)


def test_sent_reference_is_the_plain_gradient_on_policy():
    tokens, _ = sent_case()
    tokens = replace(tokens, old_logprob=tokens.logprob.clone())
    assert torch.equal(loss_of(tokens, [SENT(kl_cov_ratio=0.25)])[1], loss_of(tokens, [])[1])


# --- shaped advantages ------------------------------------------------------------------------------------------------


def test_entropy_advantage_by_hand():
    """alpha H = 0.04, 0.4, 0.4, 0.4, 0; |A| / 2 = 0.5, 0.5, 0.1, 0, 0."""
    tokens = tokens_of([0.5] * 5, [1.0, -1.0, 0.2, 0.0, 0.0], [0.1, 1.0, 1.0, 1.0, 0.0])
    loss, gradient, metrics = loss_of(tokens, [EntropyAdvantage()])
    assert (-5 * gradient).tolist() == pytest.approx([1.04, -0.6, 0.3, 0.0, 0.0])
    assert float(metrics["actor/entropy_advantage"]) == pytest.approx((0.04 + 0.4 + 0.1) / 5)
    assert loss_of(tokens, [EntropyAdvantage(alpha=0.0)])[0] == loss_of(tokens, [])[0]


def test_entropy_advantage_keeps_the_sign_and_is_constant_for_the_gradient():
    g = torch.Generator().manual_seed(0)
    advantage = torch.cat([torch.randn(500, generator=g), torch.zeros(5)]).double()
    tokens = tokens_of([0.5] * 505, advantage.tolist(), (10 * torch.rand(505, generator=g)).tolist())
    entropy = tokens.entropy.clone().requires_grad_()
    effect = EntropyAdvantage(alpha=100.0).apply(replace(tokens, entropy=entropy), None)
    moved = advantage * effect.multiplier
    assert torch.equal(moved.sign(), advantage.sign()) and not effect.multiplier.requires_grad
    assert ((moved - advantage).abs() <= advantage.abs() / 2 + 1e-12).all() and (moved >= advantage).all()


@pytest.mark.parametrize(
    "schedule, progress, weight",
    [
        ("stage", {"step": 1}, 0.0), ("stage", {"step": 5}, 0.0), ("stage", {"step": 6}, 0.2),
        ("stage", {"step": 10}, 1.0), ("stage", {"step": 12}, 1.0),
        ("epoch", {"step": 1, "epoch": 1, "epochs": 4}, 0.0), ("epoch", {"step": 1, "epoch": 3, "epochs": 4}, 2 / 3),
        ("epoch", {"step": 1, "epoch": 4, "epochs": 4}, 1.0),
    ],
)  # fmt: skip
def test_reweighting_by_stage_and_epoch(schedule, progress, weight):
    tokens = tokens_of([0.5] * 3, [2.0, -3.0, 0.0])
    out = shaped(PositiveAdvantageReweighting(schedule), tokens, Progress(steps=10, update=0, **progress))
    assert out.advantage.tolist() == pytest.approx([2 * weight, -3.0, 0.0])
    assert out.metrics == {"actor/positive_weight": pytest.approx(weight)}


@pytest.mark.parametrize("epochs, got", [({}, "generated"), ({"epoch": 1, "epochs": 1}, "has 1")])
def test_reweighting_by_epoch_needs_two_epochs(epochs, got):
    with pytest.raises(ValueError, match=f"schedule epoch .* at least 2 epochs over the data, .*{got}"):
        shaped(PositiveAdvantageReweighting("epoch"), tokens_of([0.5], [1.0]), Progress(1, 10, 0, **epochs))


def test_reweighting_of_weight_1_is_the_plain_loss_and_of_0_trains_on_negative_tokens():
    tokens = tokens_of([0.5] * 4, [2.0, -3.0, 1.0, -1.0], old=[0.4, 0.6, 0.5, 0.5])
    assert torch.equal(shaped(PositiveAdvantageReweighting(weight=1.0), tokens).advantage, tokens.advantage)
    assert shaped(PositiveAdvantageReweighting(), tokens).advantage.tolist() == [0.0, -3.0, 0.0, -1.0]


def test_relative_entropy_weighs_responses_around_1():
    """Mean entropies 0.2, 0.6 and 0.1 of responses of 1, 2 and 1 tokens: their mean is 0.3."""
    tokens = tokens_of([0.5] * 4, [1.0, -1.0, 2.0, 1.0], [0.2, 0.4, 0.8, 0.1], lengths=[1, 2, 1])
    out = shaped(RelativeEntropy(), tokens)
    assert out.advantage.tolist() == pytest.approx([2 / 3, -2.0, 4.0, 1 / 3])
    assert out.metrics == pytest.approx({"actor/relative_entropy_max": 2.0, "actor/relative_entropy_min": 1 / 3})
    silent = replace(tokens, entropy=torch.zeros(4, dtype=torch.float64))
    assert torch.equal(shaped(RelativeEntropy(), silent).advantage, tokens.advantage)


def test_perplexity_shaping_raises_the_advantages_of_likely_responses():
    """log PPL 1 and 3 (the mean of -ln p over 1 and 2 tokens): standardised to -1 and 1."""
    p = [math.exp(-1), math.exp(-2), math.exp(-4)]
    tokens = tokens_of(p, [1.0, -1.0, 2.0], lengths=[1, 2])
    out = shaped(PerplexityShaping(ppl_coef=0.1), tokens)
    assert out.advantage.tolist() == pytest.approx([1.1, -0.9, 1.8])
    assert out.metrics == pytest.approx({"actor/log_ppl": 2.0, "actor/log_ppl_std": 1.0})
    assert shaped(PerplexityShaping(ppl_coef=2.0), tokens).advantage.tolist() == pytest.approx([3.0, 0.0, 0.0])
    equal = tokens_of([0.5] * 3, [1.0, -1.0, 2.0], lengths=[1, 2])
    assert torch.equal(shaped(PerplexityShaping(ppl_coef=2.0), equal).advantage, equal.advantage)


def test_position_shaping_adds_in_the_direction_of_the_advantage():
    """Places 1/4, 2/4, 3/4, 1 of a response of four tokens, and 1 of a response of one."""
    tokens = tokens_of([0.5] * 5, [1.0, -1.0, 0.0, 1.0, -2.0], lengths=[4, 1])
    out = shaped(PositionShaping(position_coef=0.2, steepness=4.0), tokens)
    bonus = [0.2 / (1 + math.exp(-4 * (x - 0.5))) for x in (0.25, 0.5, 0.75, 1.0, 1.0)]
    assert out.advantage.tolist() == pytest.approx([1 + bonus[0], -1.1, 0.0, 1 + bonus[3], -2 - bonus[4]])


@pytest.mark.parametrize(
    "control", [ClipB(mu=0.5), ClipV(0.5, 0.05), RelativeEntropy(), PerplexityShaping(), PositionShaping()], ids=str
)
def test_what_is_decided_of_a_rollout_does_not_depend_on_the_order_of_its_responses(control):
    g = torch.Generator().manual_seed(1)
    lengths = [3, 1, 7, 2, 5, 4, 8, 6]
    n = sum(lengths)
    random = lambda: torch.rand(n, generator=g).tolist()  # noqa: E731
    tokens = tokens_of(
        random(), [x - 0.5 for x in random()], random(), lengths=lengths, entropy_drift=[x - 0.5 for x in random()]
    )
    order = torch.cat([(tokens.sequence == s).nonzero().flatten() for s in (5, 2, 7, 0, 1, 6, 3, 4)])
    moved = Tokens(**{name: x[order] for name, x in vars(tokens).items() if x is not None})
    first, second = shaped(control, tokens), shaped(control, moved)
    assert torch.allclose(first.advantage[order], second.advantage, rtol=1e-14, atol=0)
    if first.drop is not None:
        assert first.drop.any() and torch.equal(first.drop[order], second.drop)
