"""The clamped entropy is exact: any data, any number kept, any sharding, ties shared; with every set of kernels."""

import re

import pytest
import torch

from entcov.stats.token_stats import token_stats
from entcov.verify import reference
from entcov.verify.row_kinds import KINDS, make_rows, value_bound
from tests.support.clamp_oracle import DTYPES, EMULATED, adversarial, assert_exact, clamped, core, even_split  # noqa: F401
from tests.support.thread_ranks import ThreadRanks


def test_by_hand():
    logits = torch.tensor([[2.0, 4.0, 0.0, 3.0, 1.0]], requires_grad=True)
    for clamp_p, entropy in {0.0: 0.9999728, 0.2: 0.9475370, 0.4: 0.8323956, 0.6: 0.5822031}.items():
        value = token_stats(logits, torch.tensor([0]), clamp_p=clamp_p).clamped_entropy
        assert value.item() == pytest.approx(entropy, abs=3e-7)
        if clamp_p == 0.4:
            (grad,) = torch.autograd.grad(value.sum(), logits)
            expected = torch.tensor([[0.1418171, -0.2825875, 0.0, 0.1407704, 0.0]])
            torch.testing.assert_close(grad, expected, rtol=0, atol=2e-7)


def test_the_fraction_counts_the_true_vocabulary(monkeypatch):
    """int(V * p) with V = vocab_size, padding not counted, -inf columns counted; a shard may be padding alone."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, -torch.inf, 9.0, 9.0]])
    settings = {"vocab_size": 5, "clamp_p": 0.39}  # removes int(1.95) = 1
    values = [token_stats(logits, torch.tensor([0]), **settings)]
    values += clamped(ThreadRanks(3, monkeypatch), logits, [0, 2, 5, 7], **settings)
    values += clamped(ThreadRanks(2, monkeypatch), logits, [0, 3, 7], **settings)
    expected = reference.clamped_entropy(logits[:, :5], 4)
    for value in values:
        torch.testing.assert_close(value.clamped_entropy.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", adversarial(8))
@pytest.mark.parametrize("V", [7, 3000, 9001])
def test_adversarial_rows(kind, V, core, monkeypatch):  # noqa: F811
    """Rows longer than 4,096 columns are sampled; shorter ones are their own sample."""
    uneven = [0, V // 7, V // 7, V // 2, V]  # with an empty shard
    some = core == EMULATED or V == 9001
    splits = [uneven] if some else [uneven, even_split(V, 2), even_split(V, 8)]
    for dtype in DTYPES:
        rows = adversarial(V)[kind][: 2 if some else 3].to(dtype)
        for kept in sorted({1, 2, V // 3, int(0.67 * V), V - 1, V}):
            assert_exact(rows, kept, monkeypatch=monkeypatch, splits=splits)


def test_1400_ties_at_the_threshold(monkeypatch):
    """bf16 rows of a real vocabulary have this many: 1,400 equal logits across the shards, of which 1, 700, 1,399 and
    1,400 are kept."""
    V = 20000
    values = torch.linspace(4, -4, V).masked_fill((torch.arange(V) >= 9000) & (torch.arange(V) < 10400), 0.3)
    logits = values[torch.randperm(V, generator=torch.Generator().manual_seed(0))][None].bfloat16()
    tie = torch.tensor(0.3).bfloat16()
    above, tied = int((logits > tie).sum()), int((logits == tie).sum())
    assert tied >= 1400
    for kept in (above + 1, above + 700, above + 1399, above + tied):
        assert_exact(logits, kept, monkeypatch=monkeypatch, splits=[even_split(V, 4)])


@pytest.mark.parametrize("shift", [8.0, -8.0])
@pytest.mark.parametrize("period, share", [(640, 320), (320, 304)])
def test_samples_that_mislead(shift, period, share, monkeypatch):
    """Columns that no sample has decide the rank, once on either side: the first bracket misses it, or holds more than
    lists in shared memory can; and half of all keys around zero are in use."""
    V = 24000
    column = torch.arange(V)
    rows = torch.where(column % period < share, shift, 0.0) + 0.01 * torch.randn(
        2, V, generator=torch.Generator().manual_seed(1)
    )
    if period == 640:
        rows[1] *= torch.exp2(-(column % 50).float())
    for dtype in DTYPES:
        for kept in (V // 20, V // 2, 19 * V // 20):
            assert_exact(rows.to(dtype), kept, monkeypatch=monkeypatch, splits=[even_split(V, 2)])


def test_random_small_rows(core, monkeypatch):  # noqa: F811
    """Few distinct values, so that ties, brackets of one value and empty brackets all occur; 1 to 5 shards anywhere."""
    rng = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    for case in range(40):
        V = draw(1, 40) if case % 3 else draw(*((150, 1500), (4097, 6000))[case % 2])
        T, levels = 20 if core == EMULATED else 60, draw(1, 3 * V)
        logits = 0.37 * torch.randint(-levels, levels + 1, (T, V), generator=rng) / max(1, levels // 9)
        if case % 4 == 0:
            logits[torch.rand(T, V, generator=rng) < 0.3] = -torch.inf
            logits[:, draw(0, V)] = 0.37
        bounds = [0, *sorted(draw(0, V + 1) for _ in range(draw(0, 5))), V]
        assert_exact(logits.to(DTYPES[case % 3]), draw(1, V + 1), monkeypatch=monkeypatch, splits=[bounds])


@pytest.mark.parametrize("width", [260, 700, 1100])
def test_shards_of_a_few_hundred_fp32_columns(width, monkeypatch):
    """One wrong value of a shard's sketch once moved the bracket away from the threshold, in up to 16 % of rows."""
    rng = torch.Generator().manual_seed(width)
    logits = 0.02 * torch.randn(20, 2 * width, generator=rng) + 3
    for kept in (width // 5, width, 2 * width - 7):
        assert_exact(logits, kept, monkeypatch=monkeypatch, splits=[even_split(2 * width, 2)])


def test_logits_of_any_size(monkeypatch):
    """Up to the largest of fp32, where differences overflow; and sums that a larger maximum sends out of sight."""
    V = 6000
    rows = torch.linspace(-1, 1, V)[torch.randperm(V, generator=torch.Generator().manual_seed(0))].repeat(3, 1)
    rows[0] *= 3e38
    rows[1, :3000] -= 500
    rows[2, 5999] = 3e38
    for kept in (1, V // 4, V - 1):
        assert_exact(rows, kept, monkeypatch=monkeypatch, splits=[even_split(V, 3)])


def test_every_kind_of_row_and_the_statistics_beside_the_clamp():
    for kind in KINDS:
        for V in (1, 8, 1003, 9001):
            logits = make_rows(kind, 3, V, torch.bfloat16)
            target = logits.float().argmax(-1)
            kept = max(1, 2 * V // 3)
            got = token_stats(logits, target, top_k=kept, temperature=0.7, moments=True)
            for name, value in reference.token_stats(logits, target, top_k=kept, temperature=0.7).items():
                error = (getattr(got, name).double() - value).abs()
                assert (error <= value_bound(name, value)).all(), (kind, V, name)


@pytest.mark.parametrize("V", [600, 6000])
def test_nan_stays_in_its_row(V, monkeypatch):
    """On one rank and across shards, with NaNs of both signs and a +inf."""
    logits = 3 * torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    target, bounds = torch.zeros(6, dtype=torch.int64), even_split(V, 3)

    def both():
        whole = token_stats(logits, target, clamp_p=0.3)
        return [whole, *clamped(ThreadRanks(3, monkeypatch), logits, bounds, target, clamp_p=0.3)]

    clean = both()
    logits[1, 2 * V // 3], logits[2, 3] = torch.nan, -torch.tensor(torch.nan)
    logits[3] = torch.nan
    logits[4, V - 1] = torch.inf
    for got, expected in zip(both(), clean, strict=True):
        for name in ("logprob", "entropy", "clamped_entropy"):
            value = getattr(got, name)
            assert value[1:5].isnan().all() and torch.equal(value[[0, 5]], getattr(expected, name)[[0, 5]])
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_stats(leaf, target, clamp_p=0.3).clamped_entropy.sum(), leaf)
    assert grad[1:5].isnan().all() and not grad[[0, 5]].isnan().any()


def test_rows_without_a_finite_logit_and_bad_targets(core, monkeypatch):  # noqa: F811
    """The CPU raises, on every rank alike; what no kernel can raise is NaN in its row."""
    V = 5000
    for spoil, message in (
        (lambda logits, target: logits[3].fill_(-torch.inf), r"1 rows have no finite logit \(first: row 3\)"),
        (lambda logits, target: target[3:4].fill_(V), "target must be ignore_index .* 1 of 5 are not, first 5000"),
    ):
        logits, target = torch.randn(5, V, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, -100, 9, 1])
        clean = token_stats(logits, target, clamp_p=0.3)
        spoil(logits, target)
        ranks = ThreadRanks(2, monkeypatch)
        settings = {"clamp_p": 0.3, "vocab_size": V}

        def on_rank(rank, ranks=ranks, settings=settings, logits=logits, target=target):
            columns, start = logits[:, V // 2 * rank : V // 2 * (rank + 1)], V // 2 * rank
            try:
                return token_stats(columns, target, group=ranks, vocab_start=start, **settings)
            except ValueError as raised:
                return raised

        if core != EMULATED:
            with pytest.raises(ValueError, match=message):
                token_stats(logits, target, **settings)
            assert all(re.search(message, str(error)) for error in ranks.run(on_rank))
            continue
        for stats in (token_stats(logits, target, **settings), *ranks.run(on_rank)):
            for name in ("logprob", "entropy", "clamped_entropy"):
                value = getattr(stats, name)
                assert value[3].isnan() and value[2] == 0
                torch.testing.assert_close(value[[0, 1, 4]], getattr(clean, name)[[0, 1, 4]], rtol=1e-6, atol=1e-6)
