"""entcov's kernels alone, without autograd and the [T] formulas around them, to compare with the ceilings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.contenders import CHUNKS
from benchmarks.gpu.workloads import Inputs
from entcov import clamp_ops, linear_token_stats, ops

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


def prepared(workload: str, inputs: Inputs) -> Inputs:
    """What the backward kernels need from the forward ones: merged statistics, and a gradient of 1 a row. For
    token_stats also targets that are ignored in every second run of an eighth of the rows, as prompts are."""
    ones = torch.ones(len(inputs[0]), device=inputs[0].device)
    if workload == "lm_head":
        return (ones,)
    columns = inputs[0].shape[1]
    if workload == "token_stats":
        stats = ops.row_stats(*inputs, 0, columns, 1.0, False, IGNORE)
        row = torch.arange(len(ones), device=ones.device)
        prompts = row // max(len(ones) // 8, 1) % 2 == 0
        return ops.merge_row_stats(stats[None], inputs[1], 1.0, IGNORE), ones, inputs[1].masked_fill(prompts, IGNORE)
    stats = ops.covariance_stats(*inputs, 0, columns, 1.0, None)
    return ops.merge_covariance_stats(stats[None], None, 1.0), ones


def _row_stats(moments: bool) -> Callable[[Inputs, Inputs], object]:
    return lambda i, _: ops.row_stats(*i, 0, i[0].shape[1], 1.0, moments, IGNORE)


def _clamped_stats(inputs: Inputs, _: Inputs) -> object:
    """With AEnt's clamp, which leaves a third of the vocabulary out. Its sample is not counted among its reads."""
    columns = inputs[0].shape[1]
    return clamp_ops.clamped_stats(*inputs, columns - columns // 3, columns, 1.0, False, IGNORE)


def _logits_grad(op: Callable) -> Callable[[Inputs, Inputs], object]:
    return lambda i, p: op(*i, p[0], p[1], p[1], None, None, 0, i[0].shape[1], 1.0, IGNORE)


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
        "row_stats, half of the rows ignored": Kernel(
            lambda i, p: ops.row_stats(i[0], p[2], 0, i[0].shape[1], 1.0, False, IGNORE), 0.5, 0
        ),
        "logits_grad": Kernel(_logits_grad(ops.logits_grad), 1, 1),
        "logits_grad_ (in place)": Kernel(_logits_grad(ops.logits_grad_), 1, 1, overwrites=True),
    },
    "logit_covariance": {
        "covariance_stats": Kernel(lambda i, _: ops.covariance_stats(*i, 0, i[0].shape[1], 1.0, None), 2, 0),
        "logit_covariance_grad": Kernel(
            lambda i, p: ops.logit_covariance_grad(*i, p[0], p[1], p[1], p[1], None, 0, i[0].shape[1], 1.0), 2, 1
        ),
    },
}
