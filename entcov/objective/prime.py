"""PRIME: token rewards from an implicit process reward model, and the advantages made of them and of the outcomes.

The reward model is a language model that is trained online to predict a response's outcome (1 correct, 0 wrong):

    q_t = log pi_rm(y_t | y_<t) - log pi_ref(y_t | y_<t)
    P(correct) = sigmoid(beta_train * sum_t q_t)             trained with binary cross-entropy

so that r_t = beta_train * q_t is a reward for every token. entcov/rl/reward_model.py has the model and its steps.

Source: Cui et al., "Process Reinforcement through Implicit Rewards", arXiv 2502.01456; constants, the normalisation and
what is centred over what are those of the authors' code, verl-recipe prime/prime_core_algos.py and prime_dp_rm.py.
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from entcov import arguments as check

NORMS = ("batch_norm", "none")
NORM_EPS = 1e-6
VARIANCE_EPS = 1e-8  # of verl's masked_whiten
_FLOAT = (torch.float32, torch.float64)


def outcome_loss(logit: Tensor, outcome: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of sigmoid(logit) against the outcome, and its derivative by the logit.

    Args:
        logit: [B] float, beta_train * sum_t q_t of each response.
        outcome: [B] float in [0, 1].
    Returns: (loss, sigmoid(logit) - outcome), each [B] float64, nats. Not differentiable: the derivative is there.
    Raises: TypeError, ValueError; also for an outcome outside [0, 1].
    """
    check.vector("logit", logit, _FLOAT)
    check.vector("outcome", outcome, _FLOAT, logit)
    check_outcomes(outcome)
    logit, outcome = logit.detach().double(), outcome.double()
    return F.softplus(logit) - outcome * logit, logit.sigmoid() - outcome


def check_outcomes(outcome: Tensor) -> None:
    """Raises ValueError unless every outcome can be the target of a cross-entropy."""
    if check.readable(outcome) and not bool(((outcome >= 0) & (outcome <= 1)).all()):
        wrong = outcome[~((outcome >= 0) & (outcome <= 1))]
        raise ValueError(
            f"outcome must be in [0, 1], for PRIME's reward model is trained with cross-entropy; got {float(wrong[0])}"
        )


def token_rewards(log_ratio: Tensor, length: Tensor, beta: float) -> Tensor:
    """beta * q_t for all tokens of a response but the last, whose reward is 0.

    Args:
        log_ratio: [T] float32 or float64, q of the responses' tokens, response after response, in order. Nats.
        length: [B] int64, tokens of each response; they add up to T.
    Returns: [T], dtype of `log_ratio`.
    """
    last = _ends(log_ratio, length, "log_ratio") - 1
    reward = log_ratio.detach() * beta
    reward[last[length > 0]] = 0.0
    return reward


def ordered_pairs(score: Tensor, outcome: Tensor, group: Tensor) -> float:
    """The share of pairs of a group, with different outcomes, whose better one has the greater score; mean over groups.

    A pair weighs as its difference of outcomes, equal scores count half, and so does a group without such a pair.

    Args: score, outcome: [B] float; group: [B] int64.
    """
    members: dict[int, list[tuple[float, float]]] = {}
    for key, *one in zip(group.tolist(), score.tolist(), outcome.tolist(), strict=True):
        members.setdefault(key, []).append(tuple(one))
    shares = []
    for own in members.values():
        right = total = 0.0
        for (s, y), (other_s, other_y) in combinations(own, 2):
            total += abs(y - other_y)
            right += abs(y - other_y) * (0.5 if s == other_s else float((s > other_s) == (y > other_y)))
        shares.append(right / total if total else 0.5)
    return sum(shares) / len(shares)


def prime_advantage(
    token_reward: Tensor,
    reward: Tensor,
    group: Tensor,
    length: Tensor,
    *,
    reward_dpo_coef: float = 5.0,
    reward_gt_coef: float = 5.0,
    prime_norm: str = "batch_norm",
) -> Tensor:
    """Advantages of tokens from two rewards, each compared with the group's other responses, then summed.

    With n responses to a prompt, |y| tokens of response i, and r the token rewards, of whose normalisation below:

        p_it = dpo_coef (n r_it - sum_j mean_t r_jt) / (n - 1)          every token of the response
        o_it = gt_coef (n R_i - sum_j R_j) / (n - 1)                    its last token alone
        return_it = sum_{s >= t} (p_is + o_is)
        A = (return - mean) / sqrt(var + 1e-8)                          over all tokens; unbiased variance

    "batch_norm" first divides r by max_it |sum_{s >= t} r_is| + 1e-6. A group of one keeps both rewards as they are:
    there is nothing to compare them with, and the authors' code would divide by 0.

    Args:
        token_reward: [T] float, r: response after response, their tokens in order.
        reward: [B] float, the outcome R of each response.
        group: [B] int64, responses to the same prompt share it; any values, any order.
        length: [B] int64, tokens of each response, at least 1; they add up to T.
        reward_dpo_coef, reward_gt_coef, prime_norm: the authors' names and defaults.
    Returns: [T] float32 on the device of `token_reward`. Computed in float64 on the CPU in a fixed order, so that every
        rank has the same bits. Not differentiable, no collectives.
    Raises: TypeError, ValueError: dtypes, shapes, a value that is not finite, fewer than 2 tokens, unknown prime_norm.
    """
    check.one_of("prime_norm", prime_norm, NORMS)
    check.vector("reward", reward, _FLOAT)
    check.vector("group", group, (torch.int64,), reward)
    ends = _ends(token_reward, length, "token_reward").cpu()
    if token_reward.numel() < 2:
        raise ValueError(f"token_reward must hold at least 2 tokens to whiten over, got {token_reward.numel()}")
    device, length = token_reward.device, length.cpu()
    if bool((length < 1).any()):
        raise ValueError(f"length must be at least 1, got {int(length.min())}")
    process, outcome = token_reward.detach().double().cpu(), reward.detach().double().cpu()
    check.finite("token_reward", process)
    check.finite("reward", outcome)
    _, number, counts = group.cpu().unique(return_inverse=True, return_counts=True)
    size = counts[number].double()
    response = torch.arange(len(length)).repeat_interleave(length)

    def suffix_sums(x: Tensor) -> Tensor:
        before = F.pad(x.cumsum(0), (1, 0))
        return before[ends][response] - before[:-1]

    def compared(x: Tensor, mean: Tensor, of: Tensor | slice) -> Tensor:
        """`x`, entries of the responses `of`, compared with the responses' `mean`s, as above."""
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, number, mean)[number]
        others = (size - 1).clamp(min=1)
        return torch.where(size[of] > 1, (x * size[of] - sums[of]) / others[of], x)

    if prime_norm == "batch_norm":
        process = process / (suffix_sums(process).abs().max() + NORM_EPS)
    mean = torch.zeros(len(length), dtype=torch.float64).index_add_(0, response, process) / length
    total = reward_dpo_coef * compared(process, mean, response)
    total[ends - 1] += reward_gt_coef * compared(outcome, outcome, slice(None))
    returns = suffix_sums(total)
    whitened = (returns - returns.mean()) * (returns.var() + VARIANCE_EPS).rsqrt()
    return whitened.float().to(device)


def _ends(value: Tensor, length: Tensor, name: str) -> Tensor:
    """[B]: where the tokens of each response end."""
    check.vector(name, value, _FLOAT)
    check.vector("length", length, (torch.int64,))
    ends = length.cumsum(0)
    if (total := int(ends[-1]) if len(ends) else 0) != len(value):
        raise ValueError(f"length must add up to the {len(value)} tokens of {name}, got {total}")
    return ends
