"""What tests/gpu shares: inputs on the device, the statistics of a call, and the mark of what a rehearsal cannot do."""

import pytest
import torch

from entcov import token_stats
from tests.support.on_device import DEVICE

gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can do this")
SIZE = T, V = (4, 300) if DEVICE == "cpu" else (64, 40005)


def inputs(T=T, V=V, dtype=torch.bfloat16, seed=0):
    """Random logits and targets, made on the CPU, on the device."""
    rng = torch.Generator().manual_seed(seed)
    logits = (2.5 * torch.randn(T, V, generator=rng)).to(dtype)
    return logits.to(DEVICE), torch.randint(0, V, (T,), generator=rng).to(DEVICE)


def statistics(logits, target, **settings):
    """(logprob, entropy, gradient of a mix of the two)."""
    leaf = logits.detach().requires_grad_()
    stats = token_stats(leaf, target, **settings)
    (grad,) = torch.autograd.grad((-stats.logprob + 0.01 * stats.entropy).sum(), leaf)
    return stats.logprob.detach(), stats.entropy.detach(), grad
