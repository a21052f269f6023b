"""Tabular softmax policies: one gradient step of `policy_loss` on the logits, and the exact change of the entropy."""

import torch
from torch import Tensor

from entcov.controls import begin, mini_batch_totals, select
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.verify import reference
from tests.support.objective_oracle import PROGRESS

UNCLIPPED = PolicyLossConfig(clip_low=1.0, clip_high=float("inf"))


def tokens_of(logits: Tensor, action: Tensor, advantage: Tensor, old: Tensor | None = None, **fields: Tensor) -> Tokens:
    """One token a state: `action` [T] in the state of its row of `logits` [T, V]; `old` [T, V] is what sampled it."""
    log_p = reference.log_probs(logits)
    old_log_p = log_p.detach() if old is None else reference.log_probs(old)
    taken = action[:, None]
    ids = torch.arange(len(action))
    return Tokens(
        log_p.gather(1, taken)[:, 0],
        old_log_p.gather(1, taken)[:, 0],
        advantage,
        torch.ones(len(action), dtype=torch.bool),
        entropy=reference.entropy_of(log_p),
        entropy_drift=reference.entropy_drift_of(log_p, action).detach(),
        **{"token_id": ids, "sequence": ids, "group": ids, "position": 0 * ids, "sequence_length": 1 + 0 * ids}
        | fields,
    )


def gradient(logits: Tensor, make, controls=(), config: PolicyLossConfig = UNCLIPPED) -> Tensor:
    """d loss / d logits of the mini-batch that `make(logits)` gives, with all moments of the controls."""
    logits = logits.clone().requires_grad_()
    tokens = make(logits)
    scored = Tokens(**{n: v.detach() for n, v in vars(tokens).items() if v is not None})
    shaped = begin(controls, scored, PROGRESS)
    tokens.advantage = shaped.advantage
    if shaped.drop is not None:
        tokens.loss_mask = tokens.loss_mask & ~shaped.drop
    detached = Tokens(**{n: v.detach() for n, v in vars(tokens).items() if v is not None})
    selections, _ = select(controls, [detached], step=0, config=config)
    totals = mini_batch_totals([detached], selections)
    loss, _ = policy_loss(tokens, config, totals=totals, controls=controls, selections=selections[0])
    return torch.autograd.grad(loss, logits)[0]


def entropy_change(logits: Tensor, step: Tensor) -> float:
    """Of the sum over the states, by the step: exact."""
    before, after = (reference.entropy_of(reference.log_probs(z)) for z in (logits, logits + step))
    return float((after - before).sum())


def assert_first_order(logits: Tensor, direction: Tensor, predicted: float, sizes=(1e-2, 5e-3, 2.5e-3)) -> None:
    """The entropy changes by size * predicted along `direction`, with a relative error that halves with the size."""
    errors = [entropy_change(logits, size * direction) / (size * predicted) - 1 for size in sizes]
    for large, small in zip(errors, errors[1:], strict=False):
        assert 1.9 < large / small < 2.1, errors
    assert abs(errors[-1]) < 0.05, errors
