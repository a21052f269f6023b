"""What controls do to the entropy, on tabular softmax policies: first-order predictions, checked by their error rate.

A token's own update changes the entropy of its state by step size * weight * entropy_drift (docs/math.md (9)), where
the weight is the coefficient of its logprob in the loss, negated. Each test has that weight from the method's formula.
"""

import math
from dataclasses import replace

import pytest
import torch

from entcov.controls import (
    ClipB,
    ClipV,
    EntroPIC,
    EntropyAdvantage,
    HighEntropyTokens,
    NoControl,
    PositiveAdvantageReweighting,
    RelativeEntropy,
)
from entcov.objective.tokens import PolicyLossConfig
from entcov.verify import reference
from tests.support.tabular_policy import assert_first_order, entropy_change, gradient, tokens_of

T, V = 60, 6


@pytest.fixture(scope="module")
def case():
    """(logits [T, V], make): peaked and flat states, advantages of both signs and 0, an old policy near by."""
    g = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.3, 6.0, T, dtype=torch.float64)[torch.randperm(T, generator=g)]
    logits = scale[:, None] * torch.randn(T, V, generator=g, dtype=torch.float64)
    old = logits + 0.1 * torch.randn(T, V, generator=g, dtype=torch.float64)
    action = torch.multinomial(logits.softmax(-1), 1, generator=g)[:, 0]
    advantage = torch.randn(T, generator=g, dtype=torch.float64)
    advantage[::7] = 0.0
    return logits, lambda z: tokens_of(z, action, advantage, old)


def parts(case):
    """(tokens, ratio, p, S, drift) without gradient."""
    logits, make = case
    tokens = make(logits)
    p = tokens.logprob.exp()
    return (
        tokens,
        (tokens.logprob - tokens.old_logprob).exp(),
        p,
        p * (tokens.entropy + tokens.logprob),
        tokens.entropy_drift,
    )


def plain(case):
    tokens, ratio, *_ = parts(case)
    return tokens.advantage * ratio / T


def of_clip_b(case):
    tokens, ratio, _, score, _ = parts(case)
    kept = (tokens.advantage >= 0) | (score - score.mean() >= -1.0 * score.std(correction=0))
    assert 0 < int((~kept).sum()) < T / 2
    return tokens.advantage * ratio * kept / kept.sum()


def of_clip_v(case):
    tokens, ratio, _, _, drift = parts(case)
    kept = (tokens.advantage > 0) | (drift <= 1.0 * drift.std(correction=0))
    assert int((~kept & (tokens.advantage < 0)).sum()) > 1
    return tokens.advantage * ratio * kept / kept.sum()


def of_high_entropy(case):
    tokens, ratio, *_ = parts(case)
    kept = tokens.entropy >= tokens.entropy.sort(descending=True).values[11]  # ceil(0.2 * 60) = 12
    return tokens.advantage * ratio * kept / 12


def of_entropy_advantage(case):
    tokens, ratio, *_ = parts(case)
    return (tokens.advantage + torch.minimum(0.4 * tokens.entropy, tokens.advantage.abs() / 2)) * ratio / T


def of_reweighting(case):
    tokens, ratio, *_ = parts(case)
    return tokens.advantage * ratio * torch.where(tokens.advantage > 0, 0.25, 1.0) / T


def of_relative_entropy(case):
    tokens, ratio, *_ = parts(case)
    return tokens.advantage * ratio * tokens.entropy / tokens.entropy.mean() / T


def of_entropic(semantics):
    def weight(case):
        tokens, ratio, p, *_ = parts(case)
        alpha = float(tokens.entropy.mean()) - 0.9
        likely = p > 0.6
        assert -1 < alpha < 0 and 5 < int(likely.sum()) < T - 5
        change = alpha * tokens.advantage.abs() * ratio * likely
        return (tokens.advantage * ratio + change * (1 if semantics == "paper" else T / likely.sum())) / T

    return weight


METHODS = {
    "none": (NoControl(), plain),
    "clip_b": (ClipB(mu=1.0), of_clip_b),
    "clip_v": (ClipV(mu=1.0, max_frac=1.0), of_clip_v),
    "high entropy, kept": (HighEntropyTokens(), of_high_entropy),
    "high entropy, all": (HighEntropyTokens(denominator="all"), lambda case: of_high_entropy(case) * 12 / T),
    "entropy advantage": (EntropyAdvantage(), of_entropy_advantage),
    "reweighting": (PositiveAdvantageReweighting(weight=0.25), of_reweighting),
    "relative entropy": (RelativeEntropy(), of_relative_entropy),
    **{
        f"entropic, {semantics}": (EntroPIC(0.9, 1.0, 0.0, 0.6, semantics), of_entropic(semantics))
        for semantics in ("paper", "reference")
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_the_entropy_changes_as_the_formula_of_the_method_says(case, name):
    control, weight = METHODS[name]
    logits, make = case
    predicted = float((weight(case) * parts(case)[4]).sum())
    assert_first_order(logits, -gradient(logits, make, [control]), predicted)


def test_what_clip_b_and_clip_v_drop_would_have_lowered_the_entropy(case):
    """Each token that Clip_V drops alone, by theorem 3.3; what Clip_B drops in sum, since it centres by the batch."""
    logits, make = case
    tokens, ratio, _, _, drift = parts(case)
    own = tokens.advantage * ratio * drift
    for name, each in (("clip_b", False), ("clip_v", True)):
        dropped = (METHODS[name][1](case) == 0) & (tokens.advantage < 0)
        assert dropped.any() and own[dropped].sum() < 0
        assert not each or (own[dropped] < 0).all()
        with_all, without = (
            entropy_change(logits, -1e-3 * gradient(logits, make, c)) for c in ([], [METHODS[name][0]])
        )
        assert without > with_all


def test_entropic_moves_the_entropy_towards_its_target(case):
    """Likely tokens (p > 0.6 here) lose entropy when rewarded and gain when punished, so dH falls with alpha."""
    logits, make = case
    _, _, p, _, drift = parts(case)
    assert (drift[p > 0.6] < 0).all()
    for semantics in ("paper", "reference"):
        changes = [
            entropy_change(logits, -1e-3 * gradient(logits, make, [EntroPIC(target, 1.0, 0.0, 0.6, semantics)]))
            for target in (1.5, 0.9, 0.3)  # the entropy is about 0.6: far too low, too low, too high
        ]
        assert changes[0] > changes[1] > changes[2]


def test_a_smaller_weight_of_positive_tokens_keeps_entropy():
    """Where likely tokens are rewarded more often. (Were rewards independent of the token, the mean drift is 0.)"""
    g = torch.Generator().manual_seed(0)
    logits = 4.0 * torch.randn(400, V, generator=g, dtype=torch.float64)
    action = torch.multinomial(logits.softmax(-1), 1, generator=g)[:, 0]
    probability = logits.softmax(-1).gather(1, action[:, None])[:, 0]
    advantage = torch.where(torch.rand(400, generator=g) < probability, 1.0, -1.0).double()
    change = [
        entropy_change(
            logits,
            -1e-3
            * gradient(logits, lambda z: tokens_of(z, action, advantage), [PositiveAdvantageReweighting(weight=w)]),
        )
        for w in (0.0, 0.5, 1.0)
    ]
    assert change[0] > change[1] > change[2]


# --- clip-low and clip-high with random rewards -----------------------------------------------------------------------


def clip_effect(p_logits, q_logits, clip_low, clip_high, beta1=0.0, beta2=0.0):
    """(direction, predicted dH per unit of step) of one policy-gradient step with the clip, in expectation over tokens
    from q and rewards of +1 or -1 that do not depend on the token. Without the clip the expectation is 0. With betas:
    of CE-GPPO, which gives a clipped token the gradient of beta times the bound instead of its ratio."""
    p, q = (torch.tensor(z, dtype=torch.float64) for z in (p_logits, q_logits))
    size = len(p)
    weight = q.softmax(0) * size  # as the size of the advantage: the loss is a mean over 2 * size tokens
    advantage = torch.cat([weight, -weight])
    action = torch.arange(size).repeat(2)
    config = PolicyLossConfig(clip_low=clip_low, clip_high=clip_high)
    if beta1 or beta2:
        config = replace(config, objective="ce_gppo", ce_gppo_beta1=beta1, ce_gppo_beta2=beta2)

    def make(z):
        old = q.expand(2 * size, size)
        return tokens_of(z.expand(2 * size, size), action, advantage, old)

    log_p = reference.log_probs(p)
    ratio = (log_p - reference.log_probs(q)).exp()
    score = log_p.exp() * (reference.entropy_of(log_p) + log_p)
    own = log_p.exp() * (score - (log_p.exp() * score).sum())
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    predicted = -0.5 * (own * (1 - beta1 * (1 - clip_low) / ratio))[below].sum()
    if above.any():  # the bound may be infinite
        predicted += 0.5 * (own * (1 - beta2 * (1 + clip_high) / ratio))[above].sum()
    return p, -gradient(p, make, config=config), float(predicted)


@pytest.mark.parametrize(
    "p, q, clip, number",
    [
        ((3, 0, 0, 0), (1, 0, 0, 0), (1.0, 0.2), 0.0256),  # the dominant token is clipped: the entropy rises
        ((4, 1, 0, 0), (4, 0, 0, 0), (1.0, 0.2), -0.00797),  # a rare one: it falls, as the paper says
        ((4, -1, 0, 0), (4, 0, 0, 0), (0.2, math.inf), None),
        ((3, 1, -1, 0), (2, 0, 0, 0.5), (0.2, 0.2), None),
    ],
)
def test_clipping_moves_the_entropy_by_the_clipped_tokens_alone(p, q, clip, number):
    logits, direction, predicted = clip_effect([float(x) for x in p], [float(x) for x in q], *clip)
    assert number is None or predicted == pytest.approx(number, abs=5e-5)
    assert predicted != 0
    assert_first_order(logits, direction, predicted)


def test_clip_low_raises_the_entropy_where_rare_tokens_are_clipped():
    assert clip_effect([4.0, -1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], 0.2, math.inf)[2] > 0
    assert clip_effect([4.0, -1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], 1.0, math.inf)[2] == 0


@pytest.mark.parametrize("betas", [(0.75, 1.0), (2.0, 0.5), (0.0, 3.0)])
@pytest.mark.parametrize("p, q", [((3, 1, -1, 0), (2, 0, 0, 0.5)), ((4, 1, -1, 0), (4, 0, 0, 0))])
def test_ce_gppo_gives_the_clipped_tokens_their_share_back(p, q, betas):
    effect = clip_effect([float(x) for x in p], [float(x) for x in q], 0.2, 0.2, *betas)
    assert_first_order(*effect)


def test_ce_gppo_s_weights_move_the_entropy_as_the_paper_says():
    """Of rare tokens that are clipped: punished ones (beta1) lower the entropy, rewarded ones (beta2) raise it."""
    below, above = ([4.0, -1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]), ([4.0, 1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0])
    first = [clip_effect(*below, 0.2, math.inf, beta1, 0.0)[2] for beta1 in (0.0, 0.25, 0.75, 2.0)]
    second = [clip_effect(*above, 1.0, 0.2, 0.0, beta2)[2] for beta2 in (0.0, 0.5, 1.0, 2.0)]
    assert first == sorted(first, reverse=True) and first[0] > first[-1]
    assert second == sorted(second) and second[0] < second[-1]


def test_the_logit_gradient_of_the_clipped_loss():
    """r A (onehot - p), and 0 where the clip stops the token (Jin et al., arXiv 2511.05993)."""
    g = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(400, V, generator=g, dtype=torch.float64)
    old = logits + 0.3 * torch.randn(400, V, generator=g, dtype=torch.float64)
    action = torch.randint(V, (400,), generator=g)
    advantage = torch.randn(400, generator=g, dtype=torch.float64)
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28)
    found = gradient(logits, lambda z: tokens_of(z, action, advantage, old), config=config)
    tokens = tokens_of(logits, action, advantage, old)
    ratio = (tokens.logprob - tokens.old_logprob).exp()
    stopped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
    assert 50 < int(stopped.sum()) < 200
    away = torch.nn.functional.one_hot(action, V) - logits.softmax(-1)
    expected = -(ratio * advantage * ~stopped)[:, None] * away / 400
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
