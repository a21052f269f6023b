"""logit_covariance on one process: the covariance, both entropy changes, the KL, and their gradients."""

import math

import pytest
import torch

from entcov.stats.logit_covariance import logit_covariance
from entcov.verify import reference
from entcov.verify.check import check_rows
from entcov.verify.row_kinds import KINDS

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
OUTPUTS = ("covariance", "predicted_entropy_change", "entropy_change", "kl")


def random_pair(T=6, V=37, scale=0.3, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    old = 3 * torch.randn(T, V, generator=rng)
    return old.to(dtype), (old + scale * torch.randn(T, V, generator=rng)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_against_float64(kind):
    rows = list(check_rows(shapes=[(5, 1), (5, 8), (3, 1000), (1, 32000)], kinds=[kind], ops=["logit_covariance"]))
    failed = [row.cells() for row in rows if not row.passed]
    assert rows and not failed, failed


@pytest.mark.parametrize(
    "step, covariance, changes",
    [
        # The policy gradient's step p A and the natural gradient's A, with A = (1, 0, 0, 0) centred under p, worked by
        # hand: their covariances with log p, and the true entropy change at eta = .1 and .01.
        ("policy", 0.1016552, (-0.01026801, -0.001017595)),
        ("natural", 0.3266881, (-0.0333023, -0.00327360)),
    ],
)
def test_the_steps_of_both_theorems_by_hand(step, covariance, changes):
    p = LOGITS.softmax(-1)
    advantage = torch.tensor([1.0, 0.0, 0.0, 0.0]) - p[0]
    direction = p * advantage if step == "policy" else advantage
    for eta, change in zip((0.1, 0.01), changes, strict=True):
        out = logit_covariance(LOGITS[None], (LOGITS + eta * direction)[None])
        # The new logits are rounded to fp32, which moves both numbers by up to 1e-7.
        assert out.covariance.item() == pytest.approx(eta * covariance, abs=2e-7)
        assert out.predicted_entropy_change.item() == -out.covariance.item()
        assert out.entropy_change.item() == pytest.approx(change, abs=3e-7)


def test_the_predicted_change_has_the_gradient_of_the_covariance_negated():
    old, new = random_pair()
    weight = torch.linspace(0.5, 1.5, len(old))

    def gradient(loss):
        leaf = new.clone().requires_grad_()
        return torch.autograd.grad((weight * loss(logit_covariance(old, leaf))).sum(), leaf)[0]

    covariance, kl = (gradient(lambda out, name=name: getattr(out, name)) for name in ("covariance", "kl"))
    assert torch.equal(gradient(lambda out: out.predicted_entropy_change), -covariance) and covariance.any()
    torch.testing.assert_close(
        gradient(lambda out: 3 * out.covariance + out.predicted_entropy_change + out.kl), 2 * covariance + kl
    )


def test_halving_the_step_halves_the_relative_error_of_the_prediction():
    """Steps large enough for fp32 to resolve the error; summed over rows, since one row's second order may vanish."""
    old, _ = random_pair(T=16, V=20)
    direction = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))

    def relative_error(eta):
        out = logit_covariance(old, old + eta * direction, temperature=0.8)
        error = (out.predicted_entropy_change - out.entropy_change).abs().sum()
        return (error / out.entropy_change.abs().sum()).item()

    for eta in (0.04, 0.02):
        assert relative_error(eta) / relative_error(eta / 2) == pytest.approx(2.0, rel=0.05)


def test_identical_logits_change_nothing():
    old, _ = random_pair()
    out = logit_covariance(old, old.clone())
    assert (out.kl == 0).all() and (out.covariance == 0).all()
    assert (out.entropy_change.abs() < 1e-6).all()  # the two sides may round their last bit differently
    shifted = logit_covariance(old, old + 64)  # a constant of the row is no change; 64 keeps most of the bits
    assert all((value.abs() < 2e-5).all() for value in shifted)


def test_two_outcomes_by_hand():
    """p = (3/4, 1/4) to q = (1/2, 1/2)."""
    out = logit_covariance(torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2))
    assert out.kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert out.covariance.item() == pytest.approx(-3 / 16 * math.log(3) ** 2, abs=1e-6)
    assert out.entropy_change.item() == pytest.approx(math.log(2) - 0.5623351446, abs=1e-6)


def test_leading_dims_mask_and_padding():
    old, new = random_pair(T=6, V=40)
    old[3], new[4], old[:, 33:], new[:, 33:] = torch.nan, -torch.inf, torch.nan, 7.0
    mask = torch.tensor([True, True, False, False, False, True]).view(2, 3)
    leaf = new.view(2, 3, 40).requires_grad_()
    out = logit_covariance(old.view(2, 3, 40), leaf, vocab_size=33, temperature=0.7, loss_mask=mask)
    expected = reference.logit_covariance(old, new.detach(), vocab_size=33, temperature=0.7)
    for name in OUTPUTS:
        value = getattr(out, name)
        assert value.shape == (2, 3) and (value[~mask] == 0).all()
        torch.testing.assert_close(value[mask].double(), expected[name][mask.flatten()], rtol=1e-5, atol=2e-5)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in out), leaf)
    assert (grad[~mask] == 0).all() and (grad[..., 33:] == 0).all() and (grad[mask][:, :33] != 0).any()


def test_minus_infinity_before_and_after():
    old, new = random_pair()
    old[0, 3] = new[0, 3] = -torch.inf  # absent on both sides
    old[1, 4] = -torch.inf  # appears: no probability before, so it does not count
    new[2, 5] = -torch.inf  # disappears
    out, expected = logit_covariance(old, new), reference.logit_covariance(old, new)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(out, name)[:2].double(), expected[name][:2], rtol=1e-5, atol=2e-5)
    assert out.kl[2] == torch.inf and expected["kl"][2] == torch.inf
    assert all(value[3:].isfinite().all() for value in out)


def test_nan_stays_in_its_row():
    old, new = random_pair()
    clean = logit_covariance(old, new)
    old[1, 2], new[3, 0] = torch.nan, torch.nan
    for value, before in zip(logit_covariance(old, new), clean, strict=True):
        assert value[[1, 3]].isnan().all() and torch.equal(value[[0, 2, 4, 5]], before[[0, 2, 4, 5]])


def test_old_logits_are_constant_and_nothing_is_written():
    old, new = (x.requires_grad_() for x in random_pair())
    versions = old._version, new._version
    out = logit_covariance(old, new)
    loss = out.kl.sum() + out.predicted_entropy_change.sum() - out.entropy_change.sum()
    first, second = (torch.autograd.grad(loss, new, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and versions == (old._version, new._version)
    loss.backward()
    assert old.grad is None


def test_a_second_derivative_is_an_error():
    old, new = random_pair()
    new.requires_grad_()
    (grad,) = torch.autograd.grad(logit_covariance(old, new).kl.sum(), new, create_graph=True)
    with pytest.raises(RuntimeError, match="logit_covariance has no second derivative"):
        grad.sum().backward()


def test_fullgraph_compile_and_no_tokens():
    old, new = random_pair()
    new.requires_grad_()

    def loss(old, new, mask):
        out = logit_covariance(old * 1.0, new * 2.0, temperature=0.9, loss_mask=mask)
        return out.kl.sum() + out.predicted_entropy_change.sum() + out.entropy_change.mean()

    mask = torch.tensor([True, False, True, True, True, False])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for run_mask in (mask, None):
        expected, got = loss(old, new, run_mask), compiled(old, new, run_mask)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, new), torch.autograd.grad(expected, new))
    assert all(x.shape == (0,) for x in logit_covariance(torch.empty(0, 5), torch.empty(0, 5)))


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        (dict(logits_new=torch.zeros(6, 36)), ValueError, r"logits_old must have the shape of logits_new.*\(6, 36\)"),
        (dict(logits_new=torch.zeros(6, 37, dtype=torch.float16)), TypeError, "dtype of logits_new"),
        (dict(loss_mask=torch.ones(5, dtype=torch.bool)), ValueError, "loss_mask must have the leading shape"),
        (dict(loss_mask=torch.ones(6)), TypeError, "mask must be torch.bool"),
        (dict(logits_old=torch.full((6, 37), -torch.inf)), ValueError, "logits_old: 6 rows have no finite logit"),
        (dict(temperature=-1.0), ValueError, "temperature must be positive"),
        (dict(vocab_size=99), ValueError, r"vocab_size must be in \[1, 37\]"),
    ],
)
def test_bad_arguments_are_named(changes, kind, message):
    old, new = random_pair()
    with pytest.raises(kind, match=message):
        logit_covariance(**{"logits_old": old, "logits_new": new, **changes})


@pytest.mark.parametrize("V", [1000, 151936])
def test_a_flat_row_that_becomes_peaked_keeps_its_digits(V):
    """L_new - L_old as log1p((rest_new - rest_old) / (1 + rest_old)) is the logarithm of nearly 0 there: entropy change
    and KL were off by 1e-4 at V = 2,153 and by more at larger V. In closed form: one column rises by a."""
    old = torch.zeros(2, V)
    new = old.clone()
    new[:, V // 3] = torch.tensor([25.0, 30.0])
    out = logit_covariance(old, new)
    a = new[:, V // 3].double()
    rest = (V - 1) * (-a).exp()
    entropy = rest.log1p() + a * rest / (1 + rest)
    kl = a + rest.log1p() - math.log(V) - a / V
    torch.testing.assert_close(out.entropy_change.double(), entropy - math.log(V), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.kl.double(), kl, rtol=1e-6, atol=0)
    back = logit_covariance(new, old)
    torch.testing.assert_close(back.entropy_change.double(), math.log(V) - entropy, rtol=1e-6, atol=0)
