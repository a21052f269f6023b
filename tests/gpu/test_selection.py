"""Token covariance and selections on a GPU (ENTCOV_TEST_DEVICE=cuda; =cpu rehearses it): the bits of the CPU, no
synchronisation, CUDA graphs.
"""

import pytest
import torch

from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import covariance_summary, token_covariance
from tests.support.on_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE is None, reason="ENTCOV_TEST_DEVICE names no device")
gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can do this")
T = 2**20 if DEVICE == "cuda" else 3000


def tokens(T=T, seed=0):
    """logprob, advantage, mask, token ids on the CPU. Advantages take few values, so covariances tie."""
    rng = torch.Generator().manual_seed(seed)
    logprob = (-20 * torch.rand(T, generator=rng)).round(decimals=2)
    advantage = torch.randint(-2, 3, (T,), generator=rng).float()
    return logprob, advantage, torch.rand(T, generator=rng) < 0.8, torch.randperm(T, generator=rng)


def everything(logprob, advantage, mask, ids, step):
    """All that a step computes, as one tuple of tensors."""
    covariance = token_covariance(logprob, advantage, mask)
    clip = select_clip_cov(covariance, ids, ratio=0.01, low=1.0, high=5.0, seed=1, step=step)
    kl = select_largest(covariance, ids, ratio=0.02, seed=1, step=step)
    summary = covariance_summary(covariance)
    return covariance.value, clip.mask, clip.count, kl.mask, kl.count, kl.threshold, *summary.values()


def same(a, b):
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [1, 7, 1000, T])
def test_the_bits_of_the_cpu(size):
    batch = tokens(size, seed=size)
    batch[2][0] = True
    got = everything(*(x.to(DEVICE) for x in batch), step=3)
    assert all(x.device.type == DEVICE for x in got)
    assert same(got, everything(*batch, step=3))


@gpu_only
def test_nothing_waits_for_the_gpu():
    batch = [x.to(DEVICE) for x in tokens()]
    everything(*batch, step=0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*batch, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_deterministic_algorithms_may_be_asked_for():
    batch = tokens()
    torch.use_deterministic_algorithms(True)
    try:
        got = everything(*(x.to(DEVICE) for x in batch), step=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(got, everything(*batch, step=0))


@gpu_only
def test_a_cuda_graph_draws_anew_at_every_step():
    batch, step = [x.to(DEVICE) for x in tokens()], torch.tensor(0, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(*batch, step=step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*batch, step=step)
    for number in (1, 2):
        new = tokens(seed=number)
        for old, values in zip(batch, new, strict=True):
            old.copy_(values)
        step.fill_(number)
        graph.replay()
        assert same(captured, everything(*new, step=number))
