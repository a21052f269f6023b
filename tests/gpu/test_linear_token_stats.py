"""linear_token_stats on a GPU (ENTCOV_TEST_DEVICE=cuda; =cpu rehearses it): the products that add into fp32, graphs, no
synchronisation, peak memory.
"""

import pytest
import torch

from entcov import linear_token_stats
from entcov.verify import reference
from tests.support.on_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE is None, reason="ENTCOV_TEST_DEVICE names no device")
gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can do this")
# Norm of the gradients' error, relative: two roundings of the dtype and what is left of a logit's.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def inputs(T=96, V=1000, D=64, dtype=torch.bfloat16, seed=0):
    """hidden, weight, bias, target made on the CPU, on the device; a quarter of the tokens ignored."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=rng) for s in ((T, D), (V, D), (V,)))
    target = torch.randint(0, V, (T,), generator=rng)
    target[::4] = -100
    return [x.to(dtype).to(DEVICE) for x in (hidden, 2.5 / D**0.5 * weight, bias)] + [target.to(DEVICE)]


def run(hidden, weight, bias, target, **settings):
    """(logprob, entropy, and the gradients of a mix of the two)."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    stats = linear_token_stats(leaves[0], leaves[1], target, bias=leaves[2], **settings)
    grads = torch.autograd.grad((-stats.logprob + 0.1 * stats.entropy).sum(), leaves)
    return stats.logprob.detach(), stats.entropy.detach(), *grads


@pytest.fixture(autouse=True)
def true_fp32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("chunk_size", [None, 40])
@pytest.mark.parametrize("dtype", ERROR)
def test_against_float64(dtype, chunk_size):
    arguments = inputs(dtype=dtype)
    got = run(*arguments, chunk_size=chunk_size, temperature=0.8)
    *exact, target = (x.cpu() for x in arguments)
    exact = [x.double().requires_grad_() for x in exact]
    logits = torch.nn.functional.linear(*exact)
    counts = target != -100
    expected = reference.token_stats(logits, target.clamp(min=0), temperature=0.8)
    loss = (-expected["logprob"] + 0.1 * expected["entropy"])[counts].sum()
    wanted = torch.autograd.grad(loss, exact)
    # A logit of 8 is rounded by half a step of its dtype, the temperature makes it a quarter more.
    tolerance = 1e-5 if dtype == torch.float32 else 10 * ERROR[dtype]
    for value, name in zip(got, ("logprob", "entropy"), strict=False):
        error = (value.cpu().double() - expected[name].detach().where(counts, torch.zeros(()).double())).abs()
        assert error.max() < tolerance, name
    for grad, want in zip(got[2:], wanted, strict=True):
        assert grad.dtype == dtype
        assert (grad.cpu().double() - want).norm() / want.norm() < ERROR[dtype]


def test_many_chunks_add_up_in_fp32():
    """What 64 chunks add to the gradient's error is less than half of one rounding to bf16."""
    hidden, weight, bias, target = inputs(T=512, V=256)
    exact = [x.cpu().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference.token_stats(torch.nn.functional.linear(*exact), target.cpu().clamp(min=0))
    loss = (-expected["logprob"] + 0.1 * expected["entropy"])[target.cpu() != -100].sum()
    wanted = torch.autograd.grad(loss, exact[1])[0]
    one, many = (
        float((run(hidden, weight, bias, target, chunk_size=n)[3].cpu().double() - wanted).norm() / wanted.norm())
        for n in (512, 8)
    )
    assert many < one + 2**-10, (one, many)


@gpu_only
@pytest.mark.parametrize("chunk_size", [None, 40])
def test_nothing_waits_for_the_gpu_and_it_fits_a_graph(chunk_size):
    arguments = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*arguments, chunk_size=chunk_size, moments=True)  # what the first call sets up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*arguments, chunk_size=chunk_size, moments=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments, chunk_size=chunk_size, moments=True)
    for old, new in zip(arguments, inputs(seed=1), strict=True):
        old.copy_(new)
    graph.replay()
    for a, b in zip(captured, run(*arguments, chunk_size=chunk_size, moments=True), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3)  # the library may choose another product in a graph


@gpu_only
@pytest.mark.parametrize("chunk_size", [4096, 512])
def test_peak_memory(chunk_size):
    """One chunk of logits, the gradients, an fp32 sum if there are chunks, and 100 bytes a token; 32 MiB for the
    library's workspace and for tensors rounded up."""
    hidden, weight, bias, target = inputs(T=4096, V=32000, D=256)
    run(hidden[:64], weight, bias, target[:64])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(hidden, weight, bias, target, chunk_size=chunk_size)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    fp32_sum = weight.numel() * 4 if chunk_size < 4096 else 0
    gradients = sum(x.nbytes for x in found[2:])
    from entcov import _cuda

    segments = 16 * chunk_size * _cuda.segments(32000)
    assert peak <= chunk_size * 32000 * 2 + gradients + fp32_sum + segments + 100 * 4096 + 2**25


@gpu_only
def test_main_grad_takes_no_memory_of_its_own():
    hidden, weight, bias, target = inputs(T=1024, V=32000, D=256)
    weight.requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=torch.float32)

    def step():
        stats = linear_token_stats(hidden, weight, target, bias=bias, chunk_size=128, main_grad=main_grad)
        stats.logprob.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    assert weight.grad is None and torch.cuda.max_memory_allocated() - before < 128 * 32000 * 2 + 2**24
    (wanted,) = torch.autograd.grad(linear_token_stats(hidden, weight, target, bias=bias).logprob.sum(), weight)
    assert (main_grad - 2 * wanted).norm() / (2 * wanted).norm() < 2**-7
