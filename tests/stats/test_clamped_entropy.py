"""The clamped entropy is exact: any data, any number kept, any sharding, ties shared. Judge: a full sort in float64."""

import pytest
import torch

from entcov import clamp_ops, ops
from entcov.stats.token_stats import SKETCH_SIZE, _sketch_ranks, token_stats
from entcov.verify import reference
from tests.support.clamp_oracle import adversarial, assert_exact, even_split
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


def test_the_fraction_counts_the_true_vocabulary():
    """int(V * p) with V = vocab_size, padding not counted, -inf columns counted."""
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, -torch.inf, 9.0, 9.0]])
    value = token_stats(logits, torch.tensor([0]), vocab_size=5, clamp_p=0.39).clamped_entropy  # removes int(1.95) = 1
    expected = reference.clamped_entropy(logits[:, :5], 4)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", adversarial(8))
@pytest.mark.parametrize("V", [7, 3000])
def test_adversarial_rows(kind, V, monkeypatch):
    uneven = [0, V // 7, V // 7, V // 2, V]  # with an empty shard
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = adversarial(V)[kind].to(dtype)
        for kept in sorted({1, 2, V // 3, int(0.67 * V), V - 1, V}):
            assert_exact(logits, kept, monkeypatch=monkeypatch, splits=[even_split(V, 2), uneven])


def test_1400_ties_at_the_threshold_of_a_sharded_row(monkeypatch):
    """bf16 rows of a real vocabulary have this many: 1,400 equal logits across the shards, of which 1, 700, 1,399 and
    1,400 are kept."""
    V = 20000
    values = torch.linspace(4, -4, V).masked_fill((torch.arange(V) >= 9000) & (torch.arange(V) < 10400), 0.3)
    logits = values[torch.randperm(V, generator=torch.Generator().manual_seed(0))][None].bfloat16()
    above, tied = int((logits.float() > 0.2998).sum()), int((logits == torch.tensor(0.3).bfloat16()).sum())
    above -= tied
    assert tied >= 1400
    for kept in (above + 1, above + 700, above + 1399, above + tied):
        assert_exact(logits, kept, monkeypatch=monkeypatch, splits=[even_split(V, 4)])


def test_thousands_of_random_small_rows(monkeypatch, isa):
    """Few distinct values, so that ties, brackets of one value and empty brackets all occur; 1 to 5 shards anywhere."""
    rng = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    for case in range(60):
        V = draw(1, 40) if case % 3 else draw(150, 700)
        T, levels = 60, draw(1, 3 * V)
        logits = 0.37 * torch.randint(-levels, levels + 1, (T, V), generator=rng) / max(1, levels // 9)
        if case % 4 == 0:
            logits[torch.rand(T, V, generator=rng) < 0.3] = -torch.inf
            logits[:, draw(0, V)] = 0.37
        bounds = [0, *sorted(draw(0, V + 1) for _ in range(draw(0, 5))), V]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[case % 3]
        assert_exact(logits.to(dtype), draw(1, V + 1), monkeypatch=monkeypatch, splits=[bounds])


def test_order_statistics_are_those_of_a_sort():
    rng = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (3 * torch.randn(4, 5000, generator=rng)).to(dtype)
        logits[1] = logits[1].round()
        logits[2, ::3] = -torch.inf
        logits[3] *= 1e-3
        target = torch.zeros(4, dtype=torch.int64)
        in_order = logits.float().sort(-1, descending=True).values
        every = torch.arange(1, 5001)
        got = clamp_ops.order_statistics(logits, target, every, 0, 5000, -100)
        assert torch.equal(got, in_order + 0.0)
        some = torch.tensor([1, 1, 17, 18, 19, 2500, 2500, 4999, 5000])
        assert torch.equal(clamp_ops.order_statistics(logits, target, some, 0, 5000, -100), in_order[:, some - 1])


def test_two_ranks_in_one_counter_by_hand():
    logits = torch.tensor([[1.0, 1.0001, 1.0003, 1.0002]])
    got = clamp_ops.order_statistics(logits, torch.tensor([0]), torch.tensor([1, 4]), 0, 4, -100)
    assert torch.equal(got, logits[:, [2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_ranks_among_values_that_share_their_upper_bits(dtype):
    """fp32 is counted by the upper 16 bits of a value, and ranks that fall into one counter are selected together: any
    gaps between them, 2 to 8 above all, which the sketch of a shard of 255 to 1,143 columns has."""
    rng = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    target = torch.zeros(3, dtype=torch.int64)
    for _ in range(300):
        V = draw(1, 40) if draw(0, 2) else draw(40, 1200)
        spread = 10.0 ** -draw(1, 8)  # of the values around one: from dozens of counters down to a few ties in one
        logits = draw(-1, 2) + spread * torch.randn(3, V, generator=rng)
        logits[1, torch.rand(V, generator=rng) < 0.2] = -torch.inf
        logits[2, torch.rand(V, generator=rng) < 0.5] = logits[2, 0]
        logits = logits.to(dtype)
        in_order = logits.float().sort(-1, descending=True).values + 0.0
        stepped = torch.arange(1 + draw(0, V), V + 1, draw(1, 12))
        few = torch.randint(1, V + 1, (draw(1, 10),), generator=rng).sort().values
        for ranks in (stepped, few, _sketch_ranks(torch.tensor(V))):
            got = clamp_ops.order_statistics(logits, target, ranks, 0, V, -100)
            assert torch.equal(got, in_order[:, ranks - 1]), (V, spread, ranks.tolist())


@pytest.mark.parametrize("width", [260, 700, 1100])
def test_shards_of_a_few_hundred_fp32_columns(width, monkeypatch):
    """One wrong value of a shard's sketch moved the bracket away from the threshold, in up to 16 % of rows."""
    rng = torch.Generator().manual_seed(width)
    logits = 0.02 * torch.randn(40, 2 * width, generator=rng) + 3
    for kept in (width // 5, width, 2 * width - 7):
        assert_exact(logits, kept, monkeypatch=monkeypatch, splits=[even_split(2 * width, 2)])


def test_nan_rows_do_not_disturb_the_selection(monkeypatch):
    """NaN for that row only, on one rank and across shards, with NaNs of both signs and a +inf."""
    V = 600
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(6, dtype=torch.int64)
    clean = token_stats(logits, target, clamp_p=0.3).clamped_entropy
    logits[1, 400], logits[2, 3] = torch.nan, -torch.tensor(torch.nan)
    logits[3] = torch.nan
    logits[4, 599] = torch.inf
    one = token_stats(logits, target, clamp_p=0.3).clamped_entropy
    ranks = ThreadRanks(3, monkeypatch)
    sharded = ranks.run(
        lambda r: token_stats(logits[:, 200 * r : 200 * r + 200].contiguous(), target, clamp_p=0.3, group=ranks)
    )
    for value in (one, *(s.clamped_entropy for s in sharded)):
        assert value[1:5].isnan().all()
        torch.testing.assert_close(value[[0, 5]], clean[[0, 5]], rtol=1e-6, atol=0)


def test_bytes_between_ranks(monkeypatch):
    """What the docstring of token_stats states: 16 + 4 * 128 bytes a token, then 28 + 4 C, and C is small."""
    T, V, world = 16, 40000, 4
    logits = torch.randn(T, V, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    ranks = ThreadRanks(world, monkeypatch)
    sent, original = [], ranks.all_gather_single
    ranks.all_gather_single = lambda out, x, group: (sent.append(x.shape), original(out, x, group))
    target = torch.zeros(T, dtype=torch.int64)
    ranks.run(lambda r: token_stats(logits[:, r * V // 4 : (r + 1) * V // 4], target, clamp_p=0.3, group=ranks))
    first, second = sorted(set(sent), key=lambda shape: shape[1] != 4 + SKETCH_SIZE)
    assert len(sent) == 2 * world
    assert first[1] == 4 + SKETCH_SIZE and first[0] == T + 1  # one header row is enough at this width
    capacity = second[1] - clamp_ops.PART_FIELDS
    assert 0 < capacity <= (world + 1) * (V // world) / (SKETCH_SIZE - 1)
    assert ranks.bytes_sent < 0.2 * T * V / world * 2  # against the shard itself in bf16


def test_ops_reject_bad_ranks_and_kept():
    logits, target = torch.randn(2, 9), torch.zeros(2, dtype=torch.int64)
    for ranks in ([0], [10], [3, 2]):
        with pytest.raises(ValueError, match=r"ranks must ascend within \[1, 9\]"):
            clamp_ops.order_statistics(logits, target, torch.tensor(ranks), 0, 9, -100)
    stats = ops.row_stats(logits, target, 0, 9, 1.0, False, -100)
    with pytest.raises(ValueError, match=r"kept must be in \[1, 9\].*got 12"):
        clamp_ops.clamp_bracket(torch.zeros(1, 2, 1), torch.tensor([[9]]), target, stats, 12, -100)


def test_opcheck():
    logits, target = torch.randn(5, 13), torch.tensor([0, 3, -100, 12, 5])
    place = (0, 13)
    stats = ops.merge_row_stats(ops.row_stats(logits, target, *place, 0.7, False, -100)[None], target, 0.7, -100)
    ranks = torch.tensor([1, 4, 13])
    sketch = clamp_ops.order_statistics(logits, target, ranks, *place, -100)
    bracket = clamp_ops.clamp_bracket(sketch[None], ranks[None], target, stats, 6, -100)
    capacity = int(bracket[:, 2].max())
    part = clamp_ops.clamp_collect(logits, target, stats, bracket, capacity, *place, 0.7, -100)
    for op, arguments in [
        ("order_statistics", (logits, target, ranks, *place, -100)),
        ("clamp_bracket", (sketch[None], ranks[None], target, stats, 6, -100)),
        ("clamp_collect", (logits, target, stats, bracket, capacity, *place, 0.7, -100)),
        ("clamp_finish", (part[None], target, stats, bracket, 6, 0.7, -100)),
    ]:
        torch.library.opcheck(getattr(torch.ops.entcov, op).default, arguments)


# ---- buffers that no shard can have sent ----------------------------------------------------------------------------


def steps(kept=6, V=13, T=3):
    """Right arguments of clamp_bracket, clamp_collect and clamp_finish, for one shard."""
    logits = torch.randn(T, V, generator=torch.Generator().manual_seed(0))
    target, place = torch.zeros(T, dtype=torch.int64), (0, V)
    stats = ops.merge_row_stats(ops.row_stats(logits, target, *place, 1.0, False, -100)[None], target, 1.0, -100)
    ranks = torch.tensor([[1, 4, V]])
    sketches = clamp_ops.order_statistics(logits, target, ranks[0], *place, -100)[None]
    bracket = clamp_ops.clamp_bracket(sketches, ranks, target, stats, kept, -100)
    collect = (logits, target, stats, bracket, int(bracket[:, 2].max()), *place, 1.0, -100)
    finish = (clamp_ops.clamp_collect(*collect)[None], target, stats, bracket, kept, 1.0, -100)
    return (sketches, ranks, target, stats, kept, -100), collect, finish


@pytest.mark.parametrize("ranks", [[0, 4, 13], [1, 5, 4], [1, 4, 2**24 + 1], [-1, -1, 7], [2**62, 2**62, 2**62]])
def test_ranks_that_are_none_are_an_error(ranks):
    (sketches, _, *rest), _, _ = steps()
    with pytest.raises(ValueError, match=r"ranks must ascend within \[1, 16777216\].*shard 0 has \["):
        clamp_ops.clamp_bracket(sketches, torch.tensor([ranks]), *rest)


@pytest.mark.parametrize("capacity", [-1, -7, -8, 2**24 + 1, 2**63 - 1])
def test_a_capacity_that_is_none_is_an_error(capacity):
    """-1 made a part whose rows were shorter than what was written to them."""
    _, collect, _ = steps()
    with pytest.raises(ValueError, match=rf"capacity must be in \[0, 16777216\].*got {capacity}"):
        clamp_ops.clamp_collect(*collect[:4], capacity, *collect[5:])


@pytest.mark.parametrize("kept", [0, -(2**63)])
def test_keeping_nothing_is_an_error(kept):
    *_, finish = steps()
    with pytest.raises(ValueError, match="kept must be at least 1, got"):
        clamp_ops.clamp_finish(*finish[:4], kept, *finish[5:])


def test_sketches_that_are_none_give_their_row_no_bracket():
    (sketches, *rest), _, _ = steps()
    right = clamp_ops.clamp_bracket(sketches, *rest)
    sketches = sketches.clone()
    sketches[0, 1] = torch.tensor([2.0, torch.nan, 1.0])
    bracket = clamp_ops.clamp_bracket(sketches, *rest)
    assert bracket[1, :2].isnan().all() and bracket[1, 2] == 0
    assert torch.equal(bracket[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("value", [-1.0, 0.5, 1e30, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("field", range(2, 9))
def test_counts_that_are_none_make_their_row_nan(field, value):
    """Fields 2 to 6 are counts; 7 is the first value between the bounds, which any number but NaN may be."""
    *_, finish = steps()
    right = clamp_ops.clamp_finish(*finish)
    parts = finish[0].clone()
    assert parts.shape[2] > 8 and right.isfinite().all()
    parts[0, 1, field] = value
    clamp = clamp_ops.clamp_finish(parts, *finish[1:])
    assert torch.equal(clamp[[0, 2]], right[[0, 2]])
    if field < 7 or torch.tensor(value).isnan():
        assert clamp[1].isnan().all()


def test_more_values_than_a_part_has_room_for_make_its_row_nan():
    *_, finish = steps()
    right, parts = clamp_ops.clamp_finish(*finish), finish[0].clone()
    for claimed in (parts.shape[2] - 7 + 1, 5000, 2**24):
        parts[0, 1, 6] = claimed
        clamp = clamp_ops.clamp_finish(parts, *finish[1:])
        assert torch.equal(clamp[[0, 2]], right[[0, 2]]) and clamp[1].isnan().all()


def test_more_columns_than_counts_hold_are_an_error():
    logits = torch.empty(1, 2**24 + 1, device="meta")
    target = torch.zeros(1, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"at most 2\^24 columns on a rank for a clamp, got 16777217"):
        clamp_ops.clamped_stats(logits, target, 5, 2**24 + 1, 1.0, False, -100)
