"""Sharded calls on a GPU (ENTCOV_TEST_DEVICE=cuda; =cpu rehearses it): a group of one rank over NCCL takes the whole
way, without a wait and within a CUDA graph. Several ranks: tests/stats/test_sharded_without_waiting.py, on a CPU.
"""

import pytest
import torch
import torch.distributed as dist

from entcov import logit_covariance, token_stats
from tests.support.gpu_inputs import V, gpu_only, inputs, statistics
from tests.support.on_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE is None, reason="ENTCOV_TEST_DEVICE names no device")


@pytest.fixture
def world_of_one():
    """A group of one rank over NCCL (gloo in a rehearsal): the whole way of a sharded call, on one device."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_sharded_call_has_the_bits_of_an_unsharded_one(world_of_one):
    logits, target = inputs()
    alone = statistics(logits, target, moments=True)
    shared = statistics(logits, target, moments=True, group=world_of_one)
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
    alone = logit_covariance(logits, logits + 0.1)
    shared = logit_covariance(logits, logits + 0.1, group=world_of_one)
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def clamped(logits, target, **settings):
    """(clamped entropy, its gradient), a third of the vocabulary left out."""
    leaf = logits.detach().requires_grad_()
    entropy = token_stats(leaf, target, clamp_p=1 / 3, **settings).clamped_entropy
    return entropy.detach(), torch.autograd.grad(entropy.sum(), leaf)[0].float()


def test_a_sharded_clamp_is_the_unsharded_one(world_of_one):
    logits, target = inputs()
    for shared, alone in zip(clamped(logits, target, group=world_of_one), clamped(logits, target), strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=2**-8)  # a gradient in bf16 may round the other way


@gpu_only
def test_a_sharded_clamp_fits_a_graph(world_of_one):
    logits, target = inputs()
    clamped(logits, target, group=world_of_one)  # makes the communicator
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = clamped(logits, target, group=world_of_one)
    new_logits, new_target = inputs(seed=1)
    logits.copy_(new_logits)
    target.copy_(new_target)
    graph.replay()
    for shared, alone in zip(captured, clamped(new_logits, new_target), strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=2**-8)
    del graph, captured


@gpu_only
def test_a_sharded_call_waits_for_nothing_and_fits_a_graph(world_of_one):
    logits, target = inputs()
    settings = {"moments": True, "group": world_of_one}
    statistics(logits, target, **settings)  # makes the communicator
    logit_covariance(logits, logits + 0.1, group=world_of_one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics(logits, target, **settings)
        logit_covariance(logits, logits + 0.1, group=world_of_one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog is another thread
        captured = statistics(logits, target, **settings)
    new_logits, new_target = inputs(seed=1)
    logits.copy_(new_logits)
    target.copy_(new_target)
    graph.replay()
    expected = statistics(new_logits, new_target, moments=True)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    del graph, captured  # before the communicator that it holds work of


@gpu_only
def test_a_sharded_call_that_leaves_a_hole_is_nan(world_of_one):
    logits, target = inputs()
    stats = token_stats(logits, target, group=world_of_one, vocab_start=1, vocab_size=V + 1)
    assert stats.logprob.isnan().all() and stats.entropy.isnan().all()
