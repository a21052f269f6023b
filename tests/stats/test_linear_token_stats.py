"""linear_token_stats on one process: token_stats of the head's logits, in values and gradients, for any chunks; what it
keeps, how many products it makes, and what many chunks do to a sum in bf16. Over ranks: tests/support/gloo_linear.py.
"""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import peak_allocated_bytes
from entcov import linear_token_stats, token_stats
from entcov.stats.lm_head import BLOCK_ROWS, chunk_size_for
from entcov.verify import reference
from entcov.verify.row_kinds import value_bound
from tests.support.objective_oracle import NoHostRead

NAMES = ("logprob", "entropy", "clamped_entropy")
SETTINGS = dict(vocab_size=80, temperature=0.8, clamp_p=0.3, moments=True)
HALF_STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def case(dtype=torch.float32, shape=(4, 10), V=83, D=16, seed=0):
    """Leaves hidden, weight, bias, and targets with some ignored. The columns from 80 on are padding, and poisoned."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=rng) for s in ((*shape, D), (V, D), (V,)))
    weight, bias = (0.7 * weight).to(dtype), bias.to(dtype)
    weight[80:], bias[80:] = torch.nan, torch.inf
    target = torch.randint(0, min(V, 80), shape, generator=rng)
    target[1, 3:7] = -100
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), target


def loss_of(stats):
    weight = torch.linspace(0.5, 1.5, stats.logprob.numel()).view(stats.logprob.shape)
    loss = (-stats.logprob * weight + 0.3 * stats.entropy).sum()
    return loss if stats.clamped_entropy is None else loss - 0.2 * (stats.clamped_entropy * weight).sum()


def materialised(hidden, weight, target, bias=None, **settings):
    return token_stats(linear(hidden, weight, bias), target, **settings)


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_STEP)
def test_equals_token_stats_of_the_logits_for_every_chunk_size(dtype):
    hidden, weight, bias, target = case(dtype)
    for with_bias in (False, True):
        leaves = (hidden, weight, bias)[: 2 + with_bias]
        arguments = dict(bias=bias if with_bias else None, **SETTINGS)
        expected = materialised(hidden, weight, target, **arguments)
        # Autograd multiplies the padding's weights by 0, which NaN survives: the oracle's hidden gradient has none.
        clean = [x.detach().clone().requires_grad_() for x in leaves]
        with torch.no_grad():
            for x in clean[1:]:
                x[80:] = 0
        wanted = torch.autograd.grad(loss_of(materialised(clean[0], clean[1], target, *clean[2:], **SETTINGS)), clean)
        for chunk_size in (None, 1, 7, 36, 1000):
            got = linear_token_stats(hidden, weight, target, chunk_size=chunk_size, **arguments)
            for name, value in got._asdict().items():
                # The product may round a logit the other way for another number of rows: one step of a logit of 8.
                tolerance = 16 * HALF_STEP[dtype] if dtype != torch.float32 else 1e-5
                torch.testing.assert_close(value, getattr(expected, name), rtol=1e-5, atol=tolerance, msg=name)
            grads = torch.autograd.grad(loss_of(got), leaves)
            assert all((x[80:] == 0).all() for x in grads[1:])
            for grad, want in zip(grads, wanted, strict=True):
                assert grad.dtype == dtype and grad.shape == want.shape
                error = (grad.double() - want.double()).norm() / want.double().norm()
                assert error < (1e-6 if dtype == torch.float32 else 2 * HALF_STEP[dtype]), (chunk_size, error)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_against_float64(chunk_size):
    hidden, weight, bias, target = case(D=48, V=80)
    settings = dict(temperature=0.8, top_k=9)
    got = linear_token_stats(hidden, weight, target, bias=bias, chunk_size=chunk_size, moments=True, **settings)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = linear(*exact).flatten(0, 1)
    # An fp32 product of 48 terms is itself off by about 1e-6 in a logit of 5.
    counts = target.flatten() != -100
    expected = reference.token_stats(logits, target.flatten(), **settings)
    for name, value in expected.items():
        value = torch.where(counts, value, 0.0)
        error = (getattr(got, name).flatten().double() - value).abs()
        assert (error <= value_bound(name, value.detach()) + 1e-5).all(), name
    scale = torch.linspace(0.5, 1.5, target.numel()).double()
    for name in NAMES:
        total = (getattr(got, name).flatten() * scale.float()).sum()
        grads = torch.autograd.grad(total, (hidden, weight, bias), retain_graph=True)
        wanted = torch.autograd.grad((expected[name] * scale * counts).sum(), exact, retain_graph=True)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=2e-5, atol=1e-5)


def test_tied_weights_get_both_gradients():
    """An embedding that is also the head: what the lookup and the head contribute add up."""
    tokens, target = torch.randint(0, 29, (2, 9)), torch.randint(0, 29, (2, 9))
    table = torch.randn(29, 8, requires_grad=True)
    grads = {}
    for function in (materialised, linear_token_stats):
        hidden = torch.nn.functional.embedding(tokens, table).tanh()
        (grads[function],) = torch.autograd.grad(loss_of(function(hidden, table, target)), table)
    torch.testing.assert_close(grads[linear_token_stats], grads[materialised], rtol=1e-5, atol=1e-5)
    head_alone = torch.autograd.grad(loss_of(linear_token_stats(hidden.detach(), table, target)), table)[0]
    assert (grads[linear_token_stats] - head_alone).abs().max() > 0.1


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_what_requires_a_gradient_gets_one(frozen):
    leaves = list(case(V=80)[:3])
    target = case(V=80)[3]
    leaves[frozen] = leaves[frozen].detach()
    rest = [x for x in leaves if x.requires_grad]
    for chunk_size in (None, 7):
        got = linear_token_stats(leaves[0], leaves[1], target, bias=leaves[2], chunk_size=chunk_size)
        wanted = torch.autograd.grad(loss_of(materialised(leaves[0], leaves[1], target, leaves[2])), rest)
        for grad, want in zip(torch.autograd.grad(loss_of(got), rest), wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_unused_outputs_and_a_loss_of_one_token():
    hidden, weight, _, target = case(V=80)
    for chunk_size in (None, 7):
        stats = linear_token_stats(hidden, weight, target, top_k=5, chunk_size=chunk_size)
        (grad,) = torch.autograd.grad(stats.clamped_entropy[2, 4], hidden)
        assert (grad[2, 4] != 0).any() and grad.count_nonzero() == grad[2, 4].count_nonzero()
    assert not any(x.requires_grad for x in linear_token_stats(hidden, weight, target, moments=True)[3:])


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_no_tokens(chunk_size):
    hidden, weight = torch.empty(2, 0, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    out = linear_token_stats(
        hidden, weight, torch.empty(2, 0, dtype=torch.int64), clamp_p=0.2, moments=True, chunk_size=chunk_size
    )
    assert all(x.shape == (2, 0) for x in out)
    (out.logprob.sum() + out.clamped_entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape and (weight.grad == 0).all()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_ignored_tokens_take_no_part_even_where_they_hold_nan(chunk_size):
    hidden, weight, bias, target = case()
    with torch.no_grad():
        hidden[1, 3:7] = torch.nan
    leaves = (hidden, weight, bias)
    out = linear_token_stats(hidden, weight, target, bias=bias, chunk_size=chunk_size, **SETTINGS)
    assert all((x[1, 3:7] == 0).all() and x.isfinite().all() for x in out)
    grads = torch.autograd.grad(loss_of(out), leaves)
    assert (grads[0][1, 3:7] == 0).all() and all(g.isfinite().all() for g in grads)
    everything = torch.full_like(target, -100)
    out = linear_token_stats(hidden, weight, everything, bias=bias, chunk_size=chunk_size, **SETTINGS)
    assert all((x == 0).all() for x in out)
    assert all((g == 0).all() for g in torch.autograd.grad(loss_of(out), leaves))


def test_one_token_without_leading_dims():
    hidden, weight = torch.randn(5), torch.eye(5)
    out = linear_token_stats(hidden, weight, torch.tensor(2), top_k=3)
    expected = token_stats(hidden, torch.tensor(2), top_k=3)
    assert out.logprob.shape == () and torch.allclose(out.clamped_entropy, expected.clamped_entropy)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_chunk_is_what_the_docstring_says(itemsize):
    row = 1000 * itemsize
    for tokens, budget_rows, expected in [
        (0, 10, 1), (10, 10, 10), (11, 10, 6), (5, 0.5, 1), (1000, 300, 256), (1000, 255, 250), (4096, 1024, 1024),
        (4097, 1024, 896), (4096, 1000, 896),
    ]:  # fmt: skip
        found = chunk_size_for(tokens, 1000, itemsize, int(budget_rows * row))
        assert found == expected, (tokens, budget_rows, found)
        assert found * row <= max(budget_rows * row, row)
    assert chunk_size_for(7, 0, itemsize, 100) == 7  # a shard without columns
    # A sum of 90 rows' size that chunks would need: 100 rows of logits take no more than it and a chunk of 10.
    assert chunk_size_for(100, 1000, itemsize, 10 * row, 90 * row) == 100
    assert chunk_size_for(101, 1000, itemsize, 10 * row, 90 * row) == 10


# ---- what it costs --------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts floating-point operations of matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings, forward, backward",
    [
        (dict(chunk_size=48), 1, 2),  # kept
        (dict(chunk_size=10), 1, 3),  # made again
        (dict(chunk_size=10, clamp_p=0.3), 1, 3),
        (dict(chunk_size=48, clamp_p=0.3), 1, 2),
        (dict(memory_budget=48 * 64 * 4), 1, 2),
        (dict(memory_budget=20 * 64 * 2), 1, 3),
    ],
)
def test_number_of_products(dtype, settings, forward, backward):
    """Three with kept logits, four without; and a quarter of the tokens, ignored, costs nothing."""
    hidden, weight, target = torch.randn(64, 12), torch.randn(64, 12), torch.arange(64)
    target[::4] = -100
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    one = 2 * 48 * 64 * 12
    with Products() as counted:
        stats = linear_token_stats(hidden, weight, target, **settings)
    assert counted.flops == forward * one
    with Products() as counted:
        loss_of(stats).backward()
    assert counted.flops == backward * one


def test_peak_memory():
    """Beyond the arguments: the chunk of logits, the gradients, and 100 bytes a token."""
    T, V, D = 256, 8000, 16
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target = torch.randint(0, V, (T,))
    gradients = hidden.nbytes + weight.nbytes

    def run(function, **settings):
        def both():
            return torch.autograd.grad(loss_of(function(hidden, weight, target, **settings)), (hidden, weight))

        return peak_allocated_bytes(both)

    logits = T * V * 4
    for chunk_size in (T, 64, 10):
        peak = run(linear_token_stats, chunk_size=chunk_size)
        assert peak <= chunk_size * V * 4 + gradients + 100 * T, chunk_size
        assert peak >= chunk_size * V * 4
    clamp_p, chunk = dict(clamp_p=0.3, chunk_size=64), 64 * V * 4
    assert run(linear_token_stats, **clamp_p) <= chunk + gradients + 100 * T
    assert run(materialised) >= 2 * logits  # what it is compared with: logits and their gradient
    with torch.no_grad():
        stats = peak_allocated_bytes(lambda: linear_token_stats(hidden, weight, target, memory_budget=chunk))
    assert stats <= chunk + 100 * T


def test_peak_memory_of_bf16_has_one_fp32_sum_unless_main_grad_is_given():
    T, V, D = 64, 4000, 64
    hidden, weight = (torch.randn(n, D).bfloat16().requires_grad_() for n in (T, V))
    target, main_grad = torch.randint(0, V, (T,)), torch.zeros(V, D)
    chunk, temporary = 8 * V * 2, BLOCK_ROWS * D * (2 + 4)  # a block, and its cast

    def run(**settings):
        def both():
            loss_of(linear_token_stats(hidden, weight, target, **settings)).backward()

        hidden.grad = weight.grad = None
        return peak_allocated_bytes(both)

    small = 2 * hidden.nbytes + 100 * T + 2**18  # the last for the library's own copies of pieces of a product
    assert run(chunk_size=8) <= chunk + weight.nbytes + 4 * V * D + temporary + small
    assert run(chunk_size=8, main_grad=main_grad) <= chunk + temporary + small
    assert run(chunk_size=T) <= T * V * 2 + weight.nbytes + small  # one product, no sum


# ---- many chunks in bf16 --------------------------------------------------------------------------------------------


def policy_gradient_case():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 16, generator=rng).bfloat16(), 0.4 * torch.randn(64, 16, generator=rng)
    probability = (hidden.float() @ weight.T).softmax(-1)
    target = torch.multinomial(probability, 1, generator=rng)[:, 0]
    return hidden, weight, target, torch.randn(4096, generator=rng)


def test_the_error_of_the_weights_gradient_does_not_grow_with_the_number_of_chunks():
    """The published failure is a sum over chunks in bf16. Here one chunk has one rounding; 512 chunks may have no
    visible error more, where the sum in bf16 has several times as much."""
    hidden, weight, target, advantage = policy_gradient_case()
    weight = weight.bfloat16().requires_grad_()

    def loss(stats, advantage=advantage):
        return -(advantage * stats.logprob).sum() - 0.05 * stats.entropy.sum()

    exact = weight.detach().double().requires_grad_()
    expected = reference.token_stats(hidden.double() @ exact.T, target)
    total = -(advantage.double() * expected["logprob"]).sum() - 0.05 * expected["entropy"].sum()
    (wanted,) = torch.autograd.grad(total, exact)

    def error(grad):
        return float((grad.double() - wanted).norm() / wanted.norm())

    errors = {}
    for chunk_size in (4096, 64, 8):
        stats = linear_token_stats(hidden, weight, target, chunk_size=chunk_size)
        errors[chunk_size] = error(torch.autograd.grad(loss(stats), weight)[0])
    summed = torch.zeros_like(weight)
    for rows in range(0, 4096, 8):
        part = slice(rows, rows + 8)
        stats = token_stats(hidden[part] @ weight.T, target[part])
        summed += torch.autograd.grad(loss(stats, advantage[part]), weight)[0]
    assert errors[4096] < 2**-8  # the rounding of the gradients of the logits, and of the result
    assert max(errors.values()) < 1.5 * errors[4096], errors
    assert error(summed) > 4 * errors[8], (error(summed), errors)


def test_entropy_follows_the_exact_path_over_many_steps():
    """Forty steps of a policy gradient, the weight's gradient summed over 512 chunks of bf16."""
    hidden, start, target, advantage = policy_gradient_case()

    def gradient(weight):
        leaf = weight.float().bfloat16().requires_grad_()
        stats = linear_token_stats(hidden, leaf, target, chunk_size=8)
        return torch.autograd.grad(-(advantage * stats.logprob).sum() - 0.05 * stats.entropy.sum(), leaf)[0].double()

    def exact(weight):
        leaf = weight.float().bfloat16().double().requires_grad_()
        stats = reference.token_stats(hidden.double() @ leaf.T, target)
        total = -(advantage.double() * stats["logprob"]).sum() - 0.05 * stats["entropy"].sum()
        return torch.autograd.grad(total, leaf)[0]

    def entropy(weight):
        return float(reference.token_stats(hidden.double() @ weight.T, target)["entropy"].mean())

    paths = [start.double(), start.double()]
    for _ in range(40):
        paths = [weight - 2e-4 * step(weight) for weight, step in zip(paths, (gradient, exact), strict=True)]
    moved = abs(entropy(paths[1]) - entropy(start.double()))
    assert moved > 0.01
    assert abs(entropy(paths[0]) - entropy(paths[1])) < 0.01 * moved


# ---- autograd and autocast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_backward_twice_gives_the_same_bits_though_kept_logits_are_overwritten(chunk_size):
    hidden, weight, bias, target = case()
    loss = loss_of(linear_token_stats(hidden, weight, target, bias=bias, chunk_size=chunk_size, **SETTINGS))
    first, second = (torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_weight_written_between_forward_and_backward_is_an_error():
    hidden, weight, _, target = case(V=80)
    loss = loss_of(linear_token_stats(hidden, weight, target, chunk_size=7))
    with torch.no_grad():
        weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_an_error():
    hidden, weight, _, target = case(V=80)
    stats = linear_token_stats(hidden, weight, target)
    (grad,) = torch.autograd.grad(stats.entropy.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_stats has no second derivative"):
        grad.sum().backward()


def test_nothing_is_kept_without_gradients():
    hidden, weight, _, target = case(V=80)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.no_grad():
        assert not linear_token_stats(hidden, weight, target).entropy.requires_grad
    assert kept == []


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_under_checkpointing(chunk_size):
    hidden, weight, _, target = case(V=80)

    def head(hidden):
        stats = linear_token_stats(hidden, weight, target, chunk_size=chunk_size)
        return stats.logprob, stats.entropy

    logprob, entropy = torch.utils.checkpoint.checkpoint(head, hidden, use_reentrant=False)
    grads = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    logprob, entropy = head(hidden)
    for grad, want in zip(grads, torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight)), strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_main_grad_is_added_to(chunk_size):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, target = case(dtype, V=80)
        (wanted,) = torch.autograd.grad(loss_of(linear_token_stats(hidden, weight, target)), weight)
        main_grad = torch.full((80, 16), 3.0)
        for turn in (1, 2):
            loss_of(linear_token_stats(hidden, weight, target, chunk_size=chunk_size, main_grad=main_grad)).backward()
            assert weight.grad is None and hidden.grad is not None
            error = (main_grad - 3.0 - turn * wanted).norm() / (turn * wanted).norm()
            assert error < (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_autocast_casts_as_linear_does_and_keeps_fp32_sums(chunk_size):
    hidden, weight, bias, target = case(V=80)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    alone = linear_token_stats(low[0], low[1], target, bias=low[2], chunk_size=chunk_size, top_k=5)
    wanted = torch.autograd.grad(loss_of(alone), low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_token_stats(hidden, weight, target, bias=bias, chunk_size=chunk_size, top_k=5)
        grads = torch.autograd.grad(loss_of(stats), (hidden, weight, bias))  # inside, as some loops have it
    for name in NAMES:
        assert torch.equal(getattr(stats, name), getattr(alone, name))
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.bfloat16(), want, rtol=2**-7, atol=1e-3)
    if chunk_size is not None:
        assert not torch.equal(grads[1], grads[1].bfloat16().float())


def test_inside_a_compiled_function():
    hidden, weight, _, target = case(V=80)

    def loss(hidden, weight):
        return loss_of(linear_token_stats(hidden * 1.5, weight, target, top_k=5, chunk_size=7)) * 2

    compiled = torch.compile(loss, backend="aot_eager")
    for grad, want in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("chunk_size", [48, 10])
def test_no_host_synchronisation_on_the_device_path(chunk_size):
    """Runs what any accelerator runs, on the device without data: reading a value would be an error. The tokens that
    are ignored are in the products there, since their number is a value."""
    shapes = ((48, 8), (64, 8), (64,))
    hidden, weight, bias = (torch.empty(*s, device="meta").bfloat16().requires_grad_() for s in shapes)
    target = torch.empty(48, dtype=torch.int64, device="meta")
    with NoHostRead() as mode:
        stats = linear_token_stats(hidden, weight, target, bias=bias, chunk_size=chunk_size, moments=True)
        loss = (stats.logprob + stats.entropy).sum()
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert "row_stats" in mode.seen and "logits_grad_" in mode.seen
    assert tuple(g.shape for g in grads) == shapes and all(g.is_meta for g in grads)


# ---- errors ---------------------------------------------------------------------------------------------------------

H, W, TARGET = torch.zeros(6, 4), torch.zeros(9, 4), torch.zeros(6, dtype=torch.int64)
BAD = [
    (dict(hidden=H.double()), TypeError, "hidden must be float32, bfloat16 or float16, got torch.float64"),
    (dict(weight=W.bfloat16()), TypeError, r"weight must have the dtype of hidden \(torch.float32\), got torch.b"),
    (dict(bias=torch.zeros(9).half()), TypeError, "bias must have the dtype of hidden"),
    (dict(weight=torch.zeros(9, 5)), ValueError, r"weight \[V_local, D\], got shapes \(6, 4\) and \(9, 5\)"),
    (dict(weight=torch.zeros(4)), ValueError, r"weight \[V_local, D\], got shapes \(6, 4\) and \(4,\)"),
    (dict(bias=torch.zeros(8)), ValueError, r"bias must have shape \(9,\) \(one a column\), got \(8,\)"),
    (dict(target=TARGET[:5]), ValueError, r"leading shape of hidden, \(6,\), got \(5,\)"),
    (dict(target=TARGET.int()), TypeError, "target must be torch.int64, got torch.int32"),
    (dict(target=torch.tensor([0, 1, -100, 9, 2, -3])), ValueError, r"2 of 6 are not, first 9 at row 3"),
    (dict(weight=torch.zeros(9, 4, device="meta")), ValueError, "weight must be on cpu like hidden, got meta"),
    (dict(target=TARGET.to("meta")), ValueError, "target must be on cpu like hidden, got meta"),
    (dict(temperature=0.0), ValueError, "temperature must be positive and finite"),
    (dict(chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
    (dict(memory_budget=0), ValueError, "memory_budget must be at least 1, got 0"),
    (dict(top_k=10), ValueError, r"top_k must be in \[1, vocab_size = 9\], got 10"),
    (dict(top_k=1, clamp_p=0.1), ValueError, "clamp_p and top_k exclude each other"),
    (dict(vocab_start=3), ValueError, "vocab_start must be 0 or None without a group"),
    (dict(main_grad=torch.zeros(9, 4)), ValueError, "main_grad must be None where weight does not require a gradient"),
    (
        dict(weight=W.clone().requires_grad_(), main_grad=torch.zeros(9, 4).half()),
        TypeError,
        "main_grad must be float32, got torch.float16",
    ),
    (
        dict(weight=W.clone().requires_grad_(), main_grad=torch.zeros(4, 9)),
        ValueError,
        r"main_grad must be \(9, 4\) on cpu like weight, got \(4, 9\) on cpu",
    ),
    (
        dict(hidden=torch.arange(24.0).view(6, 4) - 12, weight=torch.full((9, 4), torch.inf), chunk_size=2),
        ValueError,
        r"3 rows have no finite logit \(first: row 0\)",
    ),
    (
        dict(hidden=12 - torch.arange(24.0).view(6, 4), weight=torch.full((9, 4), 3e38), chunk_size=1, top_k=2),
        ValueError,
        r"3 rows have no finite logit \(first: row 3\)",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message for *_, message in BAD])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        linear_token_stats(**{**dict(hidden=H, weight=W, target=TARGET), **change})
