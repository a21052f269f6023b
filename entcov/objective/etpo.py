"""ETPO: soft Bellman targets for every token, and the policy's loss against a critic over the whole vocabulary.

Not part of the trainer: it wants a critic with a value for every token of the vocabulary, and episodes of actions.

An episode has S steps; at each the policy writes an action of up to J tokens and the environment returns a reward. With
the policy pi, a frozen reference rho and the critic's values Q, all [..., V] at one state, the soft value is

    V = E_{w ~ pi}[Q(w)] - beta KL(pi || rho)

Source: Wen et al., "Entropy-Regularized Token-Level Policy Optimization for Language Agent Reinforcement",
arXiv 2402.06700 (per-token soft Bellman update, beta 0.01, gamma 0.99); the authors' code, morning9393/ETPO
etpo/utils/language_buffer.py and etpo/trainers/llm_trainer_etpo.py, for the two places with semantics="reference". Our
reading: the reference's term in the policy's loss, without which the policy that minimises it is not the one whose
value the targets are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from entcov import arguments as check

SEMANTICS = ("paper", "reference")
_FLOAT = (torch.float32, torch.float64)


def expected_value(logits: Tensor, ref_logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """E_{w ~ pi}[Q(w)] and KL(pi || rho) of every state, the two parts of its soft value.

    Equivalent to, with p = softmax(logits):  (p * q).sum(-1), (p * (log p - log_softmax(ref_logits))).sum(-1)

    Args:
        logits, ref_logits, q: [..., V] float32 or float64, of the policy, the reference and the critic. A logit of -inf
            is a token of probability 0, whose value does not count; the reference's only where the policy's is.
    Returns: two tensors [...]; the KL in nats. Differentiable in all three arguments.
    Raises: TypeError or ValueError for dtypes or shapes.
    """
    for name, value in (("logits", logits), ("ref_logits", ref_logits), ("q", q)):
        _floats(name, value, logits)
        if value.shape != logits.shape or value.dim() < 1:
            raise ValueError(f"{name} must have the shape [..., V] of logits, {_shape(logits)}, got {_shape(value)}")
    logp = logits.log_softmax(-1)
    possible = logp > -torch.inf
    p = logp.exp()
    gap = torch.where(possible, logp - ref_logits.log_softmax(-1), 0.0)
    return (p * torch.where(possible, q, 0.0)).sum(-1), (p * gap).sum(-1)


@torch.no_grad()
def token_targets(
    expected_q: Tensor,
    kl: Tensor,
    reward: Tensor,
    alive: Tensor,
    length: Tensor,
    *,
    beta: float = 0.01,
    gamma: float = 0.99,
    semantics: str = "paper",
) -> Tensor:
    """What the critic's value of each token that was taken is fitted to.

    With V[s, j] = expected_q[s, j] - beta kl[s, j], the state before token j of step s:

        target[s, j] = V[s, j + 1]                                       inside an action: no discount
        target[s, last] = reward[s] + gamma alive[s] V[s + 1, 0]

    semantics="reference" is the authors' code, which takes kl[s + 1, j + 1] beside expected_q[s, j + 1], so another
    state's divergence. The last token is as in the paper.

    Args:
        expected_q, kl: [S + 1, J] float, from `expected_value` with the target critic; the last row is read in column 0
            (in all columns by "reference"), and is the state after the last step.
        reward: [S] float. alive: [S] bool, False where the episode ended with this step.
        length: [S] int64 in [1, J], tokens of each action.
    Returns: [S, J], 0 behind an action's end. Not differentiable.
    Raises: TypeError or ValueError for dtypes, shapes or values.
    """
    _knobs(beta, semantics)
    check.number("gamma", gamma, 0.0, 1.0)
    steps, most = len(reward), expected_q.shape[-1] if expected_q.dim() else 0
    for name, value, shape in (
        ("expected_q", expected_q, (steps + 1, most)), ("kl", kl, (steps + 1, most)), ("reward", reward, (steps,)),
    ):  # fmt: skip
        _floats(name, value, expected_q)
        if value.shape != shape or not most:
            raise ValueError(f"{name} must have shape [S{' + 1, J' if len(shape) > 1 else ''}] with S = {steps} and "
                             f"J > 0, got {_shape(value)}")  # fmt: skip
    check.vector("alive", alive, (torch.bool,), reward)
    check.vector("length", length, (torch.int64,), reward)
    if check.readable(length) and bool(((length < 1) | (length > most)).any()):
        raise ValueError(f"length must be in [1, {most}], got {length.tolist()}")
    following = slice(0, steps) if semantics == "paper" else slice(1, steps + 1)
    inside = F.pad(expected_q[:steps, 1:] - beta * kl[following, 1:], (0, 1))
    after = reward + gamma * (alive * (expected_q[1:, 0] - beta * kl[1:, 0]))
    token = torch.arange(most, device=reward.device)
    target = torch.where(token == length[:, None] - 1, after[:, None], inside)
    return torch.where(token < length[:, None], target, 0.0)


def critic_loss(q: Tensor, token: Tensor, target: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of (Q(token) - target)^2 / 2 over the masked tokens.

    Args: q: [T, V] float; token: [T] int64; target: [T] float; loss_mask: [T] bool with at least one True.
    Returns: 0-d, differentiable in q.
    """
    _matrix("q", q, loss_mask)
    check.vector("target", target, _FLOAT, loss_mask)
    check.vector("token", token, (torch.int64,), loss_mask)
    taken = q[loss_mask].gather(-1, token[loss_mask][:, None])[:, 0]
    return 0.5 * _mean((taken - target[loss_mask].detach()).square())


def etpo_policy_loss(
    logits: Tensor, ref_logits: Tensor, q: Tensor, loss_mask: Tensor, *, beta: float = 0.01, semantics: str = "paper"
) -> Tensor:
    """The policy's loss, a mean over the masked tokens.

        paper      -(E_{w ~ pi}[Q(w)] - beta KL(pi || rho))            the soft value, with its sign changed
        reference  (1 / V) sum_w (beta log pi(w) - Q(w))               every token of the vocabulary weighs the same

    The paper's is beta KL(pi || B) - beta log Z with the Boltzmann policy B(w) = rho(w) exp(Q(w) / beta) / Z, so B
    minimises it. In the code that was published the line with the expectation is commented out: what is left has the
    gradient beta (1/V - pi) by the logits, in which neither the critic nor the reference occurs.

    Args:
        logits, ref_logits, q: [T, V] float32 or float64; q is a constant here.
        loss_mask: [T] bool with at least one True. Rows outside it may hold anything.
        semantics: "paper" (default, for the other does not learn from the critic) or "reference".
    Returns: 0-d, differentiable in logits (under "paper" through the expectation's weights too) and ref_logits.
    Raises: TypeError or ValueError for dtypes, shapes or values.
    """
    _knobs(beta, semantics)
    for name, value in (("logits", logits), ("ref_logits", ref_logits), ("q", q)):
        _matrix(name, value, loss_mask)
    logits, ref_logits, q = logits[loss_mask], ref_logits[loss_mask], q[loss_mask].detach()
    if semantics == "reference":
        return _mean((beta * logits.log_softmax(-1) - q).mean(-1))
    value, kl = expected_value(logits, ref_logits, q)
    return _mean(beta * kl - value)


def _mean(value: Tensor) -> Tensor:
    if len(value) == 0:
        raise ValueError("loss_mask must have a True token, got none")
    return value.mean()


def _knobs(beta: float, semantics: str) -> None:
    check.positive("beta", beta)
    check.one_of("semantics", semantics, SEMANTICS)


def _matrix(name: str, value: Tensor, mask: Tensor) -> None:
    check.vector("loss_mask", mask, (torch.bool,))
    _floats(name, value, value)
    if value.dim() != 2 or len(value) != len(mask):
        raise ValueError(f"{name} must have shape [T, V] with T = {len(mask)}, got {_shape(value)}")


def _floats(name: str, value: Tensor, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _FLOAT or value.dtype != like.dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be torch.float32 or torch.float64, as the others, got {got}")


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
