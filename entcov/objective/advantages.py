"""Advantages of responses from their rewards: one number a response, computed over the whole rollout batch.

Every function in `ADVANTAGES` takes the same three arguments and returns a float32 tensor [B]:

    reward           [B] float, one outcome reward a response
    group_id         [B] int64, responses to the same prompt share it; any values, any order
    response_length  [B] int64, number of loss tokens of each response (weights of the whitening)

Rewards are rounded to float32 and sums run in float64: a group of equal rewards gets exactly 0. A group of one keeps
its reward, as in verl, because there is nothing to compare it with. Not differentiable; nothing is mutated; no
collectives. Raises TypeError or ValueError for dtypes, shapes, an empty batch, rewards that are not finite.
Source: verl's trainer/ppo/core_algos.py for constants and conventions, the papers below for the methods.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from entcov import arguments as check

STD_EPS = 1e-6
VARIANCE_EPS = 1e-8


def grpo(reward: Tensor, group_id: Tensor, response_length: Tensor) -> Tensor:
    """(reward - group mean) / (group std + 1e-6), std unbiased (n - 1). Shao et al., DeepSeekMath, arXiv 2402.03300."""
    reward, group, size = _groups(reward, group_id, response_length)
    centred = _centred(reward, group, size)
    variance = _group_sum(centred.square(), group) / (size - 1).clamp(min=1)
    std = torch.where(size > 1, variance.sqrt(), 1.0)
    return (centred / (std + STD_EPS)).float()


def dr_grpo(reward: Tensor, group_id: Tensor, response_length: Tensor) -> Tensor:
    """reward - group mean. Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783.

    The method's other half is the aggregation "seq-mean-token-sum-norm" of the loss.
    """
    return _centred(*_groups(reward, group_id, response_length)).float()


def rloo(reward: Tensor, group_id: Tensor, response_length: Tensor) -> Tensor:
    """reward - mean of the group's other rewards. Ahmadian et al., "Back to Basics", arXiv 2402.14740."""
    reward, group, size = _groups(reward, group_id, response_length)
    return (_centred(reward, group, size) * size / (size - 1).clamp(min=1)).float()


def reinforce_pp(reward: Tensor, group_id: Tensor, response_length: Tensor) -> Tensor:
    """Rewards whitened over all response tokens of the batch. Hu, REINFORCE++, arXiv 2501.03262.

    Every token carries its response's undiscounted return, so a response weighs as its length:
    (reward - mean) / sqrt(var + 1e-8), mean and unbiased variance over tokens.
    """
    reward, _, _ = _groups(reward, group_id, response_length)
    return _whiten_over_tokens(reward, response_length).float()


def reinforce_pp_baseline(reward: Tensor, group_id: Tensor, response_length: Tensor) -> Tensor:
    """reward - group mean, then whitened over all response tokens of the batch. Hu, REINFORCE++, arXiv 2501.03262."""
    return _whiten_over_tokens(_centred(*_groups(reward, group_id, response_length)), response_length).float()


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def _groups(reward: Tensor, group_id: Tensor, response_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked inputs as (reward float64, index of the group, size of the group), each [B]."""
    check.vector("reward", reward, (torch.float32, torch.float64, torch.float16, torch.bfloat16))
    check.vector("group_id", group_id, (torch.int64,), reward)
    check.vector("response_length", response_length, (torch.int64,), reward)
    if reward.numel() == 0:
        raise ValueError("reward must hold at least one response, got none")
    check.finite("reward", reward)
    if check.readable(response_length) and bool((response_length < 0).any()):
        raise ValueError(f"response_length must be at least 0, got {int(response_length.min())}")
    _, index, count = group_id.unique(return_inverse=True, return_counts=True)
    return reward.detach().float().double(), index, count[index]


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Sum of each response's group [B]. There are at most B groups, so B bins do."""
    return torch.zeros_like(x).index_add_(0, group, x)[group]


def _centred(reward: Tensor, group: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 1, reward - _group_sum(reward, group) / size, reward)


def _whiten_over_tokens(x: Tensor, response_length: Tensor) -> Tensor:
    weight = response_length.double()
    tokens = weight.sum()
    if check.readable(tokens) and tokens < 2:
        raise ValueError(f"response_length must add up to at least 2 tokens to whiten over, got {int(tokens)}")
    mean = (weight * x).sum() / tokens
    variance = (weight * (x - mean).square()).sum() / (tokens - 1)
    return (x - mean) * (variance + VARIANCE_EPS).rsqrt()
