"""The kernels behind covariance, summary and selections give the bits of the torch code that they replaced, and what
they promise of keys, hashes and order statistics holds at the ends of their ranges."""

import math
import re

import pytest
import torch

from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import TokenCovariance, covariance_summary, token_covariance
from entcov.objective.token_means import TokenScores, token_means, token_scores
from entcov.ops.token_select import LAYOUT, QUANTILE, Selecting, SelectSpec
from tests.support import selection_in_torch as in_torch
from tests.support.objective_oracle import hash64, mix

SIZES = [1, 7, 1024, 5001]  # tokens; the CPU's kernels take chunks of 1,024


def numbers(T, seed=0, ties=False):
    """logprob, advantage, mask, ids; some tokens are masked and then NaN. `ties`: few different values."""
    g = torch.Generator().manual_seed(1000 * seed + T)
    logprob, advantage = -3 * torch.rand(T, generator=g), torch.randn(T, generator=g)
    if ties:
        logprob, advantage = logprob.round(), advantage.round()
    mask = torch.rand(T, generator=g) < 0.85
    mask[T // 2] = True
    logprob[~mask] = torch.nan
    return logprob, advantage, mask, torch.randperm(3 * T, generator=g)[:T]


def scores_of(value, mask=None):
    mask = torch.ones(len(value), dtype=torch.bool) if mask is None else mask
    return TokenScores(value, mask, mask.sum())


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("ties", [False, True])
def test_covariance_and_summary_have_the_bits_of_the_torch_code(isa, T, ties):
    logprob, advantage, mask, _ = numbers(T, ties=ties)
    f32, f64 = torch.float32, torch.float64
    for eps, types in ((0.0, (f32, f32)), (1e-8, (f64, f32)), (1.0, (f32, f64))):
        parts = logprob.to(types[0]) / 3, advantage.to(types[1]) / 3
        found = token_covariance(*parts, mask, denominator_eps=eps)
        value, mean = in_torch.covariance(*parts, mask, eps)
        assert torch.equal(found.value, value) and int(found.num_tokens) == int(mask.sum())
        assert torch.equal(torch.stack([found.mean_logprob, found.mean_advantage]), mean)
        summary = tuple(covariance_summary(found).values())
        assert [float(x) for x in summary] == [float(x) for x in in_torch.summary(value, mask)]
        assert [x.dtype for x in summary] == [torch.float64, torch.float32, torch.float32]


@pytest.mark.parametrize("T", [1, 1000, 5000])
def test_means_of_many_values_and_scores_have_the_bits_of_the_torch_code(isa, T):
    logprob, advantage, mask, _ = numbers(T)
    values = {"a": logprob, "b": advantage.double() * 2**19 / 5, "c": mask.float()}
    found = token_means(values, mask)
    assert torch.equal(torch.stack(list(found.mean.values())), in_torch.means(list(values.values()), mask))
    scores = token_scores("b", values["b"], mask)
    assert torch.equal(scores.value, torch.where(mask, values["b"].float(), 0.0))


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_chosen_tokens_are_those_of_the_torch_code(T, ties):
    logprob, advantage, mask, ids = numbers(T, ties=ties)
    ids = ids - T  # negative ones too
    scores = token_covariance(logprob, advantage, mask)
    exclude = torch.rand(T, generator=torch.Generator().manual_seed(T)) < 0.3
    for ratio, at_least, seed, step in ((0.0, 1, 1, 0), (0.01, 0, 2**70, -5), (0.3, 1, 7, 2**40), (1.0, 0, 3, 9)):
        common = dict(ratio=ratio, at_least=at_least, seed=seed, step=step)
        for strict, excluded in ((False, None), (True, exclude)):
            interval = (float(scores.value.median()), math.inf) if strict else (-0.5, 0.5)
            found = select_clip_cov(
                scores, ids, low=interval[0], high=interval[1], strict=strict, exclude=excluded, **common
            )
            expected = in_torch.select(
                scores.value, mask, ids, interval=interval, strict=strict, exclude=excluded, **common
            )
            assert torch.equal(found.mask, expected.mask) and int(found.count) == expected.due
            assert found.threshold is None
        for round_up, sign in ((False, scores), (True, -scores)):
            found = select_largest(sign, ids, round_up=round_up, **common)
            expected = in_torch.select(sign.value, mask, ids, round_up=round_up, **common)
            assert torch.equal(found.mask, expected.mask) and int(found.count) == expected.due
            assert float(found.threshold) == expected.threshold


@pytest.mark.parametrize("T", [5000])
def test_repeated_ids_are_counted_as_by_the_torch_code(T):
    _, advantage, mask, ids = numbers(T)
    scores = token_scores("x", advantage, mask)
    for own in (ids // 2, ids % 50 - 25, ids % 4000 * 2**45, torch.where(ids % 2 == 0, -(2**62), 2**62)):
        repeated = in_torch.repeated(own, mask)
        if repeated == 0:
            assert int(select_largest(scores, own, ratio=0.1, seed=0, step=0).count) == int(0.1 * int(mask.sum()))
            continue
        with pytest.raises(ValueError, match=re.escape(f"at least {repeated} tokens have the id of another one")):
            select_largest(scores, own, ratio=0.1, seed=0, step=0)


# ---- what the torch functions had tests of their own for -------------------------------------------------------------


def test_mix_is_splitmix64():
    # First outputs of SplitMix64 with state 0, as published with its reference implementation.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix((k + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1)) for k in range(3)] == published


@pytest.mark.parametrize("seed, step", [(0, 0), (1, 0), (0, 1), (7, 123456789), (2**40, 2**50), (-1, 2**64 + 3)])
def test_draws_go_by_the_hash_of_seed_step_and_id(seed, step):
    """Taking 1, 2, 3 ... tokens gives their order by the hash, which is Python's."""
    ids = [0, 1, 2, 1000, 2**31, 2**40 + 3, 2**62, -1, -(2**63), 2**63 - 1]
    scores, order = scores_of(torch.zeros(len(ids))), []
    for n in range(1, len(ids) + 1):
        chosen = select_clip_cov(
            scores, torch.tensor(ids), ratio=0.0, low=0.0, high=0.0, seed=seed, step=step, at_least=n
        ).mask
        order += [i for i, taken in zip(ids, chosen.tolist(), strict=True) if taken and i not in order]
    assert order == sorted(ids, key=lambda i: hash64(seed, step, i), reverse=True)


def test_scores_sort_as_numbers_do():
    x = torch.tensor([3.4e38, -1e-45, math.inf, -1.0, 1e-8, -math.inf, 1e-45, 1.0, -3.4e38])
    for n in range(1, len(x) + 1):
        found = select_largest(scores_of(x), torch.arange(len(x)), ratio=0.0, at_least=n, seed=0, step=0)
        expected = x.sort(descending=True).values[n - 1]
        assert float(found.threshold) == float(expected) and torch.equal(found.mask, x >= expected)


def test_zero_and_minus_zero_tie():
    x = torch.tensor([0.0, -0.0] * 8)
    for seed in range(3):
        found = select_largest(scores_of(x), torch.arange(16), ratio=0.5, seed=seed, step=0).mask
        again = select_largest(scores_of(-x), torch.arange(16), ratio=0.5, seed=seed, step=0).mask
        assert torch.equal(found, again) and not torch.equal(found, x.signbit()) and int(found.sum()) == 8


@pytest.mark.parametrize("n", [1, 2, 999, 1000, 1001, 2000, 5003])
def test_the_quantile_is_the_order_statistic(n):
    value = torch.randn(n, generator=torch.Generator().manual_seed(n))
    zero = torch.zeros((), dtype=torch.float64)
    summary = covariance_summary(TokenCovariance(value, torch.ones(n, dtype=torch.bool), torch.tensor(n), zero, zero))
    at_or_below = (value <= summary["actor/cov_p999"]).sum()
    assert 1000 * at_or_below >= 999 * n > 1000 * (at_or_below - 1)
    assert float(summary["actor/cov_max"]) == float(value.max())


# ---- stage by stage, as ranks run them -------------------------------------------------------------------------------


def test_stages_one_by_one_give_what_all_at_once_do():
    logprob, advantage, mask, ids = numbers(5000, ties=True)
    scores = token_covariance(logprob, advantage, mask)
    for kind in (0, 1):
        spec = SelectSpec(kind, low=-0.5, high=0.5, ratio=0.1, seed=3, step=4)
        made = []
        for together in (True, False):
            s = Selecting(spec, scores.value, mask, scores.num_tokens, ids)
            first, last = s.stages
            calls = [(first, last)] if together else [(stage, stage) for stage in range(first, last + 1)]
            parts = [s.run(*call, s.own[None]) for call in calls]
            made.append((s.chosen, s.result, s.threshold.nan_to_num(7.0)))  # a draw has none
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
        assert parts[-1] is None and len(parts[-2]) == LAYOUT["words"] - LAYOUT["marks"]


def test_bad_values_of_the_sums_are_named():
    mask, x = torch.ones(3) > 0, torch.zeros(3)
    with pytest.raises(ValueError, match="values must be 1 to 8 tensors, got 9"):
        token_means({str(i): x for i in range(9)}, mask)
    with pytest.raises(ValueError, match="values must be 1 to 2 tensors, got 3"):
        torch.ops.entcov.token_scores(mask, [x, x, x], torch.zeros(8).long(), 0.0, None)
    with pytest.raises(TypeError, match=r"values\[1\] must be torch.float32, got torch.float16"):
        torch.ops.entcov.token_sums(mask, [x, x.half()])
    with pytest.raises(ValueError, match=r"sums must have shape \(4,\)"):
        torch.ops.entcov.token_means(torch.zeros(5).long(), 1, 0.0, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.ones(3)}, TypeError, "mask must be torch.bool, got torch.float32"),
        ({"value": torch.zeros(3).double()}, TypeError, "value must be torch.float32, got torch.float64"),
        ({"token_id": None}, TypeError, "token_id must be a tensor, got None"),
        ({"token_id": torch.zeros(4).long()}, ValueError, r"token_id must have shape \(3,\).*got \(4,\)"),
        ({"num_tokens": torch.zeros(1).long()}, ValueError, r"num_tokens must have shape \(\)"),
        ({"seed": torch.zeros(())}, TypeError, "seed must be torch.int64"),
        ({"stages": (1, 9)}, ValueError, "first and last must be stages from 0 to 7, got 1 and 9"),
        ({"stages": (3, 2)}, ValueError, "first and last must be stages from 0 to 7, got 3 and 2"),
        ({"workspace": torch.zeros(5).long()}, ValueError, "workspace must be what select_workspace returns, got 5"),
    ],
)
def test_bad_arguments_of_a_stage_are_named(change, error, message):
    given = {"value": torch.zeros(3), "mask": torch.ones(3) > 0, "num_tokens": torch.tensor(3)}
    given |= {"token_id": torch.arange(3), **change}
    stages, workspace = given.pop("stages", (0, 7)), given.pop("workspace", None)
    with pytest.raises(error, match=message):
        s = Selecting(SelectSpec(1, ratio=0.5), **given)
        s.workspace = s.workspace if workspace is None else workspace
        s.run(*stages, s.own[None])


def test_opcheck():
    ops, (x, y, mask, ids) = torch.ops.entcov, numbers(50)
    sums = ops.token_sums(mask, [x, y])
    refused = torch.tensor(False)
    torch.library.opcheck(ops.token_sums.default, (mask, [x, y.double()]))
    torch.library.opcheck(ops.token_means.default, (sums[:6], 2, 0.0, refused))
    torch.library.opcheck(ops.token_scores.default, (mask, [x, y], sums[:6], 0.0, None))
    scores = token_covariance(x, y, mask)
    s = Selecting(SelectSpec(1, ratio=0.5), scores.value, mask, scores.num_tokens, ids)
    own = torch.zeros(1, 2, dtype=torch.int64)  # `s.own` shares memory with an argument that is written
    torch.library.opcheck(ops.token_select.default, (s.workspace, *s._arguments, own, None, *s.spec, *s.stages))
    q = Selecting(SelectSpec(QUANTILE), scores.value, mask, scores.num_tokens)
    q.run(*q.stages, q.own[None])
    given = (q.workspace, scores.num_tokens, q.own.clone()[None], scores.mean_logprob, None)
    torch.library.opcheck(ops.token_summary.default, given)


def test_a_quantile_has_two_stages():
    s = Selecting(SelectSpec(QUANTILE), torch.zeros(3), torch.ones(3) > 0, torch.tensor(3))
    with pytest.raises(ValueError, match="stages from 0 to 1, got 0 and 7"):
        s.run(0, 7, s.own[None])
