"""The first-order change of the entropy against the measured one, over five decades of step sizes.

To first order a change dz of the logits changes the entropy by -Cov_{a~p}(log p_a, dz_a) (docs/math.md (13)); what is
left is of second order, so it falls a hundredfold where the step falls tenfold: a slope of 2.

Tables of logits: 16 states with 50 actions, logits drawn with a standard deviation of 2, advantages drawn and centred
under the policy. Four steps, each predicted from what is known before it:
    policy gradient     dz = eta p A              -eta Cov(log p, p A)      Cui et al., arXiv 2505.22617, theorem 1
    natural gradient    dz = eta A                -eta Cov(log p, A)        theorem 2
    sampled gradient    of `entcov.policy_loss`   eta mean(entropy_drift A) over 256 sampled tokens of each state
    AdamW               of that gradient          no theorem knows its dz: -Cov(log p, dz) of the step as it was made
There the change is known in float64, and `entcov.logit_covariance` (float32) is compared with it.

Transformers of this project: two layers, some thousand weights, taught one-digit addition, then one rollout of 128
responses scored as in training, and one step on it by gradient descent or by AdamW (whose averages come from four
other parts of the rollout). Changes are those of the logits at the response tokens. Here entropy_drift A says what the
token's own gradient would do to its own distribution, as if the logits were the weights.

Nothing is chosen: every seed is reported (tables 0 to 9, transformers 0 to 2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.rl.batch import Batch
from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from entcov.studies.small_policy import response_rows, small_policy

STATES, ACTIONS, SAMPLES = 16, 50, 256
UNCLIPPED = PolicyLossConfig(clip_low=1.0, clip_high=math.inf)
PROMPTS = 16

Rows = list[dict[str, float]]


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def covariance(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cov_{a~p}(x_a, y_a) over the last dimension."""
    return (p * x * y).sum(-1) - (p * x).sum(-1) * (p * y).sum(-1)


def compared(old: Tensor, new: Tensor, predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over the rows of [T, V] logits. predicted, truth: [T], of the entropy change.

    error: mean |predicted - truth|; size: mean |truth|; product_*: `logit_covariance` in float32 in place of both;
    correlation: of predicted and truth over the rows; kl: KL(old || new).
    """
    found = logit_covariance(old.float(), new.float())
    return {
        "error": float((predicted - truth).abs().mean()),
        "size": float(truth.abs().mean()),
        "product_error": float((found.predicted_entropy_change - found.entropy_change).abs().mean()),
        "rounding": float((found.entropy_change - truth).abs().mean()),
        "correlation": float(np.corrcoef(predicted.numpy(), truth.numpy())[0, 1]),
        "kl": float(found.kl.double().mean()),
    }


# ---- tables of logits ------------------------------------------------------------------------------------------------


def table(seed: int, steps: Sequence[float]) -> dict[str, Rows]:
    """Rows of `compared` by kind of step."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    p = logits.softmax(-1)
    advantage = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    advantage -= (p * advantage).sum(-1, keepdim=True)
    action = torch.multinomial(p, SAMPLES, replacement=True, generator=g)
    gradient, drift = sampled_gradient(logits, action, advantage.gather(1, action))
    log_p = logits.log_softmax(-1)
    moves = {  # kind -> (dz, predicted change of the entropy) of a step of size eta
        "policy gradient": lambda eta: (eta * p * advantage, -eta * covariance(p, log_p, p * advantage)),
        "natural gradient": lambda eta: (eta * advantage, -eta * covariance(p, log_p, advantage)),
        "sampled gradient": lambda eta: (-eta * gradient, eta * drift),
        "AdamW": lambda eta: (dz := adamw_step(logits, gradient, eta), -covariance(p, log_p, dz)),
    }
    rows = {}
    for kind, move in moves.items():
        rows[kind] = []
        for eta in steps:
            change, predicted = move(eta)
            truth = entropy((logits + change).log_softmax(-1)) - entropy(log_p)
            own = {"eta": eta} | compared(logits, logits + change, predicted, truth)
            if kind == "AdamW":  # what the gradient's drift says of it
                own["of_drift"] = float(np.corrcoef(drift.numpy(), truth.numpy())[0, 1])
            rows[kind].append(own)
    return rows


def sampled_gradient(logits: Tensor, action: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the loss [S, V], mean over samples of entropy_drift * advantage [S]), for action, advantage [S, n].

    The loss is the mean over the n samples of a state, summed over states.
    """
    samples = action.shape[1]
    free = logits.float().requires_grad_()
    stats = token_stats(free.repeat_interleave(samples, 0), action.flatten(), moments=True)
    mask = torch.ones(action.numel(), dtype=torch.bool)
    tokens = Tokens(stats.logprob, stats.logprob.detach(), advantage.flatten().float(), mask)
    loss, _ = policy_loss(tokens, replace(UNCLIPPED, aggregation="token-sum"))
    (gradient,) = torch.autograd.grad(loss / samples, free)
    drift = (stats.entropy_drift.double() * advantage.flatten()).view(-1, samples).mean(1)
    return gradient.double(), drift


def adamw_step(logits: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """The change of the logits by AdamW's first step."""
    weights = nn.Parameter(logits.clone())
    weights.grad = gradient
    torch.optim.AdamW([weights], lr=lr).step()
    return weights.detach() - logits


# ---- transformers ----------------------------------------------------------------------------------------------------


def network(seed: int, steps: Mapping[str, Sequence[float]], warm_start: int) -> dict[str, Any]:
    """Rows of `compared` by optimizer; "drift" in them: correlation over tokens of entropy_drift * advantage with the
    measured change. And the mean entropy and reward of the rollout."""
    model, batch = small_policy(seed, warm_start=warm_start, prompts=PROMPTS)
    with torch.no_grad():
        before = response_rows(model, batch)[0]
    stats = token_stats(before, batch.target[batch.loss_mask], moments=True)
    drift = (stats.entropy_drift * batch.advantage[batch.loss_mask]).double()
    rows = {
        name: [{"eta": eta} | stepped(model, batch, name, eta, before, drift) for eta in sizes]
        for name, sizes in steps.items()
    }
    return {"rows": rows, "entropy": float(stats.entropy.mean()), "reward": float(batch.responses.score.mean())}


def gradient_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Of the policy loss on the batch, by weight."""
    at = batch.loss_mask
    stats = token_stats(response_rows(model, batch)[0], batch.target[at])
    loss, _ = policy_loss(batch.loss_tokens(at, stats.logprob), UNCLIPPED)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def stepped(model: nn.Module, batch: Batch, name: str, eta: float, before: Tensor, drift: Tensor) -> dict[str, float]:
    """One step on the batch by a copy of the model, compared with the model."""
    moved = copy.deepcopy(model)
    weights = list(moved.parameters())
    if name == "AdamW":
        optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
        for part in range(4):
            _step(optimizer, weights, gradient_of(moved, batch.subset(range(part, batch.num_sequences, 4))))
        optimizer.param_groups[0]["lr"] = eta
    else:
        optimizer = torch.optim.SGD(weights, lr=eta)
    _step(optimizer, weights, gradient_of(moved, batch))
    with torch.no_grad():
        after = response_rows(moved, batch)[0]
    found = logit_covariance(before, after)
    own = compared(before, after, found.predicted_entropy_change.double(), found.entropy_change.double())
    own["drift"] = float(np.corrcoef(drift.numpy(), found.entropy_change.double().numpy())[0, 1])
    return own | {
        "mean_predicted": float(found.predicted_entropy_change.double().mean()),
        "mean_change": float(found.entropy_change.double().mean()),
    }


def _step(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], gradient: Sequence[Tensor]) -> None:
    for weight, own in zip(weights, gradient, strict=True):
        weight.grad = own
    optimizer.step()
