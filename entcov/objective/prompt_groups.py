"""Statistics of responses over their groups (the responses to the same prompt) and over the tokens of a rollout.

The functions take numbers [B] float64, the index of each one's group and the size of its group [B], as `groups_of`
returns them, and return [B]. No collectives; nothing is mutated.
"""

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.objective.responses import Responses

VARIANCE_EPS = 1e-8


def groups_of(responses: Responses) -> tuple[Tensor, Tensor, Tensor]:
    """(reward float64, index of the group, size of the group), each [B]; rewards are rounded to float32.

    Raises: ValueError for no response, a reward that is not finite, a negative length.
    """
    reward, length = responses.reward, responses.length
    if reward.numel() == 0:
        raise ValueError("reward must hold at least one response, got none")
    check.finite("reward", reward)
    if check.readable(length) and bool((length < 0).any()):
        raise ValueError(f"length must be at least 0, got {int(length.min())}")
    _, index, count = responses.group.unique(return_inverse=True, return_counts=True)
    return reward.detach().float().double(), index, count[index]


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """The sum over each entry's group. There are at most as many groups as entries, so that many bins do."""
    return torch.zeros_like(x).index_add_(0, group, x)[group]


def group_max(x: Tensor, group: Tensor) -> Tensor:
    """The maximum of each entry's group."""
    return torch.full_like(x, -torch.inf).scatter_reduce_(0, group, x, "amax")[group]


def group_std(centred: Tensor, group: Tensor, size: Tensor) -> Tensor:
    """The unbiased standard deviation of each entry's group, from what `centred_on_group` returns; 1 for one entry."""
    variance = group_sum(centred.square(), group) / (size - 1).clamp(min=1)
    return torch.where(size > 1, variance.sqrt(), 1.0)


def centred_on_group(x: Tensor, group: Tensor, size: Tensor) -> Tensor:
    """x - the mean of its group; the one entry of a group keeps its value."""
    return torch.where(size > 1, x - group_sum(x, group) / size, x)


def group_quantile(x: Tensor, group: Tensor, size: Tensor, fraction: float, *, interpolate: bool) -> Tensor:
    """The quantile of each entry's group, 0 < fraction < 1.

    interpolate  False: the smallest entry that at least `fraction` of the group do not exceed,
                 inf {v: F(v) >= fraction}.
                 True: linear between the entries around position fraction * (size - 1), as torch.quantile.
    """
    order = x.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, in a group by value
    counts = group.bincount()
    first = (counts.cumsum(0) - counts)[group]  # where the group begins in that order
    ordered = x[order]
    if interpolate:
        position = fraction * (size - 1).double()
        below = position.floor().long()
        above = (below + 1).minimum(size - 1)
        return ordered[first + below].lerp(ordered[first + above], position - below)
    # The product alone may round up: 0.28 * 25 is a little more than 7, and 7 of 25 are enough.
    count = (fraction * size.double()).ceil()
    count = torch.where((count - 1) / size >= fraction, count - 1, count)
    return ordered[first + count.long() - 1]


def whitened_over_tokens(x: Tensor, response_length: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), mean and unbiased variance over the tokens of all responses.

    Raises: ValueError for fewer than two tokens.
    """
    weight = response_length.double()
    tokens = weight.sum()
    if check.readable(tokens) and tokens < 2:
        raise ValueError(f"length must add up to at least 2 tokens to whiten over, got {int(tokens)}")
    mean = (weight * x).sum() / tokens
    variance = (weight * (x - mean).square()).sum() / (tokens - 1)
    return (x - mean) * (variance + VARIANCE_EPS).rsqrt()
