"""row_stats and merge_row_stats against float64, on every kind of row, vocabulary size, dtype and instruction set."""

import math
import random

import pytest
import torch

from entcov.verify import reference
from tests.support import local_ops as ops
from tests.support.row_kinds import KINDS, VOCAB_SIZES, assert_close, rows, targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100
ON_A_GPU = ("cuda", "emulated")  # what the fixture `isa` says where the CUDA kernels run


def statistics(logits, target, *, start=0, size=None, temperature=1.0, moments=True):
    size = logits.shape[1] + start if size is None else size
    return ops.row_stats(logits, target, start, size, temperature, moments, IGNORE)


def merged(shards, target, temperature=1.0):
    return ops.merge_row_stats(torch.stack(shards), target, temperature, IGNORE)


def derived(stats, temperature=1.0):
    """What csrc/row_stats.h says the fields give, in float64 so that only the kernel's rounding is seen."""
    top, rest, xexp, target, rest2, xexp2, x2exp = stats.double().unbind(-1)
    total, log_total = 1 + rest, rest.log1p()
    entropy, mean = log_total - xexp / total, xexp / total
    collision = (1 + rest2) / total**2
    logprob = (target - top) / temperature - log_total
    mean_s = entropy * collision + (xexp2 - log_total * (1 + rest2)) / total**2
    p = logprob.exp()
    return {
        "logprob": logprob,
        "entropy": entropy,
        "collision": collision,
        "varentropy": x2exp / total - mean**2,
        "entropy_drift": mean_s - torch.where(p > 0, p * (entropy + logprob), 0.0),
    }


def check(logits, target, stats, temperature=1.0):
    expected = reference.token_stats(logits, target, temperature=temperature)
    actual = derived(stats, temperature)
    # 1e-5 is the promise; the relative part is fp32's, for values of 1e4. The varentropy is E[y^2] - E[y]^2.
    spread = (logits.double().amax(-1, keepdim=True) - logits.double()) / temperature
    square = reference.expectation(reference.log_probs(logits, temperature), spread**2)
    for name in expected:
        room = 1e-6 * square if name == "varentropy" else 0.0
        error = (actual[name] - expected[name]).abs()
        assert (error <= 1e-5 + 3e-7 * expected[name].abs() + room).all(), f"{name}: {actual[name]} {expected[name]}"
    # A peaked row keeps its digits. (Below 1e-7 the oracle, log_softmax in float64, has fewer.)
    alive = expected["entropy"] > 1e-7
    assert_close(
        actual["entropy"][alive], expected["entropy"][alive], absolute=0, relative=1e-5, what="relative entropy"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_matches_float64(kind, dtype, isa):
    for V in (1, 7, 8, 1000, 5003):
        logits = rows(kind, 5, V, dtype)
        target = targets(logits)
        for temperature in (1.0, 0.6):
            stats = statistics(logits, target, temperature=temperature)
            check(logits, target, stats, temperature)
            without = statistics(logits, target, temperature=temperature, moments=False)
            assert torch.equal(without, stats[:, :4])


@pytest.mark.parametrize("V", VOCAB_SIZES)
def test_every_vocabulary_size_matches_float64(V, isa):
    for kind in ("gaussian", "peaked", "uniform"):
        logits = rows(kind, 2, V, torch.bfloat16)
        target = targets(logits)
        check(logits, target, statistics(logits, target))


def test_entropy_of_a_nearly_certain_row_keeps_its_digits(isa):
    """One column a above V - 1 equal ones, in closed form: log_softmax in float64 has 5 digits left at H = 1e-7."""
    V = 151936
    logits = torch.zeros(40, V)
    logits[:, 70000] = torch.linspace(5, 33, 40)
    entropy = derived(statistics(logits, torch.full((40,), 70000)))["entropy"]
    a = logits[:, 70000].double()
    rest = (V - 1) * (-a).exp()
    expected = rest.log1p() + a * rest / (1 + rest)
    assert expected.min() < 1e-7 and expected.max() > 11
    # On a GPU: log2(e) is off by 1.3e-8 of itself, which at 33 makes 4.4e-7, and EX2 by up to 2^-22.
    assert_close(entropy, expected, absolute=0, relative=1e-6 if isa in ON_A_GPU else 5e-7)


def test_exponential_is_as_accurate_as_promised(isa):
    """CPU: 2e-7. CUDA: one FFMA and one EX2, so the exponent y log2(e) is rounded, to 2^-24 of itself, after a log2(e)
    that is off by 1.3e-8 of itself, and EX2 adds 2^-22: 2.5e-7 + 7.4e-8 |y|, at most 7e-6 in the range of fp32."""
    y = torch.cat((torch.linspace(-87.3, 0, 4001 if isa == "emulated" else 200_001), -torch.logspace(-30, 0, 500)))
    logits = torch.stack((torch.zeros_like(y), y), dim=1)
    e = statistics(logits, torch.zeros(len(y), dtype=torch.int64))[:, 1].double()
    below = y < 0  # y = 0 is a tie: its rest is e^0
    error = (e[below] / y[below].double().exp() - 1).abs()
    assert (error < (2.5e-7 + 7.4e-8 * y[below].abs() if isa in ON_A_GPU else 2e-7)).all()
    assert (e[~below] == 1).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bounds_hold_with_room_where_the_errors_of_all_exponentials_agree(temperature, isa):
    """All columns but one are equal, at the logits whose exponent a CUDA kernel rounds worst, up and down: nothing
    averages out. The promise, 1e-5 absolutely and relatively at V = 151,936, is kept with half of it to spare."""
    V = 151936
    z = torch.linspace(-30 * temperature, -8 * temperature, 22_001)
    scale = torch.tensor(1 / temperature) * torch.tensor(1.44269504088896341)  # fp32, as the kernels have it
    wrong = (z * scale).double() - z.double() / temperature / math.log(2)
    heights = [part[i] for part, w in zip(z.chunk(4), wrong.chunk(4), strict=True) for i in (w.argmin(), w.argmax())]
    logits = torch.stack(heights)[:, None].repeat(1, V)
    logits[:, 70000] = 0
    target = torch.full((8,), 70000)
    found = derived(statistics(logits, target, temperature=temperature), temperature)
    y = torch.stack(heights).double() / temperature
    rest = (V - 1) * y.exp()
    assert rest.min() < 1e-6 and rest.max() > 1
    expected = {"logprob": -rest.log1p(), "entropy": rest.log1p() - y * rest / (1 + rest)}
    for name, value in expected.items():
        assert ((found[name] - value).abs() <= 0.5 * 1e-5 * value.abs().clamp(max=1)).all(), name


@pytest.mark.parametrize("y", [-87.5, -87.7, -88.0, -104.0, -1e4, -3e38, -math.inf])
def test_exponential_vanishes_below_the_range_of_fp32(y, isa):
    stats = statistics(torch.tensor([[0.0, y, y]]), torch.tensor([0]))[0]
    assert stats[1] <= 2.1 * math.exp(-87.4)  # and is no NaN
    if y <= -88:
        assert (stats[1:3] == 0).all() and (stats[4:] == 0).all()


def test_no_rows_and_no_columns(isa):
    for T, V in ((0, 8), (0, 0), (3, 0)):
        stats = statistics(torch.empty(T, V), torch.zeros(T, dtype=torch.int64), size=5)
        assert stats.shape == (T, 7)
        assert (stats[:, [0, 3]] == -math.inf).all() and (stats[:, [1, 2, 4, 5, 6]] == 0).all()


def test_fp16_is_read_exactly(isa):
    """Every fp16 pattern: as the largest logit it is the field `max`, NaN and inf make their row NaN."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    stats = statistics(values[:, None].contiguous(), torch.zeros(65536, dtype=torch.int64), moments=False)
    finite = torch.isfinite(values)
    assert torch.equal(stats[finite, 0], values[finite].float())
    assert torch.equal(stats[finite, 3], values[finite].float())
    bad = ~finite & (values != -torch.inf)
    assert stats[bad, 1].isnan().all() and not stats[~bad, 1].isnan().any()


# ---- what a row's result may depend on ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(dtype, isa):
    V = 5003
    logits = rows("gaussian", 5, V, dtype)
    target = targets(logits)
    expected = statistics(logits, target)
    for t in range(5):
        assert torch.equal(statistics(logits[t : t + 1], target[t : t + 1]), expected[t : t + 1])
    flat = torch.empty(5 * (V + 9) + 3, dtype=dtype)
    for offset in range(3):  # every alignment, and a row stride that is not V
        strided = flat[offset : offset + 5 * (V + 9)].view(5, V + 9)[:, 4 : V + 4]
        strided.copy_(logits)
        assert torch.equal(statistics(strided, target), expected)
    assert torch.equal(statistics(logits[::2], target[::2].contiguous()), expected[::2])
    one_row = logits[3].expand(4, V)  # row stride 0
    assert torch.equal(statistics(one_row, target[3].repeat(4)), expected[3].expand(4, 7))


def test_the_number_of_threads_changes_no_bit(isa):
    logits = rows("gaussian", 40, 1003, torch.bfloat16)
    target = targets(logits)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(statistics(logits, target))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 1000, 4999])
def test_nan_and_plus_infinity_stay_in_their_row(bad, column, isa):
    logits = rows("gaussian", 3, 5000)
    clean = statistics(logits, targets(logits))
    target = targets(logits)
    logits[1, column] = bad
    stats = merged([statistics(logits, target)], target)
    assert torch.equal(stats[[0, 2]], clean[[0, 2]])
    values = derived(stats)
    for name in values:
        assert values[name][1].isnan(), name
    # Whatever the other shards hold.
    cut = [statistics(logits[:, a : a + 1000], target, start=a, size=5000) for a in range(0, 5000, 1000)]
    for order in (cut, cut[::-1]):
        joined = derived(merged(order, target))
        assert all(joined[name][1].isnan() for name in joined)
        assert not any(joined[name][[0, 2]].isnan().any() for name in joined)


def test_a_row_of_nan_or_nan_beside_minus_infinity(isa):
    logits = torch.full((2, 3000), -torch.inf)
    logits[0] = torch.nan
    logits[1, 2500] = torch.nan
    stats = merged([statistics(logits, torch.tensor([0, 1]))], torch.tensor([0, 1]))  # no "no finite logit" error
    assert all(value.isnan().all() for value in derived(stats).values())


def test_ignored_rows_are_zero_and_not_read(isa):
    logits = rows("gaussian", 4, 50)
    target = targets(logits)
    expected = statistics(logits, target)
    logits[1], logits[3] = torch.nan, -torch.inf
    target[1] = target[3] = IGNORE
    stats = merged([statistics(logits, target)], target)
    assert (stats[[1, 3]] == 0).all() and torch.equal(stats[[0, 2]], expected[[0, 2]])


def test_padding_columns_do_not_exist(isa):
    logits = rows("gaussian", 3, 60)
    target = targets(logits[:, :41])
    expected = statistics(logits[:, :41], target)
    logits[:, 41:] = torch.tensor([torch.nan, torch.inf, 1e30, -3.0]).repeat(5)[:19]
    assert torch.equal(statistics(logits, target, size=41), expected)
    nothing = statistics(logits, target, start=60, size=41)
    assert (nothing[:, [0, 3]] == -torch.inf).all() and (nothing[:, [1, 2, 4, 5, 6]] == 0).all()
    assert torch.equal(merged([expected, nothing], target), expected)


# ---- merge ----------------------------------------------------------------------------------------------------------


def cut(logits, target, bounds, temperature):
    V = logits.shape[1]
    return [
        statistics(logits[:, a:b], target, start=a, size=V, temperature=temperature)
        for a, b in zip([0, *bounds], [*bounds, V], strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_merge_to_the_whole_row(kind, isa):
    logits = rows(kind, 4, 3001)
    target = targets(logits)
    random.seed(3)
    for shards, temperature in ((1, 1.0), (2, 0.7), (7, 1.3), (300, 1.0)):
        bounds = sorted(random.choices(range(3002), k=shards - 1))  # repeats make empty shards
        parts = cut(logits, target, bounds, temperature)
        for order in (parts, parts[::-1]):
            check(logits, target, merged(order, target, temperature), temperature)


def test_five_thousand_shards():
    logits = rows("peaked", 3, 5000)
    target = targets(logits)
    check(logits, target, merged(cut(logits, target, range(1, 5000), 1.0), target))


def test_merge_is_associative():
    logits = rows("gaussian", 6, 1200)
    target = targets(logits)
    parts = cut(logits, target, range(100, 1200, 100), 0.8)
    left = parts[0]
    for part in parts[1:]:
        left = merged([left, part], target, 0.8)
    level = parts
    while len(level) > 1:
        level = [merged(level[i : i + 2], target, 0.8) for i in range(0, len(level), 2)]
    assert_close(left, level[0], absolute=1e-6, relative=2e-6)
    check(logits, target, left, 0.8)
    check(logits, target, level[0], 0.8)


def test_merge_of_one_shard_and_of_empty_shards_changes_nothing():
    logits = rows("gaussian", 3, 100)
    target = targets(logits)
    whole = statistics(logits, target)
    empty = statistics(torch.full_like(logits, -torch.inf), target, start=100, size=200)
    assert torch.equal(merged([whole], target), whole)
    assert torch.equal(merged([empty, whole, empty], target), whole)


def test_shards_whose_maxima_are_out_of_sight_of_each_other(isa):
    """3e38 below the maximum: the difference overflows, and 0 * inf must not arise."""
    high, low = torch.tensor([[3e38, 1.0]]), torch.tensor([[-3e38, -3e38]])
    target = torch.tensor([0])
    for temperature in (1.0, 1e-3):
        parts = [
            statistics(high, target, size=4, temperature=temperature),
            statistics(low, target, start=2, size=4, temperature=temperature),
        ]
        for order in (parts, parts[::-1]):
            stats = merged(order, target, temperature)[0]
            assert stats[0] == high[0, 0] and (stats[[1, 2, 4, 5, 6]] == 0).all()


def test_a_row_without_a_finite_logit_is_an_error_that_counts():
    logits = rows("gaussian", 5, 30)
    target = targets(logits)
    logits[2] = logits[4] = -torch.inf
    stats = statistics(logits, target)
    with pytest.raises(ValueError, match=r"2 rows have no finite logit \(first: row 2\)"):
        merged([stats, stats], target)
    target[2] = IGNORE
    with pytest.raises(ValueError, match=r"1 rows have no finite logit \(first: row 4\)"):
        merged([stats], target)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_logits_of_any_size(dtype, isa):
    """The CUDA kernels multiply by 1 / temperature before they subtract, and put the rounding of that right afterwards.
    From logits of about 1e10 on that made NaN. Offsets and spreads of each size."""
    sizes = 10.0 ** torch.arange(-3, 39)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(len(sizes), 2500, generator=rng).clamp(-3, 3)
    for logits in (sizes[:, None] * noise, sizes[:, None] + noise, -sizes[:, None] * (1 + 1e-6 * noise)):
        logits = logits.clamp(-3e38, 3e38).to(dtype)
        target = targets(logits)
        for temperature in (1.0, 0.3, 1e4):
            check(logits, target, statistics(logits, target, temperature=temperature), temperature)
