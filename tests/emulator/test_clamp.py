"""The CUDA kernels of the clamped entropy, on the CPU (tests/emulator): exact for any row, which is read about once."""

import pytest
import torch

from entcov import clamp_ops
from entcov.stats.token_stats import token_stats
from entcov.verify import reference
from entcov.verify.row_kinds import KINDS, make_rows, value_bound
from tests.emulator import emulated
from tests.support.clamp_oracle import DTYPES, adversarial, assert_exact, real_looking
from tests.support.repeated import cases_of

globals().update(cases_of("stats/test_clamped_entropy", "by_hand the_fraction_counts_the_true_vocabulary"))


@pytest.mark.parametrize("V", [7, 3000, 9001])
def test_adversarial_rows(V, monkeypatch):
    for rows in adversarial(V).values():
        for dtype in DTYPES:
            for kept in sorted({1, 2, V // 3, int(0.67 * V), V - 1, V}):
                assert_exact(rows.to(dtype), kept, monkeypatch=monkeypatch)


def test_1400_ties_at_the_threshold(monkeypatch):
    V = 20000
    values = torch.linspace(4, -4, V).masked_fill((torch.arange(V) >= 9000) & (torch.arange(V) < 10400), 0.3)
    logits = values[torch.randperm(V, generator=torch.Generator().manual_seed(0))][None].bfloat16()
    tie = torch.tensor(0.3).bfloat16()
    above, tied = int((logits > tie).sum()), int((logits == tie).sum())
    assert tied >= 1400
    for kept in (above + 1, above + 700, above + 1399, above + tied):
        assert_exact(logits, kept, monkeypatch=monkeypatch)


def test_rows_that_their_sample_misleads(monkeypatch):
    """Columns that the sample skips decide the rank, once on either side, and once by more than the list holds."""
    V = 24000
    column = torch.arange(V)
    for shift in (8.0, -8.0):
        for period, share in ((640, 320), (320, 304)):
            rows = torch.where(column % period < share, shift, 0.0) + 0.01 * torch.randn(
                2, V, generator=torch.Generator().manual_seed(1)
            )
            for dtype in DTYPES:
                for kept in (V // 20, V // 2, 19 * V // 20):
                    assert_exact(rows.to(dtype), kept, monkeypatch=monkeypatch)


def test_random_small_rows(monkeypatch):
    rng = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    for case in range(40):
        V = draw(1, 40) if case % 3 else draw(4097, 6000)
        T, levels = 20, draw(1, 3 * V)
        logits = 0.37 * torch.randint(-levels, levels + 1, (T, V), generator=rng) / max(1, levels // 9)
        if case % 4 == 0:
            logits[torch.rand(T, V, generator=rng) < 0.3] = -torch.inf
            logits[:, draw(0, V)] = 0.37
        assert_exact(logits.to(DTYPES[case % 3]), draw(1, V + 1), monkeypatch=monkeypatch)


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


def test_bits_do_not_depend_on_schedule_batch_or_alignment(products):
    logits = real_looking(3, 12003, torch.bfloat16, 0.0)
    target = torch.tensor([5, 0, 12002])
    results = []

    def run(rows, tokens):
        return torch.cat(clamp_ops.clamped_stats(rows, tokens, 8000, 12003, 0.7, False, -100), 1)

    try:
        for seed in range(3):
            emulated.set_seed(products["plain"], seed)
            results.append(run(logits, target))
    finally:
        emulated.set_seed(products["plain"], 0)
    wide = torch.full((3, 12010), torch.nan, dtype=logits.dtype)
    wide[:, 3:12006] = logits
    results.append(run(wide[:, 3:12006], target))
    results.append(torch.cat([run(logits[t : t + 1], target[t : t + 1]) for t in range(3)]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_no_kernel_can_raise_is_nan_in_its_row():
    logits = real_looking(6, 5000, torch.float32, 0.0)
    target = torch.zeros(6, dtype=torch.int64)
    clean = token_stats(logits, target, clamp_p=0.3)
    logits[1, 4000], logits[2, 7], target[4] = torch.nan, torch.inf, 5000
    logits[3] = -torch.inf
    leaf = logits.clone().requires_grad_()
    stats = token_stats(leaf, target, clamp_p=0.3)
    for name in ("logprob", "entropy", "clamped_entropy"):
        value = getattr(stats, name)
        assert value[1:5].isnan().all() and torch.equal(value[[0, 5]], getattr(clean, name)[[0, 5]])
    (grad,) = torch.autograd.grad(stats.clamped_entropy.sum(), leaf)
    assert grad[1:5].isnan().all() and not grad[[0, 5]].isnan().any()


@pytest.mark.parametrize("V", [19008, 152064])
def test_a_row_is_read_about_once(V, products):
    """What the issue of the ops promises: at most 1.1 reads of the logits, counted in the emulator's loads."""
    T = 12
    for dtype in (torch.bfloat16, torch.float32):
        for mean in (-3.0, 0.0, 8.0):
            logits = real_looking(T, V, dtype, mean)
            for kept in (1024, V - int(0.33 * V), V - int(0.8 * V)):
                emulated.loaded_bytes(products["plain"])
                clamp_ops.clamped_stats(logits, torch.zeros(T, dtype=torch.int64), kept, V, 1.0, False, -100)
                reads = emulated.loaded_bytes(products["plain"]) / logits.nbytes
                assert 1.0 <= reads <= 1.1, (dtype, mean, kept, reads)


def test_a_failed_launch_says_what_was_launched(kernels):
    with pytest.raises(RuntimeError, match="clamped_stats: the launch of 4294967296 blocks of 256 threads failed"):
        kernels.clamped_stats(1, 0, 8, 2**32, 8, 0, 4, -100, 1.0, 0, 0, 0)


def test_opcheck():
    logits, target = torch.randn(5, 13), torch.tensor([0, 3, -100, 12, 5])
    arguments = (logits, target, 6, 13, 0.7, True, -100)
    torch.library.opcheck(torch.ops.entcov.clamped_stats.default, arguments)
    for kept, vocab_size, message in ((0, 13, "kept must be in"), (14, 13, "kept must be in"), (6, 14, "vocab_size")):
        with pytest.raises(ValueError, match=message):
            torch.ops.entcov.clamped_stats(logits, target, kept, vocab_size, 0.7, False, -100)
