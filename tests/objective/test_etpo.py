"""ETPO on tabular policies: a token MDP solved over whole actions, the policy that minimises, hand numbers."""

import itertools
import math

import pytest
import torch

from entcov.objective.etpo import critic_loss, etpo_policy_loss, expected_value, token_targets

BETA, GAMMA, V = 0.5, 0.9, 3
ACTIONS = list(itertools.product(range(V), repeat=2))  # two tokens
NEXT = {0: lambda a: 1 + sum(a) % 2, 1: lambda a: None, 2: lambda a: None}  # states 1 and 2 end the episode


def rows(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boltzmann(ref_logits, q, beta=BETA):
    return (ref_logits.log_softmax(-1) + q / beta).log_softmax(-1)


def test_the_targets_fixed_point_is_the_soft_optimum_over_whole_actions():
    """The paper's consistency: V*(s) = beta log sum_a rho(a|s) exp((r + gamma V*(s')) / beta) over all nine actions."""
    reward = dict(zip(itertools.product(range(3), ACTIONS), rows(27, seed=0).tolist(), strict=True))
    keys = [(s, prefix) for s in range(3) for prefix in [(), *((w,) for w in range(V))]]
    rho = {key: row.log_softmax(-1) for key, row in zip(keys, rows(len(keys), V, seed=1), strict=True)}

    best, whole = {None: 0.0}, {}
    for s in (2, 1, 0):
        logits = torch.tensor([
            float(rho[s, ()][a[0]] + rho[s, a[:1]][a[1]]) + (reward[s, a] + GAMMA * best[NEXT[s](a)]) / BETA
            for a in ACTIONS
        ], dtype=torch.float64)  # fmt: skip
        best[s], whole[s] = BETA * float(logits.logsumexp(0)), logits.log_softmax(0)

    q = {key: torch.zeros(V, dtype=torch.float64) for key in keys}
    for _ in range(4):  # as many tokens as an episode has
        policy = {key: boltzmann(rho[key], q[key]) for key in keys}
        following = {key: row.clone() for key, row in q.items()}
        for first, second in itertools.product(ACTIONS, repeat=2):
            states = [0, NEXT[0](first)]
            value, kl = torch.zeros(2, 3, 2, dtype=torch.float64)
            for s, j in itertools.product(range(2), repeat=2):
                key = (states[s], (first, second)[s][:j])
                value[s, j], kl[s, j] = expected_value(policy[key], rho[key], q[key])
            earned = torch.tensor([reward[states[0], first], reward[states[1], second]], dtype=torch.float64)
            alive, length = torch.tensor([True, False]), torch.tensor([2, 2])
            target = token_targets(value, kl, earned, alive, length, beta=BETA, gamma=GAMMA)
            for s, a in enumerate((first, second)):
                for j in range(2):
                    following[states[s], a[:j]][a[j]] = target[s, j]
        q = following
    for s in range(3):
        value, kl = expected_value(boltzmann(rho[s, ()], q[s, ()]), rho[s, ()], q[s, ()])
        assert float(value - BETA * kl) == pytest.approx(best[s], rel=1e-12)
        chained = [boltzmann(rho[s, ()], q[s, ()])[a[0]] + boltzmann(rho[s, a[:1]], q[s, a[:1]])[a[1]] for a in ACTIONS]
        assert torch.stack(chained).tolist() == pytest.approx(whole[s].tolist(), abs=1e-12)


def test_targets_by_hand():
    """Two actions of one and two tokens; beta .5, gamma .9; the divergence of the step after it in the code."""
    value = torch.tensor([[1.0, 9.0], [2.0, 3.0], [4.0, 9.0]])
    kl = torch.tensor([[0.2, 9.0], [0.4, 0.6], [0.8, 1.0]])
    parts = value, kl, torch.tensor([0.5, 1.0]), torch.tensor([True, False]), torch.tensor([1, 2])
    paper = token_targets(*parts, beta=0.5, gamma=0.9)
    assert paper.flatten().tolist() == pytest.approx([0.5 + 0.9 * (2 - 0.2), 0.0, 3 - 0.3, 1.0])
    code = token_targets(*parts, beta=0.5, gamma=0.9, semantics="reference")
    assert code.flatten().tolist() == pytest.approx([0.5 + 0.9 * (2 - 0.2), 0.0, 3 - 0.5, 1.0])
    parts[3][1] = True
    assert float(token_targets(*parts, beta=0.5, gamma=0.9)[1, 1]) == pytest.approx(1 + 0.9 * (4 - 0.4))


def loss_of(logits, ref, q, **options):
    return etpo_policy_loss(logits, ref, q, torch.ones(len(logits), dtype=torch.bool), beta=BETA, **options)


def test_the_loss_is_the_divergence_from_the_boltzmann_policy():
    logits, ref, q = rows(4, 5, seed=2), rows(4, 5, seed=3), rows(4, 5, seed=4)
    best = boltzmann(ref, q).requires_grad_()
    least = loss_of(best, ref, q)
    log_z = (ref.log_softmax(-1) + q / BETA).logsumexp(-1)
    assert least.item() == pytest.approx(-BETA * float(log_z.mean()), rel=1e-12)
    assert torch.autograd.grad(least, best)[0].abs().max() < 1e-15
    logp = logits.log_softmax(-1)
    divergence = BETA * (logp.exp() * (logp - best.detach())).sum(-1).mean()
    assert loss_of(logits, ref, q).item() - least.item() == pytest.approx(float(divergence), rel=1e-12)


def test_a_step_lowers_the_loss_as_its_gradient_says_with_an_error_of_first_order():
    logits, ref, q = rows(4, 5, seed=2).requires_grad_(), rows(4, 5, seed=3), rows(4, 5, seed=4)
    loss = loss_of(logits, ref, q)
    (gradient,) = torch.autograd.grad(loss, logits)
    # of a softmax under E[f]: p (f - E[f]), with f = beta (log pi - log rho) - Q, whose own gradient is 0 on average
    logp = logits.detach().log_softmax(-1)
    f = BETA * (logp - ref.log_softmax(-1)) - q
    p = logp.exp()
    assert torch.allclose(gradient, p * (f - (p * f).sum(-1, keepdim=True)) / 4, atol=1e-15)
    errors = []
    for eta in (0.04, 0.02, 0.01):
        change = loss_of(logits.detach() - eta * gradient, ref, q).item() - loss.item()
        errors.append(abs(change / (-eta * float(gradient.square().sum())) - 1))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05) and errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_the_published_code_s_loss_never_looks_at_the_critic():
    logits, ref, q = rows(4, 5, seed=2).requires_grad_(), rows(4, 5, seed=3), rows(4, 5, seed=4)
    loss = loss_of(logits, ref, q, semantics="reference")
    assert loss.item() == pytest.approx((BETA * logits.log_softmax(-1) - q).mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, BETA * (1 / 5 - logits.softmax(-1)) / 4, atol=1e-15)


def test_both_parts_have_gradients_on_both_sides_and_impossible_tokens_have_none():
    logits, ref, q = (rows(2, 4, seed=s).requires_grad_() for s in (5, 6, 7))
    assert torch.autograd.gradcheck(expected_value, (logits, ref, q))
    shut = logits.detach().clone()
    shut[:, 3] = -math.inf
    shut.requires_grad_()
    closed_ref = torch.where(shut.detach() > -math.inf, ref.detach(), -math.inf)
    wild = torch.where(shut.detach() > -math.inf, q.detach(), math.nan)
    value, kl = expected_value(shut, closed_ref, wild)
    less = expected_value(shut[:, :3], closed_ref[:, :3], wild[:, :3])
    assert torch.equal(value, less[0]) and torch.allclose(kl, less[1], atol=1e-15)
    (gradient,) = torch.autograd.grad((value - kl).sum(), shut)
    assert gradient.isfinite().all() and not gradient[:, 3].any()


def test_rows_outside_the_mask_may_hold_anything():
    logits, ref, q = rows(3, 4, seed=5), rows(3, 4, seed=6), rows(3, 4, seed=7)
    mask = torch.tensor([True, False, True])
    kept = [x[mask] for x in (logits, ref, q)]
    logits[1], q[1] = math.nan, math.nan
    logits.requires_grad_()
    loss = etpo_policy_loss(logits, ref, q, mask, beta=BETA)
    assert loss.item() == pytest.approx(loss_of(*kept).item())
    assert not torch.autograd.grad(loss, logits)[0][1].any()

    q, token, target = (
        rows(3, 4, seed=7).requires_grad_(),
        torch.tensor([1, -100, 2]),
        torch.tensor([0.5, math.nan, -1.0]),
    )
    loss = critic_loss(q, token, target.double(), mask)
    assert loss.item() == pytest.approx(((q[0, 1] - 0.5) ** 2 + (q[2, 2] + 1) ** 2).item() / 4)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[0, 1], expected[2, 2] = (q[0, 1].item() - 0.5) / 2, (q[2, 2].item() + 1) / 2
    assert torch.allclose(torch.autograd.grad(loss, q)[0], expected)


ONE, MASK = torch.zeros(2, 3), torch.tensor([True, True])
STEPS = (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2), MASK, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: etpo_policy_loss(ONE, ONE, ONE, MASK, beta=0.0), "beta must be greater than 0, got 0.0"),
        (lambda: etpo_policy_loss(ONE, ONE, ONE, MASK, semantics="code"), "semantics must be one of paper, reference"),
        (lambda: etpo_policy_loss(ONE, ONE[:1], ONE, MASK), r"ref_logits must have shape \[T, V\] with T = 2, got"),
        (lambda: etpo_policy_loss(ONE, ONE, ONE, ~MASK), "loss_mask must have a True token, got none"),
        (
            lambda: expected_value(ONE, ONE[:, :2], ONE),
            r"ref_logits must have the shape \[..., V\] of logits, \(2, 3\)",
        ),
        (lambda: expected_value(ONE, ONE, ONE.double()), "q must be torch.float32 or torch.float64, as the others"),
        (lambda: token_targets(*STEPS, gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (lambda: token_targets(ONE, *STEPS[1:]), r"expected_q must have shape \[S \+ 1, J\] with S = 2 and J > 0"),
        (lambda: token_targets(*STEPS[:4], torch.tensor([0, 3])), r"length must be in \[1, 2\], got \[0, 3\]"),
        (lambda: token_targets(*STEPS[:3], torch.ones(2), STEPS[4]), "alive must be torch.bool, got torch.float32"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
