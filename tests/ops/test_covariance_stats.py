"""covariance_stats, its merge and its gradient against float64 (csrc/logit_covariance.h has the formulas)."""

import math
import random

import pytest
import torch

from entcov.verify import reference
from tests.support import local_ops as ops
from tests.support.row_kinds import KINDS, assert_close, rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("covariance", "entropy_change", "kl")


def pair(kind, T, V, dtype=torch.float32, step=0.1):
    """Old logits of this kind, and new ones a step away: plus a constant, which must not matter."""
    old = rows(kind, T, V)
    noise = torch.randn(T, V, generator=torch.Generator().manual_seed(V + 1))
    return old.to(dtype), (old + step * noise + 2).to(dtype)


def statistics(old, new, *, start=0, size=None, temperature=1.0, mask=None):
    return ops.covariance_stats(old, new, start, old.shape[1] + start if size is None else size, temperature, mask)


def merged(shards, temperature=1.0, mask=None):
    return ops.merge_covariance_stats(torch.stack(shards), mask, temperature)


def derived(stats, temperature=1.0):
    _, rest_old, xexp_old, _, rest_new, xexp_new, sum_d, sum_xd = stats.double().unbind(-1)
    sum_d, sum_xd = sum_d * 2**26 / temperature, sum_xd * 2**26 / temperature
    total_old, total_new = 1 + rest_old, 1 + rest_new
    return {
        "covariance": sum_xd / total_old - (xexp_old / total_old) * (sum_d / total_old),
        "entropy_change": (rest_new.log1p() - xexp_new / total_new) - (rest_old.log1p() - xexp_old / total_old),
        "kl": ((rest_new - rest_old) / total_old).log1p() - sum_d / total_old,
    }


def check(old, new, stats, temperature=1.0):
    expected = reference.logit_covariance(old, new, temperature=temperature)
    actual = derived(stats, temperature)
    # E[x d] - E[x] E[d] cancels: its error is that of E|x d|.
    log_p = reference.log_probs(old, temperature)
    x = (old.double() - old.double().amax(-1, keepdim=True)) / temperature
    d = (new.double() - old.double() - (new.double().amax(-1) - old.double().amax(-1))[:, None]) / temperature
    room = {
        "covariance": reference.expectation(log_p, (x * d).abs())
        + reference.expectation(log_p, x.abs()) * reference.expectation(log_p, d.abs()),
        "entropy_change": 1.0,
        "kl": 1.0 + reference.expectation(log_p, d.abs()),
    }
    for name in NAMES:
        error = (actual[name] - expected[name]).abs()
        assert (error <= 2e-6 * room[name] + 2e-6).all(), f"{name}: {actual[name]} {expected[name]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_matches_float64(kind, dtype, isa):
    for V in (1, 7, 8, 1000, 5003):
        for temperature, step in ((1.0, 0.01), (0.6, 1.0)):
            old, new = pair(kind, 5, V, dtype, step)
            check(old, new, statistics(old, new, temperature=temperature), temperature)


@pytest.mark.parametrize("V", [32000, 151936, 152064])
def test_large_vocabularies(V, isa):
    old, new = pair("gaussian", 2, V, torch.bfloat16, 0.3)
    check(old, new, statistics(old, new))


def test_a_small_step_keeps_its_digits(isa):
    """d is the difference of the logits, exact here, and not of two large shifted numbers."""
    old = rows("gaussian", 4, 1000)
    new = old + 2.0**-10 * torch.randint(-8, 9, old.shape, generator=torch.Generator().manual_seed(0))
    actual, expected = derived(statistics(old, new)), reference.logit_covariance(old, new)
    assert_close(actual["covariance"], expected["covariance"], absolute=2e-9, relative=1e-5)


def test_equal_logits_change_nothing(isa):
    old = rows("gaussian", 3, 3000)
    values = derived(statistics(old, old + 0.5 - 0.5))
    values_shifted = derived(statistics(old, old.clone()))
    assert (values_shifted["covariance"] == 0).all()
    for name in NAMES:  # the entropies of both sides are summed apart, and may round apart
        assert (values_shifted[name].abs() < 1e-6).all()
        assert (values[name].abs() < 1e-5).all()


# ---- infinities, NaN, masks, padding --------------------------------------------------------------------------------


def test_a_column_impossible_before_is_left_out(isa):
    old, new = pair("gaussian", 4, 3000)
    kept = torch.ones(3000, dtype=torch.bool)
    kept[5::7] = False
    old[:, ~kept] = -torch.inf
    both = new.clone()
    both[:, ~kept] = -torch.inf
    check(old, both, statistics(old, both))  # in both: as if it did not exist
    check(old, new, statistics(old, new))  # only before: the new policy counts it, the old does not


def test_a_column_impossible_only_afterwards_makes_the_kl_infinite(isa):
    old, new = pair("gaussian", 3, 3000)
    new[1, 2500] = -torch.inf
    values = derived(statistics(old, new))
    assert values["kl"][1] == torch.inf
    assert torch.isfinite(values["kl"][[0, 2]]).all()
    assert torch.isfinite(values["entropy_change"]).all()
    cut = [statistics(old[:, a : a + 500], new[:, a : a + 500], start=a, size=3000) for a in range(0, 3000, 500)]
    for order in (cut, cut[::-1]):
        assert derived(merged(order))["kl"][1] == torch.inf


@pytest.mark.parametrize("V", [300, 9000])  # 9000: the same between the chunks of one row, whose old maximum rises
def test_parts_impossible_afterwards_join_a_possible_one(V, isa):
    """The new maxima of the first two parts are both -inf, whose difference is NaN."""
    old, new = pair("ascending", 3, V)
    third = V // 3
    new[:, : 2 * third] = -torch.inf
    cut = [statistics(old[:, a : a + third], new[:, a : a + third], start=a, size=V) for a in (0, third, 2 * third)]
    expected = reference.logit_covariance(old, new)["entropy_change"]
    for stats in (statistics(old, new), merged(cut), merged(cut[::-1])):
        values = derived(stats)
        assert (values["kl"] == torch.inf).all()
        assert_close(values["entropy_change"], expected, absolute=3e-6, relative=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_in_its_row(bad, side, isa):
    both = pair("gaussian", 3, 3000)
    clean = statistics(*both)
    both[0][1, 77] = -torch.inf  # an impossible column must not hide the NaN of the other side
    both[side][1, 77] = bad
    cut = [
        statistics(both[0][:, a : a + 500], both[1][:, a : a + 500], start=a, size=3000) for a in range(0, 3000, 500)
    ]
    for stats in (merged([statistics(*both)]), merged(cut), merged(cut[::-1])):
        values = derived(stats)
        assert all(values[name][1].isnan() for name in NAMES)
        assert not any(values[name][[0, 2]].isnan().any() for name in NAMES)
    assert torch.equal(statistics(*both)[[0, 2]], clean[[0, 2]])


def test_masked_rows_are_zero_and_not_read(isa):
    old, new = pair("gaussian", 4, 300)
    clean = statistics(old, new)
    old[1], new[3] = torch.nan, -torch.inf
    mask = torch.tensor([True, False, True, False])
    stats = merged([statistics(old, new, mask=mask)], mask=mask)
    assert (stats[[1, 3]] == 0).all() and torch.equal(stats[[0, 2]], clean[[0, 2]])
    grad = ops.logit_covariance_grad(old, new, stats, *torch.ones(3, 4).unbind(0), mask, 0, 300, 1.0)
    assert (grad[[1, 3]] == 0).all() and (grad[[0, 2]] != 0).all()


def test_padding_columns_do_not_exist(isa):
    old, new = pair("gaussian", 3, 90)
    expected = statistics(old[:, :61], new[:, :61])
    old[:, 61:], new[:, 61:] = torch.nan, torch.inf
    assert torch.equal(statistics(old, new, size=61), expected)
    nothing = statistics(old, new, start=90, size=61)
    assert torch.equal(merged([expected, nothing]), expected)
    grad = ops.logit_covariance_grad(old, new, expected, *torch.ones(3, 3).unbind(0), None, 0, 61, 1.0)
    assert (grad[:, 61:] == 0).all() and torch.isfinite(grad).all()


def test_a_row_without_a_finite_logit_is_an_error_that_names_the_side():
    old, new = pair("gaussian", 4, 30)
    new[2] = -torch.inf
    with pytest.raises(ValueError, match=r"logits_new: 1 rows have no finite logit \(first: row 2\)"):
        merged([statistics(old, new)])
    old[1] = -torch.inf
    with pytest.raises(ValueError, match=r"logits_old and logits_new: 2 rows .* \(first: row 1\)"):
        merged([statistics(old, new)])


def test_no_rows_and_no_columns(isa):
    for T, V in ((0, 8), (3, 0)):
        stats = statistics(torch.empty(T, V), torch.empty(T, V), size=8)
        assert stats.shape == (T, 8)
        assert (stats[:, [0, 3]] == -torch.inf).all() and (stats[:, [1, 2, 4, 5, 6, 7]] == 0).all()


# ---- merge and independence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shards_merge_to_the_whole_row(kind, isa):
    random.seed(5)
    for shards, temperature in ((2, 0.7), (7, 1.3), (300, 1.0)):
        old, new = pair(kind, 4, 3001, step=1.0)
        bounds = sorted(random.choices(range(3002), k=shards - 1))
        parts = [
            statistics(old[:, a:b], new[:, a:b], start=a, size=3001, temperature=temperature)
            for a, b in zip([0, *bounds], [*bounds, 3001], strict=True)
        ]
        for order in (parts, parts[::-1]):
            check(old, new, merged(order, temperature), temperature)


def test_merge_is_associative():
    old, new = pair("gaussian", 6, 1200, step=1.0)
    level = [statistics(old[:, a : a + 100], new[:, a : a + 100], start=a, size=1200) for a in range(0, 1200, 100)]
    left = level[0]
    for part in level[1:]:
        left = merged([left, part])
    while len(level) > 1:
        level = [merged(level[i : i + 2]) for i in range(0, len(level), 2)]
    check(old, new, left)
    check(old, new, level[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(dtype, isa):
    V = 5003
    old, new = pair("gaussian", 5, V, dtype)
    expected = statistics(old, new)
    grads = torch.randn(3, 5).unbind(0)
    expected_grad = ops.logit_covariance_grad(old, new, expected, *grads, None, 0, V, 1.0)
    for t in range(5):
        one = slice(t, t + 1)
        assert torch.equal(statistics(old[one], new[one]), expected[one])
        alone = ops.logit_covariance_grad(old[one], new[one], expected[one], *(g[one] for g in grads), None, 0, V, 1.0)
        assert torch.equal(alone, expected_grad[one])
    flat = torch.empty(5 * (V + 9) + 3, dtype=dtype)
    for offset in range(3):
        strided = flat[offset : offset + 5 * (V + 9)].view(5, V + 9)[:, 4 : V + 4]
        strided.copy_(old)
        assert torch.equal(statistics(strided, new), expected)
        assert torch.equal(ops.logit_covariance_grad(strided, new, expected, *grads, None, 0, V, 1.0), expected_grad)


# ---- gradient -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_float64(kind, isa):
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    for V, temperature in ((1, 1.0), (7, 0.6), (1000, 1.0), (5003, 1.4)):
        old, new = pair(kind, 5, V, step=0.5)
        stats = statistics(old, new, temperature=temperature)
        for use in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
            grads = [g if used else None for g, used in zip(upstream, use, strict=True)]
            z = new.double().requires_grad_()
            out = reference.logit_covariance(old, z, temperature=temperature)
            total = sum((g.double() * out[n]).sum() for g, n in zip(grads, NAMES, strict=True) if g is not None)
            expected = torch.autograd.grad(total, z)[0]
            actual = ops.logit_covariance_grad(old, new, stats, *grads, None, 0, V, temperature)
            assert_close(actual, expected, absolute=3e-6, relative=1e-5, what=f"V={V} {use}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_the_fp32_gradient_rounded(dtype, isa):
    old, new = pair("gaussian", 5, 5003, dtype, 0.5)
    stats, grads = statistics(old, new), torch.randn(3, 5).unbind(0)
    exact = ops.logit_covariance_grad(old.float(), new.float(), stats, *grads, None, 0, 5003, 1.0)
    actual = ops.logit_covariance_grad(old, new, stats, *grads, None, 0, 5003, 1.0)
    assert torch.equal(actual.view(torch.int16), exact.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 1e30])
def test_changes_beyond_fp32_are_those_of_float64(temperature, dtype, isa):
    """Differences of logits overflow fp32, and sums of differences; what they give need not. In one part, in shards,
    and with the largest changes where the probability was 0 before."""
    V = 3000
    rng = torch.Generator().manual_seed(0)
    ends = 3e38 * (2 * torch.randint(0, 2, (7, V), generator=rng) - 1)
    old, new = torch.randn(7, V, generator=rng), torch.randn(7, V, generator=rng)
    old[1], new[1] = 1.0, 3e34 * new[1]  # the sum of the changes overflows
    old[2], new[2] = ends[2], ends[3]
    old[3], new[3] = 3e38, -3e38
    old[4], new[4] = -3e38, 3e38 * torch.rand(V, generator=rng)
    old[5, ::2], new[5, ::2] = -3e38, 3e38
    new[6, :1100], new[6, 1100:] = -3e38, 3e38  # shards whose maxima are too far apart for a difference
    old, new = old.to(dtype), new.to(dtype)
    expected = reference.logit_covariance(old, new, temperature=temperature)
    log_p = reference.log_probs(old, temperature)
    x = reference.where_possible(log_p, log_p).abs()
    moved = (new.double().amax(-1) - old.double().amax(-1))[:, None]
    d = ((new.double() - old.double()).abs() + moved.abs()) / temperature
    mean_x, mean_d = reference.expectation(log_p, x), reference.expectation(log_p, d)
    room = 1 + reference.expectation(log_p, (1 + x) * d) + mean_x * mean_d
    whole = statistics(old, new, temperature=temperature)
    cut = [
        statistics(old[:, i:j], new[:, i:j], start=i, size=V, temperature=temperature)
        for i, j in ((0, 1), (1, 1100), (1100, V))
    ]
    for stats in (merged([whole], temperature), merged(cut, temperature)):
        assert stats.isfinite().all()
        found = derived(stats, temperature)
        for name in NAMES:
            error = (found[name] - expected[name]).abs()
            assert (error <= 2e-6 * room).all(), (name, found[name], expected[name])
