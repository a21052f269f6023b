"""The float64 oracles against hand-computed numbers, identities and finite differences.

These numbers come from outside the code: worked by hand or published, so that the oracle itself has a judge.
"""

import math

import pytest
import torch
from torch.func import jacrev

from entcov.verify import reference

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
P = (0.643914, 0.236883, 0.087144, 0.032059)
REWARD = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def exact(value, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value).double().detach(), expected.detach(), **tolerance)


def centred_advantage():
    return REWARD - (reference.log_probs(LOGITS).exp() * REWARD).sum()


def entropy(z):
    return reference.entropy_of(reference.log_probs(z))


def test_four_logits_by_hand():
    log_p = reference.log_probs(LOGITS)
    half_digit = {"atol": 6e-7, "rtol": 0}
    exact(log_p.exp(), P, **half_digit)
    exact(entropy(LOGITS), 0.947537, **half_digit)
    s = log_p.exp() * (entropy(LOGITS) + log_p)
    exact(s, (0.326688, -0.116701, -0.130076, -0.079911), **half_digit)
    exact((log_p.exp() * s).sum(), 0.168817, **half_digit)
    exact(reference.collision_of(log_p), sum(p * p for p in P), atol=2e-6, rtol=0)
    for token, s_token in enumerate((0.326688, -0.116701, -0.130076, -0.079911)):
        exact(reference.entropy_drift_of(log_p, torch.tensor(token)), -(s_token - 0.168817), atol=1.2e-6, rtol=0)


def test_entropy_gradient_is_minus_s():
    z = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(entropy(z), z)
    exact(grad, (-0.326688, 0.116701, 0.130076, 0.079911), atol=6e-7, rtol=0)


@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
def test_uniform_rows(vocab):
    log_p = reference.log_probs(torch.full((vocab,), 3.25))
    exact(reference.entropy_of(log_p), math.log(vocab), atol=1e-12, rtol=0)
    exact(reference.collision_of(log_p), 1 / vocab, atol=1e-15, rtol=0)
    exact(reference.varentropy_of(log_p), 0.0, atol=1e-15, rtol=0)
    exact(reference.entropy_drift_of(log_p, torch.tensor(0)), 0.0, atol=1e-15, rtol=0)


def test_covariances_of_the_policy_gradient_steps():
    log_p, advantage = reference.log_probs(LOGITS), centred_advantage()
    exact(advantage, (0.356086, -0.643914, -0.643914, -0.643914), atol=6e-7, rtol=0)
    exact(reference.covariance_under(log_p, log_p.exp() * advantage), 0.1016552, atol=6e-8, rtol=0)
    exact(reference.covariance_under(log_p, advantage), 0.3266881, atol=6e-8, rtol=0)


STEPS = {  # step direction per unit eta -> true entropy change at eta = .1, .01, .001
    "policy gradient": (lambda p, a: p * a, (-0.01026801, -0.001017595, -0.0001016656)),
    "natural gradient": (lambda p, a: a, (-0.0333023, -0.00327360, -0.000326756)),
}


@pytest.mark.parametrize("name", STEPS)
def test_true_entropy_change_of_a_step(name):
    direction, changes = STEPS[name]
    step = direction(reference.log_probs(LOGITS).exp(), centred_advantage())
    for eta, change in zip((0.1, 0.01, 0.001), changes, strict=True):
        # The numbers carry seven significant digits (the natural gradient's, six).
        exact(entropy(LOGITS + eta * step) - entropy(LOGITS), change, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", STEPS)
def test_halving_the_step_halves_the_relative_error_of_the_prediction(name):
    """The prediction is first order: its relative error is linear in eta. A fixed tolerance would not see a wrong
    coefficient that happens to be close; the rate does."""
    direction, _ = STEPS[name]
    step = direction(reference.log_probs(LOGITS).exp(), centred_advantage())

    def relative_error(eta):
        out = reference.logit_covariance(LOGITS, LOGITS + eta * step)
        return ((out["predicted_entropy_change"] - out["entropy_change"]) / out["entropy_change"]).abs().item()

    for eta in (0.02, 0.01, 0.005, 0.0025):
        assert relative_error(eta) / relative_error(eta / 2) == pytest.approx(2.0, rel=0.02)


def test_a_shifted_advantage_breaks_the_policy_gradient_formula_but_not_the_natural_one():
    """Cov(log p, p A) moves with a constant added to A, although the policy gradient does not."""
    log_p, advantage = reference.log_probs(LOGITS), centred_advantage()
    moved = reference.covariance_under(log_p, log_p.exp() * (advantage + 3))
    assert abs(moved - 0.1016552) > 0.1
    exact(reference.covariance_under(log_p, advantage + 3), 0.3266881, atol=6e-8, rtol=0)


def test_entropy_drift_is_the_derivative_along_the_tokens_own_gradient():
    torch.manual_seed(0)
    z = 2 * torch.randn(5, 11, dtype=torch.float64)
    target = torch.tensor([0, 3, 10, 7, 3])
    log_p = reference.log_probs(z)
    step = torch.nn.functional.one_hot(target, 11) - log_p.exp()
    eps = 1e-5
    slope = (entropy(z + eps * step) - entropy(z - eps * step)) / (2 * eps)
    exact(reference.entropy_drift_of(log_p, target), slope, atol=1e-9, rtol=1e-8)


def test_mean_drift_is_the_covariance_form():
    """E_{k~p}[drift_k * A_k] for the sampled step equals -Cov(log p, p A) when A is centred: sampling is unbiased."""
    log_p, advantage = reference.log_probs(LOGITS), centred_advantage()
    drift = torch.stack([reference.entropy_drift_of(log_p, torch.tensor(k)) for k in range(4)])
    exact((log_p.exp() * advantage * drift).sum(), -0.1016552, atol=6e-8, rtol=0)


CLAMPED = {0.0: 0.9999728, 0.2: 0.9475370, 0.4: 0.8323956, 0.6: 0.5822031}


@pytest.mark.parametrize("clamp_p", CLAMPED)
def test_clamped_entropy_by_hand(clamp_p):
    z = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])[torch.tensor([2, 0, 4, 1, 3])]
    kept = reference.kept_count(5, clamp_p, None)
    exact(reference.clamped_entropy(z, kept), CLAMPED[clamp_p], atol=6e-8, rtol=0)
    exact(reference.tied_clamped_entropy(z, kept), CLAMPED[clamp_p], atol=6e-8, rtol=0)


def test_clamped_entropy_gradient_by_hand():
    z = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    for oracle in (reference.clamped_entropy, reference.tied_clamped_entropy):
        (grad,) = torch.autograd.grad(oracle(z, 3), z)
        exact(grad, (-0.2825875, 0.1407704, 0.1418171, 0.0, 0.0), atol=6e-8, rtol=0)


def test_ties_share_the_gradient_and_leave_the_value():
    z = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    for kept in (1, 2, 3, 4, 5, 6):
        sorted_value, tied_value = reference.clamped_entropy(z, kept), reference.tied_clamped_entropy(z, kept)
        exact(tied_value, sorted_value, atol=1e-14, rtol=0)
        (by_sort,) = torch.autograd.grad(sorted_value, z)
        (shared,) = torch.autograd.grad(tied_value, z)
        assert shared[1] == shared[2] == shared[3]
        exact(shared[1:4].sum(), by_sort[1:4].sum(), atol=1e-14, rtol=0)
        exact(shared[[0, 4, 5]], by_sort[[0, 4, 5]], atol=1e-14, rtol=0)


def test_columns_of_minus_infinity_are_absent():
    z = torch.tensor([1.0, -torch.inf, 0.5, -torch.inf, 2.0], dtype=torch.float64, requires_grad=True)
    finite = z.detach()[[0, 2, 4]].requires_grad_()
    full, short = (reference.token_stats(x, torch.tensor(0)) for x in (z, finite))
    for name in short:
        exact(full[name], short[name], atol=1e-14, rtol=0)
    for oracle in (
        entropy,
        lambda x: reference.logit_covariance(2 * x.detach(), x)["kl"],
        lambda x: reference.logit_covariance(2 * x.detach(), x)["covariance"],
    ):
        (grad,), (grad_short,) = torch.autograd.grad(oracle(z), z), torch.autograd.grad(oracle(finite), finite)
        exact(grad[[0, 2, 4]], grad_short, atol=1e-14, rtol=0)
        assert torch.equal(grad[[1, 3]], torch.zeros(2, dtype=torch.float64))


def test_kl_and_entropy_change_against_two_distributions_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = 3/4 ln(3/2) + 1/4 ln(1/2); H goes from .562335 to ln 2."""
    old, new = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 1.0]).log()
    out = reference.logit_covariance(old, new)
    exact(out["kl"], 0.75 * math.log(1.5) + 0.25 * math.log(0.5), atol=1e-7, rtol=0)
    exact(out["entropy_change"], math.log(2) - 0.5623351446, atol=1e-7, rtol=0)
    # Cov(log p, dz) over two outcomes: p (1 - p) (log p1 - log p2) (dz1 - dz2) = 3/16 * ln 3 * (-ln 3)
    exact(out["covariance"], -3 / 16 * math.log(3) ** 2, atol=1e-7, rtol=0)


def test_gradients_of_the_covariance_outputs_have_their_closed_forms():
    """(16): dKL = (q - p)/T, dCov = p (log p + H_p)/T, d(dH) = -q (log q + H_q)/T."""
    torch.manual_seed(1)
    old, new, temperature = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64), 0.7
    grads = jacrev(lambda z: reference.logit_covariance(old, z, temperature=temperature))(new)
    log_p, log_q = (reference.log_probs(z, temperature) for z in (old, new))
    p, q = log_p.exp(), log_q.exp()
    s_p, s_q = p * (log_p + reference.entropy_of(log_p)), q * (log_q + reference.entropy_of(log_q))
    closed = {"kl": q - p, "covariance": s_p, "predicted_entropy_change": -s_p, "entropy_change": -s_q}
    for name, expected in closed.items():
        exact(grads[name], expected / temperature, atol=1e-13, rtol=0)


def test_ignored_rows_are_zero_and_pass_no_gradient():
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        z[1] = torch.nan
    out = reference.token_stats(z, torch.tensor([1, -100, 4]), top_k=2)
    assert all(value[1] == 0 and value.isfinite().all() for value in out.values())
    (grad,) = torch.autograd.grad(sum(value.sum() for value in out.values()), z)
    assert torch.equal(grad[1], torch.zeros(5, dtype=torch.float64)) and grad.isfinite().all()


def test_vocab_size_and_temperature():
    z = torch.randn(4, 9, dtype=torch.float64)
    padded = torch.cat((z, torch.full((4, 3), 50.0, dtype=torch.float64)), dim=-1)
    target = torch.tensor([0, 8, 3, 3])
    direct = reference.token_stats(z / 0.5, target, clamp_p=0.3)
    through = reference.token_stats(padded, target, vocab_size=9, temperature=0.5, clamp_p=0.3)
    for name in direct:
        exact(through[name], direct[name], atol=1e-13, rtol=1e-13)
