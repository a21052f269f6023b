"""entcov's kernels alone, without autograd, to compare with the ceilings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.contenders import CHUNKS
from benchmarks.gpu.workloads import Inputs
from entcov import linear_token_stats
from entcov.ops.clamped_stats import clamped_stats
from entcov.ops.core import RowSpec
from entcov.ops.covariance_stats import covariance_stats
from entcov.ops.logit_covariance_grad import logit_covariance_grad
from entcov.ops.logits_grad import logits_grad, logits_grad_
from entcov.ops.row_stats import row_stats

IGNORE = -100


@dataclass(frozen=True)
class Kernel:
    """run(inputs, prepared). reads, writes: in tensors of the logits' size. overwrites: it overwrites its first input.

    bare: the kernel that it is compared with, where matrix products limit it and not the memory.
    """

    run: Callable[[Inputs, Inputs], object]
    reads: float = 0
    writes: int = 0
    overwrites: bool = False
    bare: str | None = None


def _spec(inputs: Inputs) -> RowSpec:
    return RowSpec(0, inputs[0].shape[1], 1.0, IGNORE)


def prepared(workload: str, inputs: Inputs) -> Inputs:
    """What the backward kernels need from the forward ones: statistics of whole rows, and a gradient of 1 a row. For
    token_stats also targets that are ignored in every second run of an eighth of the rows, as prompts are."""
    ones = torch.ones(len(inputs[0]), device=inputs[0].device)
    if workload == "lm_head":
        return (ones,)
    if workload == "token_stats":
        row = torch.arange(len(ones), device=ones.device)
        prompts = row // max(len(ones) // 8, 1) % 2 == 0
        return row_stats(*inputs, _spec(inputs)), ones, inputs[1].masked_fill(prompts, IGNORE)
    return covariance_stats(*inputs, None, _spec(inputs)), ones


def _row_stats(moments: bool) -> Callable[[Inputs, Inputs], object]:
    return lambda i, _: row_stats(*i, _spec(i), moments, whole=True)


def _row_stats_half_ignored(inputs: Inputs, prepared: Inputs) -> object:
    return row_stats(inputs[0], prepared[2], _spec(inputs), whole=True)


def _clamped_stats(inputs: Inputs, _: Inputs) -> object:
    """With AEnt's clamp, which leaves a third of the vocabulary out. Its sample is not counted among its reads."""
    columns = inputs[0].shape[1]
    return clamped_stats(*inputs, columns - columns // 3, _spec(inputs))


def _logits_grad(op: Callable) -> Callable[[Inputs, Inputs], object]:
    return lambda i, p: op(*i, p[0], None, (p[1], p[1], None), _spec(i))


def _products(times_forward: int) -> Callable[[Inputs, Inputs], object]:
    """The matrix products of a head alone: logits, gradient of hidden, gradient of weight."""

    def run(inputs: Inputs, _: Inputs) -> object:
        hidden, weight, _ = inputs
        for _ in range(times_forward):
            logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    return run


def _head(chunks: int) -> Callable[[Inputs, Inputs], object]:
    """linear_token_stats, forward and backward."""

    def run(inputs: Inputs, prepared: Inputs) -> object:
        hidden, weight, target = inputs
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        stats = linear_token_stats(*leaves, target, chunk_size=-(-len(target) // chunks))
        return torch.autograd.grad((stats.logprob, stats.entropy), leaves, (prepared[0], prepared[0]))

    return run


KERNELS = {
    "lm_head": {
        "three products": Kernel(_products(1)),
        "head, logits kept": Kernel(_head(1), bare="three products"),
        "four products": Kernel(_products(2)),
        "head, chunks": Kernel(_head(CHUNKS), bare="four products"),
    },
    "token_stats": {
        "row_stats": Kernel(_row_stats(False), 1, 0),
        "row_stats, moments": Kernel(_row_stats(True), 1, 0),
        "clamped_stats": Kernel(_clamped_stats, 1, 0),
        "row_stats, half of the rows ignored": Kernel(_row_stats_half_ignored, 0.5, 0),
        "logits_grad": Kernel(_logits_grad(logits_grad), 1, 1),
        "logits_grad_ (in place)": Kernel(_logits_grad(logits_grad_), 1, 1, overwrites=True),
    },
    "logit_covariance": {
        "covariance_stats": Kernel(lambda i, _: covariance_stats(*i, None, _spec(i), whole=True), 2, 0),
        "logit_covariance_grad": Kernel(
            lambda i, p: logit_covariance_grad(*i, None, p[0], (p[1], p[1], None), _spec(i)), 2, 1
        ),
    },
}
