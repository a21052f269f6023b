"""The clamped entropy over ranks as CUDA computes it (entcov/clamp_rounds.py), its kernels on the CPU (tests/emulator):
exact for any rows and shards, the same bits on every rank, and how much it reads and sends."""

import pytest
import torch

from entcov import clamp_rounds
from entcov.stats import shards
from entcov.stats.token_stats import token_stats
from tests.emulator import emulated
from tests.support.clamp_oracle import DTYPES, adversarial, assert_exact, even_split, real_looking
from tests.support.thread_ranks import ThreadRanks

ROUNDS = range(2, 2 + clamp_rounds.MOST_ROUNDS - 1)  # all-gathers: of sketches, and one a round; the last is a reserve


def clamped(ranks, logits, bounds, target=None, **settings):
    """token_stats of every rank."""
    target = torch.zeros(len(logits), dtype=torch.int64) if target is None else target
    settings = {"vocab_size": logits.shape[1], **settings}

    def call(rank):
        columns = logits[:, bounds[rank] : bounds[rank + 1]]
        return token_stats(columns, target, group=ranks, vocab_start=bounds[rank], **settings)

    return ranks.run(call)


@pytest.mark.parametrize("V", [7, 3000, 9001])
def test_adversarial_rows(V, monkeypatch):
    uneven = [0, V // 7, V // 7, V // 2, V]  # with an empty shard
    for rows in adversarial(V).values():
        for dtype in DTYPES:
            for kept in sorted({1, V // 3, int(0.67 * V), V}):
                assert_exact(rows[:2].to(dtype), kept, monkeypatch=monkeypatch, splits=[uneven], collectives=ROUNDS)


def test_1400_ties_at_the_threshold_of_a_sharded_row(monkeypatch):
    V = 20000
    values = torch.linspace(4, -4, V).masked_fill((torch.arange(V) >= 9000) & (torch.arange(V) < 10400), 0.3)
    logits = values[torch.randperm(V, generator=torch.Generator().manual_seed(0))][None].bfloat16()
    tie = torch.tensor(0.3).bfloat16()
    above, tied = int((logits > tie).sum()), int((logits == tie).sum())
    for kept in (above + 1, above + 700, above + 1399, above + tied):
        assert_exact(
            logits, kept, monkeypatch=monkeypatch, splits=[even_split(V, 4)], collectives=ROUNDS
        )  # fmt: skip


def test_samples_that_mislead(monkeypatch):
    """Columns that no sample has decide the rank: the first bracket misses it, or holds more than lists can."""
    V = 24000
    column = torch.arange(V)
    for shift in (8.0, -8.0):
        rows = torch.where(column % 640 < 320, shift, 0.0) + 0.01 * torch.randn(
            2, V, generator=torch.Generator().manual_seed(1)
        )
        rows[1] *= torch.exp2(-(column % 50).float())  # half of all keys around zero are in use
        for dtype in DTYPES:
            for kept in (V // 20, V // 2, 19 * V // 20):
                assert_exact(
                    rows.to(dtype), kept, monkeypatch=monkeypatch, splits=[even_split(V, 2)], collectives=ROUNDS
                )


def test_random_small_rows(monkeypatch):
    rng = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    for case in range(40):
        V = draw(1, 40) if case % 3 else draw(150, 1500)
        T, levels = 20, draw(1, 3 * V)
        logits = 0.37 * torch.randint(-levels, levels + 1, (T, V), generator=rng) / max(1, levels // 9)
        if case % 4 == 0:
            logits[torch.rand(T, V, generator=rng) < 0.3] = -torch.inf
            logits[:, draw(0, V)] = 0.37
        bounds = [0, *sorted(draw(0, V + 1) for _ in range(draw(0, 5))), V]
        assert_exact(
            logits.to(DTYPES[case % 3]), draw(1, V + 1), monkeypatch=monkeypatch, splits=[bounds], collectives=ROUNDS
        )


def test_two_collectives_one_kilobyte_and_one_read(monkeypatch, products):
    """Of real-looking bf16 rows, as they are or made fp32, 8 ranks. A sample is 1 in 20 sectors."""
    T, V, world = 24, 152064, 8
    for mean in (-3.0, 8.0):
        logits = real_looking(T, V, torch.bfloat16, mean)
        for dtype in (torch.bfloat16, torch.float32):
            rows = logits.to(dtype)
            for kept in (8000, V - int(0.33 * V), V - int(0.05 * V)):
                ranks = ThreadRanks(world, monkeypatch)
                emulated.loaded_bytes(products["plain"])
                clamped(ranks, rows, even_split(V, world), top_k=kept)
                reads = emulated.loaded_bytes(products["plain"]) / rows.nbytes
                assert ranks.collectives == 2 and 1.0 <= reads <= 1.1, (dtype, mean, kept, reads)
                headers = 4 * (2 * 64 + 171)  # two rows of them in front of the sketches, one in front of the parts
                assert ranks.bytes_sent - headers <= T * 1000 <= 1024 * T


def test_fp32_with_all_its_bits_takes_three_collectives(monkeypatch):
    T, V, world = 8, 152064, 8
    ranks = ThreadRanks(world, monkeypatch)
    clamped(ranks, real_looking(T, V, torch.float32, -3.0), even_split(V, world), clamp_p=0.33)
    assert ranks.collectives == 3


def test_moments_beside_the_clamp_are_those_without_it(monkeypatch):
    V = 3000
    logits, bounds = real_looking(5, V, torch.bfloat16, 0.0), even_split(V, 3)
    target = torch.tensor([0, 7, -100, 2999, 1500])
    plain = clamped(ThreadRanks(3, monkeypatch), logits, bounds, target, moments=True)
    both = clamped(ThreadRanks(3, monkeypatch), logits, bounds, target, moments=True, clamp_p=0.4)
    for name in ("logprob", "entropy", "collision", "varentropy", "entropy_drift"):
        assert torch.equal(getattr(both[0], name), getattr(plain[0], name)), name
    assert both[0].clamped_entropy[2] == 0 and (both[0].clamped_entropy[[0, 1, 3, 4]] > 0).all()


def test_a_captured_graph_runs_all_rounds_and_reads_nothing(monkeypatch):
    V = 9001
    rows = torch.cat([rows[:1] for rows in adversarial(V).values()])
    bounds = even_split(V, 3)
    read = clamped(ThreadRanks(3, monkeypatch), rows, bounds, top_k=V // 3)
    monkeypatch.setattr(clamp_rounds, "_captured", lambda tensor: True)
    ranks = ThreadRanks(3, monkeypatch)
    blind = clamped(ranks, rows, bounds, top_k=V // 3)
    assert ranks.collectives == 1 + clamp_rounds.MOST_ROUNDS
    assert torch.equal(blind[0].clamped_entropy, read[0].clamped_entropy)


def test_nan_stays_in_its_row_and_a_bad_target_spoils_its_own(monkeypatch):
    V = 6000
    logits, bounds = real_looking(6, V, torch.float32, 0.0), even_split(V, 3)
    target = torch.zeros(6, dtype=torch.int64)
    clean = clamped(ThreadRanks(3, monkeypatch), logits, bounds, target, clamp_p=0.3)[0]
    logits[1, 4000], logits[2, 3], target[4] = torch.nan, torch.inf, V
    logits[3] = -torch.inf
    for stats in clamped(ThreadRanks(3, monkeypatch), logits, bounds, target, clamp_p=0.3):
        for name in ("logprob", "entropy", "clamped_entropy"):
            value = getattr(stats, name)
            assert value[1:5].isnan().all() and torch.equal(value[[0, 5]], getattr(clean, name)[[0, 5]])


def test_ranks_that_disagree_get_nan_and_one_that_fails_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(shards.ranks, "host_may_read", lambda device: False)
    V = 300
    logits, target = real_looking(4, V, torch.float32, 0.0), torch.tensor([0, 5, -100, 299])
    ranks = ThreadRanks(2, monkeypatch)
    settings = {"group": ranks, "vocab_size": V, "clamp_p": 0.3}
    found = ranks.run(
        lambda r: token_stats(
            logits[:, 150 * r : 150 * r + 150], target, vocab_start=150 * r, temperature=1.0 + r, **settings
        )
    )
    for stats in found:
        assert stats.clamped_entropy[[0, 1, 3]].isnan().all() and stats.clamped_entropy[2] == 0
        assert stats.logprob[[0, 1, 3]].isnan().all()

    for change, expected in (
        ({"logits": logits[:, 150:].double()}, "logits must be float32, bfloat16 or float16, got torch.float64"),
        ({"clamp_p": 30}, "clamp_p must be in [0, 1), a fraction, not percent, got 30"),
        ({"top_k": 3}, "clamp_p and top_k exclude each other"),
    ):
        ranks = ThreadRanks(2, monkeypatch)

        def one_fails(rank, ranks=ranks, change=change):
            call = {"logits": logits[:, 150 * rank : 150 * rank + 150], "vocab_start": 150 * rank}
            call |= {**settings, "group": ranks, **(change if rank else {})}
            try:
                return token_stats(call.pop("logits"), target, **call)
            except (TypeError, ValueError) as error:
                return str(error)

        stats, message = ranks.run(one_fails)
        assert expected in message
        assert stats.clamped_entropy[[0, 1, 3]].isnan().all()


def test_bits_do_not_depend_on_the_schedule(monkeypatch, products):
    logits, bounds = real_looking(2, 9000, torch.float32, 0.0), [0, 4500, 9000]
    found = []
    try:
        for seed in range(3):
            emulated.set_seed(products["plain"], seed)
            found.append(clamped(ThreadRanks(2, monkeypatch), logits, bounds, clamp_p=0.5)[0])
    finally:
        emulated.set_seed(products["plain"], 0)
    assert all(torch.equal(stats.clamped_entropy, found[0].clamped_entropy) for stats in found)


def test_the_ops_say_what_is_wrong():
    T = 3
    target, bracket = torch.zeros(T, dtype=torch.int64), torch.zeros(T, 4, dtype=torch.int32)
    sketches, columns = torch.zeros(2, T, clamp_rounds.SKETCH), torch.tensor([4, 4])
    with pytest.raises(ValueError, match=r"sketches must be \[R >= 1, T, 64\]"):
        clamp_rounds.clamp_guess(sketches[..., :9], columns, target, 8, 2, 1, -100)
    with pytest.raises(ValueError, match="kept and vocab_size must have .*got 9 and 8"):
        clamp_rounds.clamp_guess(sketches, columns, target, 8, 9, 1, -100)
    with pytest.raises(TypeError, match="bracket must be torch.int32"):
        clamp_rounds.clamp_part(torch.zeros(T, 4), target, bracket.long(), 0, 8, 1.0, -100)
    with pytest.raises(ValueError, match=r"parts must be \[R >= 1, T, 167\]"):
        clamp_rounds.clamp_narrow(sketches, target, torch.zeros(T, 4), bracket, torch.zeros(T, 4), 2, 1.0, -100)
    with pytest.raises(RuntimeError, match="entcov::clamp_sketch is a step of the clamped entropy on CUDA"):
        torch.ops.entcov.clamp_sketch(torch.zeros(T, 4), target, 0, 8, -100)
