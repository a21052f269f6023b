"""entcov's kernels by themselves, to compare with the ceilings: without autograd and the few [T] formulas around."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.workloads import Inputs
from entcov import ops

IGNORE = -100


@dataclass(frozen=True)
class Kernel:
    """run(inputs, prepared); reads and writes in tensors of the logits' size; overwrites: its first input."""

    run: Callable[[Inputs, Inputs], object]
    reads: int
    writes: int
    overwrites: bool = False


def prepared(workload: str, inputs: Inputs) -> Inputs:
    """What the backward kernels need from the forward ones: merged statistics, and a gradient of 1 a row."""
    ones = torch.ones(len(inputs[0]), device=inputs[0].device)
    columns = inputs[0].shape[1]
    if workload == "token_stats":
        stats = ops.row_stats(*inputs, 0, columns, 1.0, False, IGNORE)
        return ops.merge_row_stats(stats[None], inputs[1], 1.0, IGNORE), ones
    stats = ops.covariance_stats(*inputs, 0, columns, 1.0, None)
    return ops.merge_covariance_stats(stats[None], None, 1.0), ones


def _row_stats(moments: bool) -> Callable[[Inputs, Inputs], object]:
    return lambda i, _: ops.row_stats(*i, 0, i[0].shape[1], 1.0, moments, IGNORE)


def _logits_grad(op: Callable) -> Callable[[Inputs, Inputs], object]:
    return lambda i, p: op(*i, p[0], p[1], p[1], None, None, 0, i[0].shape[1], 1.0, IGNORE)


KERNELS = {
    "token_stats": {
        "row_stats": Kernel(_row_stats(False), 1, 0),
        "row_stats, moments": Kernel(_row_stats(True), 1, 0),
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
