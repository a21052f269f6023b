"""logits_grad against float64 autograd through the oracles, its rounding bit by bit, and what it may depend on."""

import itertools
import math

import pytest
import torch

from entcov.verify import reference
from tests.support import local_ops as ops
from tests.support.row_kinds import KINDS, assert_close, rows, targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100


def upstream(T, seed=0):
    """Three gradients [T] of both signs."""
    return torch.randn(3, T, generator=torch.Generator().manual_seed(seed)).unbind(0)


def statistics(logits, target, temperature=1.0, size=None):
    size = logits.shape[1] if size is None else size
    stats = ops.row_stats(logits, target, 0, size, temperature, False, IGNORE)
    return ops.merge_row_stats(stats[None], target, temperature, IGNORE)


def clamp_of(logits, kept, temperature=1.0):
    """The clamp argument [T, 4] from the definition, in float64."""
    z = logits.double()
    threshold = z.sort(dim=-1, descending=True).values[:, kept - 1]
    weight = reference.clamp_weights(logits, kept)
    y = (z - z.amax(-1, keepdim=True)) / temperature
    log_sum = (weight * y.exp()).sum(-1).log()
    entropy = reference.tied_clamped_entropy(logits, kept, temperature)
    fraction = torch.where(z == threshold[:, None], weight, 0.0).amax(-1)
    return torch.stack((threshold, fraction, log_sum, entropy), dim=-1).float()


def gradient(logits, target, grads, *, temperature=1.0, clamp=None, size=None, stats=None, op=ops.logits_grad):
    size = logits.shape[1] if size is None else size
    stats = statistics(logits, target, temperature, size) if stats is None else stats
    return op(logits, target, stats, *grads, clamp, 0, size, temperature, IGNORE)


def expected_gradient(logits, target, grads, temperature=1.0, kept=None):
    z = logits.double().requires_grad_()
    out = reference.token_stats(z, target, temperature=temperature, top_k=kept)
    total = sum(
        (g.double() * out[name]).sum()
        for g, name in zip(grads, ("logprob", "entropy", "clamped_entropy"), strict=True)
        if g is not None
    )
    return torch.autograd.grad(total, z)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_gradient_matches_float64_on_every_kind_of_row(kind, isa):
    for V, temperature in itertools.product((1, 7, 8, 1000, 5003), (1.0, 0.6)):
        logits = rows(kind, 5, V)
        target = targets(logits)
        kept = max(1, V // 3)
        g_lp, g_h, g_k = upstream(5)
        for grads in ((g_lp, None, None), (None, g_h, None), (None, None, g_k), (g_lp, g_h, None), (g_lp, g_h, g_k)):
            clamp = clamp_of(logits, kept, temperature) if grads[2] is not None else None
            actual = gradient(logits, target, grads, temperature=temperature, clamp=clamp)
            expected = expected_gradient(logits, target, grads, temperature, kept)
            # Terms of a few units in fp32; p has the relative error of exp(y), |y| ulps at 1e4.
            assert_close(actual, expected, absolute=3e-6, relative=1e-5, what=f"V={V} T={temperature}")


@pytest.mark.parametrize("V", [32000, 151936, 152064])
def test_large_vocabularies(V, isa):
    logits = rows("gaussian", 2, V)
    target = targets(logits)
    g_lp, g_h, _ = upstream(2)
    expected = expected_gradient(logits, target, (g_lp, g_h, None))
    assert_close(gradient(logits, target, (g_lp, g_h, None)), expected, absolute=3e-7, relative=1e-5)


def test_peaked_rows_keep_the_digits_of_small_gradients(isa):
    """1 - p of the target and p of the others are about 1e-7 here; an absolute bound would pass zeros."""
    logits = rows("gaussian", 5, 1000)
    logits = logits / 2.5
    logits[:, -1] = torch.linspace(28.0, 8.0, 5)  # from a nearly certain row to a flat one
    target = torch.full((5,), 999)
    for grads in ((torch.ones(5), None, None), (None, torch.ones(5), None)):
        # Against the closed form: log_softmax in float64 loses the digits of 1 - p.
        z = logits.double()
        y = z - z.amax(-1, keepdim=True)
        rest = y[:, :-1].exp().sum(-1, keepdim=True)
        p = y.exp() / (1 + rest)
        if grads[0] is not None:
            expected = -p
            expected[:, -1:] = rest / (1 + rest)
        else:
            expected = -p * (y - (y * p).sum(-1, keepdim=True))
        assert expected.abs().amin() < 1e-11
        assert_close(gradient(logits, target, grads), expected, absolute=0, relative=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e8])
def test_half_types_are_the_fp32_gradient_rounded_to_nearest_even(dtype, scale, isa):
    """Denormals and overflow to inf included: 1e-6 and 3e8 reach beyond both ends of fp16."""
    logits = rows("gaussian", 8, 5003, dtype)
    target = targets(logits)
    grads = [scale * g for g in upstream(8)]
    clamp = clamp_of(logits, 800)
    stats = statistics(logits, target)
    exact = gradient(logits.float(), target, grads, clamp=clamp, stats=stats)
    actual = gradient(logits, target, grads, clamp=clamp, stats=stats)
    assert torch.equal(actual.view(torch.int16), exact.to(dtype).view(torch.int16))
    if dtype == torch.float16:
        assert scale != 1.0 or ((actual != 0) & (actual.abs() < 6.1e-5)).sum() > 1000
        assert scale != 3e8 or actual.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_has_the_bits_of_out_of_place(dtype, isa):
    logits = rows("gaussian", 5, 1003, dtype)
    target = targets(logits)
    target[2] = IGNORE
    for size in (1003, 950):
        target.clamp_(max=size - 1)
        stats, clamp = statistics(logits, target, size=size), clamp_of(logits[:, :size], 30)
        before = logits.clone()
        expected = gradient(logits, target, upstream(5), stats=stats, clamp=clamp, size=size)
        assert torch.equal(logits, before)
        written = logits.clone()
        version = written._version
        assert gradient(written, target, upstream(5), stats=stats, clamp=clamp, size=size, op=ops.logits_grad_) is None
        assert torch.equal(written, expected)
        assert written._version == version + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(dtype, isa):
    V = 5003
    logits = rows("gaussian", 5, V, dtype)
    target, clamp, grads = targets(logits), clamp_of(logits, 700), upstream(5)
    stats = statistics(logits, target)
    expected = gradient(logits, target, grads, stats=stats, clamp=clamp)
    for t in range(5):
        one = slice(t, t + 1)
        alone = gradient(logits[one], target[one], [g[one] for g in grads], stats=stats[one], clamp=clamp[one])
        assert torch.equal(alone, expected[one])
    flat = torch.empty(5 * (V + 9) + 3, dtype=dtype)
    for offset in range(3):
        strided = flat[offset : offset + 5 * (V + 9)].view(5, V + 9)[:, 4 : V + 4]
        strided.copy_(logits)
        assert torch.equal(gradient(strided, target, grads, stats=stats, clamp=clamp), expected)
        around = flat.clone()
        gradient(strided, target, grads, stats=stats, clamp=clamp, op=ops.logits_grad_)
        assert torch.equal(strided, expected)
        strided.copy_(logits)
        assert torch.equal(flat.view(torch.uint8), around.view(torch.uint8))  # nothing beside the rows was written


def test_the_number_of_threads_changes_no_bit(isa):
    logits = rows("gaussian", 40, 1003, torch.bfloat16)
    target = targets(logits)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradient(logits, target, (*upstream(40)[:2], None)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_give_the_columns_of_the_whole_gradient(dtype, isa):
    logits = rows("gaussian", 4, 1000, dtype)
    target, clamp, grads = targets(logits), clamp_of(logits, 90), upstream(4)
    stats = statistics(logits, target)
    whole = gradient(logits, target, grads, stats=stats, clamp=clamp)
    for start, end in ((0, 333), (333, 334), (334, 1000), (500, 500)):
        part = ops.logits_grad(logits[:, start:end], target, stats, *grads, clamp, start, 1000, 1.0, IGNORE)
        assert torch.equal(part, whole[:, start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_ignored_and_unwanted_rows_get_zeros_without_being_read(dtype, isa):
    logits = rows("gaussian", 4, 64, dtype)
    target = targets(logits[:, :50])
    stats = statistics(logits, target, size=50)
    g_lp, g_h, g_k = upstream(4)
    clean = gradient(logits, target, (g_lp, g_h, None), stats=stats, size=50)
    logits[:, 50:] = torch.nan
    logits[1] = torch.nan
    logits[3] = torch.inf
    target[1] = IGNORE
    g_lp[3] = g_h[3] = 0.0
    actual = gradient(logits, target, (g_lp, g_h, None), stats=stats, size=50)
    assert (actual[:, 50:] == 0).all() and (actual[[1, 3]] == 0).all()
    assert torch.equal(actual[[0, 2], :50], clean[[0, 2], :50])
    beyond = ops.logits_grad(logits, target, stats, g_lp, g_h, None, None, 50, 50, 1.0, IGNORE)
    assert (beyond == 0).all()
    nothing = gradient(logits, target, (None, None, None), stats=stats, size=50)
    assert (nothing == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_row(dtype, bad, isa):
    logits = rows("gaussian", 3, 500, dtype)
    target = targets(logits)
    grads = (*upstream(3)[:2], None)
    clean = gradient(logits, target, grads)
    logits[1, 123] = bad
    actual = gradient(logits, target, grads)
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], clean[[0, 2]])
    grads[0][0] = torch.nan  # an upstream NaN too
    actual = gradient(logits, target, grads)
    assert actual[0].isnan().all() and not actual[2].isnan().any()


def test_impossible_tokens_get_no_gradient(isa):
    logits = rows("-inf columns", 4, 1000)
    target = targets(logits)
    clamp = clamp_of(logits, 900)  # the threshold is -inf
    assert (clamp[:, 0] == -torch.inf).all()
    actual = gradient(logits, target, upstream(4), clamp=clamp)
    assert (actual[logits == -torch.inf] == 0).all() and torch.isfinite(actual).all()
    # Even as the target: logprob is -inf, its gradient 1 - p.
    target[:] = 1
    actual = gradient(logits, target, (torch.ones(4), None, None))
    assert (actual[:, 1] == 1).all() and torch.isfinite(actual).all()


def test_no_rows_and_no_columns(isa):
    for T, V in ((0, 8), (0, 0), (3, 0)):
        logits, target = torch.empty(T, V), torch.zeros(T, dtype=torch.int64)
        actual = ops.logits_grad(logits, target, torch.ones(T, 4), *upstream(T)[:2], None, None, 0, 8, 1.0, IGNORE)
        assert actual.shape == (T, V)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_not_those_of_the_statistics_are_an_error(dtype, isa):
    """Only where the row is read, its target is in this shard, and the logits are not overwritten anyway."""
    logits = rows("gaussian", 6, 1003, dtype)
    target = torch.tensor([3, 1002, 0, IGNORE, 9, 500])
    stats, grads = statistics(logits, target), (*(g.clone() for g in upstream(6)[:2]), None)
    grads[0][4] = grads[1][4] = 0
    gradient(logits, target, grads, stats=stats)
    for change in (2 * logits, logits + 1, logits * 0, logits / 0.7):
        with pytest.raises(RuntimeError, match="not be changed between forward and backward.* in row 0 the target"):
            gradient(change, target, grads, stats=stats)
    one = logits.clone()
    one[[3, 4]] = 0
    expected = gradient(logits, target, grads, stats=stats)
    assert torch.equal(gradient(one, target, grads, stats=stats), expected)
    one[5, 500] = torch.nan
    with pytest.raises(RuntimeError, match=r"in row 5 the target's logit was [-0-9.e]+ and is nan"):
        gradient(one, target, grads, stats=stats)
    shard = (one[:, :500].contiguous(), target, stats, *grads, None, 0, 1003, 1.0, IGNORE)
    assert torch.equal(ops.logits_grad(*shard), expected[:, :500])  # the target is on another shard
    ops.logits_grad_(one.clone(), *shard[1:])
