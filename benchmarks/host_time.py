"""Host time of the public functions on tensors so small that the kernels take next to nothing.

Microseconds of one call on one thread. The floor is torch's own: an autograd.Function that saves two tensors, allocates
two outputs and one gradient, and computes nothing.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from entcov import PolicyLossConfig, Tokens, Totals, linear_token_stats, logit_covariance, policy_loss, token_stats
from entcov.objective.token_covariance import token_covariance

TOKENS, COLUMNS, WIDTH = 4, 64, 16
FLOOR = "empty autograd.Function"
WARM_UP, ROUNDS, CALLS = 20, 20, 50


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits, target)
        return logits.new_empty(len(logits)), logits.new_empty(len(logits))

    @staticmethod
    def backward(ctx, *_):
        return torch.empty_like(ctx.saved_tensors[0]), None


def _calls() -> dict[str, tuple[Callable[[], object], tuple[Tensor, ...]]]:
    """name -> (call that returns a tuple of outputs, the leaves that get a gradient); without leaves, it has none."""
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, COLUMNS, requires_grad=True)
    old, target = logits.detach() + 0.1, torch.randint(0, COLUMNS, (TOKENS,))
    hidden, weight = (torch.randn(n, WIDTH, requires_grad=True) for n in (TOKENS, COLUMNS))
    return {
        FLOOR: (lambda: _Empty.apply(logits, target), (logits,)),
        "token_stats": (lambda: token_stats(logits, target)[:2], (logits,)),
        "token_stats, moments": (lambda: token_stats(logits, target, moments=True)[:2], (logits,)),
        "token_stats, clamp": (lambda: token_stats(logits, target, clamp_p=0.3)[::2][:2], (logits,)),
        "logit_covariance": (lambda: logit_covariance(old, logits)[::3], (logits,)),
        "linear_token_stats": (lambda: linear_token_stats(hidden, weight, target)[:2], (hidden, weight)),
        **_objective_calls(),
    }


def _objective_calls() -> dict[str, tuple[Callable[[], object], tuple[Tensor, ...]]]:
    """The loss of one micro-batch and what comes before it, once a mini-batch; these have no gradient."""
    logprob, old, advantage = (torch.randn(TOKENS) for _ in range(3))
    logprob.requires_grad_()
    tokens = Tokens(logprob, old, advantage, torch.ones(TOKENS) > 0)
    config, totals = PolicyLossConfig(), Totals(TOKENS, TOKENS)
    return {
        "policy_loss": (lambda: policy_loss(tokens, config, totals=totals)[:1], (logprob,)),
        "token_covariance": (lambda: token_covariance(logprob.detach(), advantage, tokens.loss_mask), ()),
    }


def measure() -> list[dict]:
    """One row a function: its name, and the microseconds of "forward" and, where it has one, "forward+backward", a 10th
    percentile each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = {}
    for name, (forward, leaves) in _calls().items():
        calls[name, "forward"] = forward
        if leaves:
            ones = tuple(torch.ones_like(x) for x in forward())
            calls[name, "forward+backward"] = lambda f=forward, x=leaves, y=ones: torch.autograd.grad(f(), x, y)
    try:
        seconds = _seconds(calls)
    finally:
        torch.set_num_threads(threads)
    rows = {}
    for (name, label), times in seconds.items():
        rows.setdefault(name, {"name": name})[label] = 1e6 * sorted(times)[len(times) // 10]
    return list(rows.values())


def _seconds(calls: dict[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], list[float]]:
    """In rounds, so that other work on the machine falls on all alike."""
    seconds = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            for _ in range(WARM_UP):
                call()
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                seconds[key].append(time.perf_counter() - start)
    return seconds


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows of text)"""
    passes = ("forward", "forward+backward")
    return ["", *passes], [
        [row["name"], *(f"{row[label]:.1f}" if label in row else "-" for label in passes)] for row in rows
    ]
