"""What only a GPU can show of the public functions: values on its own tensors, graphs, streams, no synchronisation, no
hidden memory, offsets beyond 32 bits. Runs where ENTCOV_TEST_DEVICE names a device (`python -m benchmarks gpu` does);
with ENTCOV_TEST_DEVICE=cpu, what a CPU can do of it is rehearsed.
"""

import pytest
import torch

from entcov import logit_covariance, token_stats
from entcov.ops.core import RowSpec
from entcov.ops.logits_grad import logits_grad, logits_grad_
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.message import message
from entcov.ops.row_stats import row_stats
from entcov.verify import reference
from entcov.verify.row_kinds import KINDS, gradient_bound, make_rows, value_bound
from tests.support.gpu_inputs import SIZE, gpu_only, inputs, statistics
from tests.support.on_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE is None, reason="ENTCOV_TEST_DEVICE names no device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((6, 7), (4, 1003), (3, 40005)) if DEVICE == "cpu" else ((6, 7), (4, 1003), (3, 40005), (2, 151936))
T, V = SIZE


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_token_stats_against_float64(kind, dtype):
    for rows, V in SHAPES:
        logits = make_rows(kind, rows, V, dtype)
        target = logits.float().argmax(-1)
        target[1::2] = torch.where(torch.isfinite(logits[1::2, 0]), 0, target[1::2])
        leaf = logits.to(DEVICE).requires_grad_()
        expected_leaf = logits.double().requires_grad_()
        got = token_stats(leaf, target.to(DEVICE), temperature=0.7, moments=True)
        expected = reference.token_stats(expected_leaf, target, temperature=0.7)
        for name, value in expected.items():
            error = (getattr(got, name).detach().cpu().double() - value.detach()).abs()
            assert (error <= value_bound(name, value.detach())).all(), f"{name} {rows}x{V}: {error.max():.2e}"
        log_p = reference.log_probs(logits, 0.7)
        size = reference.where_possible(log_p, log_p).abs() + reference.entropy_of(log_p)[:, None] + 1
        terms = (log_p.exp() * size + torch.nn.functional.one_hot(target, V)) / 0.7
        for name in ("logprob", "entropy"):
            (grad,) = torch.autograd.grad(getattr(got, name).sum(), leaf, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected[name].sum(), expected_leaf, retain_graph=True)
            error = (grad.cpu().double() - wanted).abs()
            assert (error <= gradient_bound(wanted, terms, dtype)).all(), f"d {name} {rows}x{V}: {error.max():.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_entropy_against_float64(dtype):
    for rows, V in SHAPES:
        for kind in ("gaussian", "ties", "-inf columns", "denormals", "ascending"):
            logits = make_rows(kind, rows, V, dtype)
            target = logits.float().argmax(-1)
            for kept in sorted({1, max(1, int(0.67 * V)), V}):
                got = token_stats(logits.to(DEVICE), target.to(DEVICE), top_k=kept, temperature=0.7).clamped_entropy
                expected = reference.clamped_entropy(logits, kept, 0.7)
                error = (got.cpu().double() - expected).abs()
                assert (error <= value_bound("clamped_entropy", expected)).all(), f"{kind} {rows}x{V}, {kept} kept"


@gpu_only
def test_a_cuda_graph_replays_the_clamp():
    logits, target = inputs()
    expected = token_stats(inputs(seed=5)[0], target, clamp_p=0.33).clamped_entropy
    token_stats(logits, target, clamp_p=0.33)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_stats(logits, target, clamp_p=0.33).clamped_entropy
    logits.copy_(inputs(seed=5)[0])
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_covariance_against_float64(dtype):
    for rows, V in SHAPES:
        old = make_rows("gaussian", rows, V, dtype)
        new = (old.float() + 0.25 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
        leaf, expected_leaf = new.to(DEVICE).requires_grad_(), new.double().requires_grad_()
        got = logit_covariance(old.to(DEVICE), leaf)
        expected = reference.logit_covariance(old, expected_leaf)
        terms = 2 * (reference.log_probs(old).exp() + reference.log_probs(new).exp()) * 20  # |log p| + H < 20 here
        for name, value in expected.items():
            error = (getattr(got, name).detach().cpu().double() - value.detach()).abs()
            assert (error <= value_bound(name, value.detach())).all(), f"{name} {rows}x{V}: {error.max():.2e}"
            (grad,) = torch.autograd.grad(getattr(got, name).sum(), leaf, retain_graph=True)
            (wanted,) = torch.autograd.grad(value.sum(), expected_leaf, retain_graph=True)
            error = (grad.cpu().double() - wanted).abs()
            assert (error <= gradient_bound(wanted, terms, dtype)).all(), f"d {name} {rows}x{V}: {error.max():.2e}"


@gpu_only
def test_rows_that_the_cpu_refuses_are_nan_and_leave_the_others_alone():
    logits, target = inputs(5, 3000)
    clean = statistics(logits, target)
    logits[1] = -torch.inf  # nothing finite
    target[3] = 3000  # no such token
    stats = token_stats(logits, target)
    assert stats.logprob[[1, 3]].isnan().all() and stats.entropy[[1, 3]].isnan().all()
    assert torch.equal(stats.logprob[[0, 2, 4]], clean[0][[0, 2, 4]])
    assert torch.equal(stats.entropy[[0, 2, 4]], clean[1][[0, 2, 4]])


def test_a_row_has_the_same_bits_in_any_batch():
    logits, target = inputs()
    whole = statistics(logits, target)
    wide = torch.full((T, V + 5), torch.nan, dtype=logits.dtype, device=DEVICE)
    wide[:, 1 : V + 1] = logits  # another stride, off the 16-byte boundaries
    for found in (statistics(wide[:, 1 : V + 1], target), statistics(logits, target)):
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    for t in (0, T - 1):
        alone = statistics(logits[t : t + 1], target[t : t + 1])
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, whole, strict=True))


def test_the_ops_keep_torchs_contract():
    logits, target = inputs(3, 50, torch.float32)
    library, spec = torch.ops.entcov, (0, 50, 1.0, -100)
    weight, mask = torch.ones(3, device=DEVICE), torch.tensor([True, False, True], device=DEVICE)
    stats = library.row_stats(logits, target, *spec, True, True)[0]
    pair = (logits, logits + 0.1, mask)
    moved = library.covariance_stats(*pair, *spec[:3], True)[0]
    sent, moved_sent = (library.message(x, target, 7, 0, 50)[None] for x in (stats, moved))
    sketch = library.clamp_sketch(logits, target, *spec)
    sketches = library.message(sketch, target, 7, 0, 50)[None]
    bracket = library.clamp_bracket(sketches, target, 20, 5, *spec)
    partials = library.message(library.clamp_partial(logits, target, bracket, *spec), target, 7, 0, 50)[None]
    clamp = torch.zeros(3, 4, device=DEVICE)
    for op, args in (
        (library.row_stats, (logits, target, *spec, True, True)),
        (library.message, (stats, target, 7, 0, 50)),
        (library.merge_row_stats, (sent, target, *spec, True)),
        (library.logits_grad, (logits, target, stats, None, [weight, weight, None], *spec)),
        (library.clamped_stats, (logits, target, 20, *spec)),
        (library.clamp_sketch, (logits, target, *spec)),
        (library.clamp_bracket, (sketches, target, 20, 5, *spec)),
        (library.clamp_partial, (logits, target, bracket, *spec)),
        (library.clamp_refine, (partials, target, stats, bracket, clamp, 20, *spec)),
        (library.covariance_stats, (*pair, *spec[:3], True)),
        (library.merge_covariance_stats, (moved_sent, mask, 3, *spec[:3])),
        (library.logit_covariance_grad, (*pair, moved, [weight, weight, weight], *spec[:3])),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_a_message_has_the_bits_of_the_cpu():
    many = torch.randint(0, 2**40, (1_200_001,), generator=torch.Generator().manual_seed(0))
    target = many[:3001]
    payload = torch.randn(3001, 7)
    for values, call in ((target, -(2**63)), (None, 5), (target, 0), (many[:4097], 1), (many, 1)):
        here = message(payload, values, call, 3, 50)
        there = message(payload.to(DEVICE), None if values is None else values.to(DEVICE), call, 3, 50)
        assert torch.equal(there.cpu().view(torch.int32), here.view(torch.int32))


def test_a_merge_of_ranks_that_do_not_agree_is_nan():
    logits, target = inputs(3, 50, torch.float32)
    target[1] = -100
    spec = RowSpec(0, 50)
    whole = row_stats(logits, target, spec, whole=True)
    halves = (row_stats(logits[:, :20], target, spec), row_stats(logits[:, 20:], target, spec._replace(vocab_start=20)))

    def merged(*places, call=9):
        sent = [message(half, target, c, *place) for half, place, c in zip(halves, places, (9, call), strict=True)]
        return merge_row_stats(torch.stack(sent), target, spec)

    for got, wanted in zip(merged((0, 20), (20, 30)), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for found in (merged((0, 20), (21, 29)), merged((0, 20), (20, 30), call=8), merged((0, 20), (20, 30), call=0)):
        for output in found[1:]:
            assert output[[0, 2]].isnan().all() and (output[1] == 0).all()


# ---- what a GPU adds ------------------------------------------------------------------------------------------------


@gpu_only
def test_a_cuda_graph_replays_forward_and_backward_on_new_data():
    logits, target = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        statistics(logits, target, moments=True)  # what the first call sets up
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = statistics(logits, target, moments=True)
    for seed in (1, 2):
        new_logits, new_target = inputs(seed=seed)
        logits.copy_(new_logits)
        target.copy_(new_target)
        graph.replay()
        expected = statistics(new_logits, new_target, moments=True)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@gpu_only
def test_a_cuda_graph_replays_logit_covariance():
    old, _ = inputs()
    new = old + 0.1
    logit_covariance(old, new)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = logit_covariance(old, new)
    old.copy_(inputs(seed=3)[0])
    new.copy_(old + 0.2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, logit_covariance(old, new), strict=True))


@gpu_only
def test_kernels_go_to_the_current_stream():
    """The logits are written on a side stream behind 50 ms of waiting; work on another stream would not see them."""
    logits, target = inputs()
    expected = statistics(logits, target)
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(logits)
        found = statistics(late, target)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@gpu_only
def test_nothing_waits_for_the_gpu():
    logits, target = inputs()
    new = logits + 0.1
    statistics(logits, target, moments=True)
    logit_covariance(logits, new)
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics(logits, target, moments=True)
        logit_covariance(logits, new)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("width", [64, 19008, 152064])
def test_peak_memory_beyond_the_gradient(width):
    """64 bytes a token, and for long rows the statistics of their segments. As requested: the allocator's own rounding
    may add up to a megabyte a tensor, depending on what it has in store."""
    rows = 4096
    logits, target = inputs(rows, width)
    statistics(logits[:8], target[:8])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = statistics(logits, target)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - found[2].nbytes
    from entcov import _cuda

    segments = _cuda.segments(width)
    assert peak <= rows * (64 + (16 * segments if segments > 1 else 0)) + 1024


@gpu_only
def test_in_place_gradient_allocates_nothing_of_the_logits_size():
    logits, target = inputs(512, 19008)
    spec = RowSpec(0, 19008)
    stats = row_stats(logits, target, spec)
    grads = (torch.ones(512, device=DEVICE), None, None)
    expected = logits_grad(logits, target, stats, None, grads, spec)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits_grad_(logits, target, stats, None, grads, spec)
    assert torch.cuda.max_memory_allocated() - before <= 1024
    assert torch.equal(logits, expected)


@gpu_only
def test_offsets_beyond_32_bits():
    """More than 2^32 elements, 8.6 GB: the last rows have the bits that they have by themselves."""
    rows, width = 4100, 1 << 20
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    logits = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.arange(rows, device=DEVICE)
    whole = statistics(logits, target)
    for found, one in zip(whole, statistics(logits[-2:].clone(), target[-2:]), strict=True):
        assert torch.equal(found[-2:], one)


@gpu_only
def test_the_second_gpu_is_as_good_as_the_first():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    logits, target = inputs()
    there = statistics(logits.to("cuda:1"), target.to("cuda:1"))  # while cuda:0 is current
    assert all(torch.equal(a, b.to(DEVICE)) for a, b in zip(statistics(logits, target), there, strict=True))


@gpu_only
def test_a_compiled_model_on_the_device():
    logits, target = inputs()

    def loss(logits):
        stats = token_stats(logits, target)
        return (-stats.logprob + 0.01 * stats.entropy).sum()

    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    loss(other).backward()
    assert torch.equal(leaf.grad, other.grad)
