"""The rounds of the clamped entropy over ranks (entcov/stats/sharded_clamp.py) and its ops, with every set of kernels:
how much they read and send, the same bits whatever surrounds a row, and what is wrong with an argument."""

import pytest
import torch

from entcov.ops.clamp_bracket import clamp_bracket
from entcov.ops.clamp_partial import PARTIAL, clamp_partial
from entcov.ops.clamp_refine import clamp_refine
from entcov.ops.clamp_sketch import SKETCH, clamp_sketch
from entcov.ops.clamped_stats import clamped_stats
from entcov.ops.core import RowSpec
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.message import message
from entcov.ops.row_stats import row_stats
from entcov.stats import sharded_clamp, shards
from entcov.stats.token_stats import token_stats
from tests.emulator import emulated
from tests.support.clamp_oracle import DTYPES, EMULATED, adversarial, clamped, core, even_split, real_looking  # noqa: F401
from tests.support.thread_ranks import ThreadRanks


@pytest.fixture
def reads(core, request):  # noqa: F811
    """How often the emulated kernels have loaded these logits since the last call; 1 where nothing counts."""
    product = request.getfixturevalue("products")["plain"] if core == EMULATED else None
    return lambda logits: 1.0 if product is None else emulated.loaded_bytes(product) / logits.nbytes


@pytest.mark.parametrize("V", [19008, 152064])
def test_a_whole_row_is_read_about_once(V, reads, core):  # noqa: F811
    """At most 1.1 reads of the logits, counted in the emulator's loads."""
    if core != EMULATED:
        pytest.skip("loads are counted by the emulator")
    T = 12
    for dtype in (torch.bfloat16, torch.float32):
        for mean in (-3.0, 0.0, 8.0):
            logits = real_looking(T, V, dtype, mean)
            for kept in (1024, V - int(0.33 * V), V - int(0.8 * V)):
                reads(logits)
                clamped_stats(logits, torch.zeros(T, dtype=torch.int64), kept, RowSpec(0, V))
                assert 1.0 <= reads(logits) <= 1.1, (dtype, mean, kept)


def test_two_collectives_one_kilobyte_and_one_read(monkeypatch, reads):
    """Of real-looking bf16 rows, as they are or made fp32, 8 ranks. A sample is 1 in 20 sectors."""
    T, V, world = 24, 152064, 8
    for mean in (-3.0, 8.0):
        logits = real_looking(T, V, torch.bfloat16, mean)
        for dtype in (torch.bfloat16, torch.float32):
            rows = logits.to(dtype)
            for kept in (8000, V - int(0.33 * V), V - int(0.05 * V)):
                ranks = ThreadRanks(world, monkeypatch)
                reads(rows)
                clamped(ranks, rows, even_split(V, world), top_k=kept)
                assert ranks.collectives == 2 and 1.0 <= reads(rows) <= 1.1, (dtype, mean, kept)
                assert ranks.bytes_sent == (256 * T + 16) + (680 * T + 16)


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


def test_the_cpu_gives_the_statistics_of_row_stats(core):  # noqa: F811
    """One pass makes both (csrc/cpu/row_pass.h): the same bits."""
    if core == EMULATED:
        pytest.skip("blocks of a GPU add in another order with a clamp")
    for dtype in DTYPES:
        logits, target = real_looking(4, 9001, dtype, 0.0), torch.tensor([0, 9000, -100, 17])
        stats = clamped_stats(logits, target, 6000, RowSpec(0, 9001, 0.7))[0]
        assert torch.equal(stats, row_stats(logits, target, RowSpec(0, 9001, 0.7)))


def test_logits_of_any_leading_shape_get_their_gradient(monkeypatch):
    V, shape = 600, (2, 3)
    logits = real_looking(6, V, torch.float32, 0.0)
    target = torch.tensor([0, 7, -100, 599, 150, 3])

    def gradients(leading):
        ranks = ThreadRanks(2, monkeypatch)

        def call(rank):
            own = logits[:, 300 * rank : 300 * rank + 300].reshape(*leading, 300).requires_grad_()
            stats = token_stats(own, target.view(leading), group=ranks, clamp_p=0.4, moments=True)
            assert stats.clamped_entropy.shape == leading and not stats.collision.requires_grad
            return torch.autograd.grad(stats.clamped_entropy.sum() - stats.logprob.sum(), own)[0].view(6, 300)

        return ranks.run(call)

    for one, other in zip(gradients(shape), gradients((6,)), strict=True):
        assert torch.equal(one, other) and one.any()


def test_a_captured_graph_runs_all_rounds_and_reads_nothing(monkeypatch):
    V = 9001
    rows = torch.cat([rows[:1] for rows in adversarial(V).values()])
    bounds = even_split(V, 3)
    read = clamped(ThreadRanks(3, monkeypatch), rows, bounds, top_k=V // 3)
    monkeypatch.setattr(sharded_clamp, "_captured", lambda tensor: True)
    ranks = ThreadRanks(3, monkeypatch)
    blind = clamped(ranks, rows, bounds, top_k=V // 3)
    assert ranks.collectives == 1 + sharded_clamp.MOST_ROUNDS
    assert torch.equal(blind[0].clamped_entropy, read[0].clamped_entropy)


def test_ranks_that_disagree_get_nan_and_one_that_fails_holds_nobody_up(monkeypatch):
    """Where the host does not look, as on a GPU."""
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


def test_a_rank_that_fails_in_the_second_round_leaves_no_number_to_the_others(monkeypatch):
    """Where the host does not look, as on a GPU. True fp32 takes two rounds."""
    monkeypatch.setattr(shards.ranks, "host_may_read", lambda device: False)
    V = 152064
    logits, target = real_looking(3, V, torch.float32, -3.0), torch.tensor([0, -100, 5])
    ranks, original, rounds = ThreadRanks(2, monkeypatch), sharded_clamp.clamp_partial, []

    def fails_once(own, target, bracket, spec):
        rounds.append(spec.vocab_start)
        if spec.vocab_start and rounds.count(spec.vocab_start) == 2:
            raise MemoryError("no memory in the second round")
        return original(own, target, bracket, spec)

    monkeypatch.setattr(sharded_clamp, "clamp_partial", fails_once)

    def call(rank):
        own = logits[:, V // 2 * rank : V // 2 * (rank + 1)]
        try:
            settings = {"vocab_start": V // 2 * rank, "vocab_size": V}
            return token_stats(own, target, group=ranks, clamp_p=0.33, **settings).clamped_entropy
        except MemoryError as error:
            return str(error)

    found, message = ranks.run(call)
    assert message == "no memory in the second round" and rounds.count(0) == 2
    assert found[[0, 2]].isnan().all() and found[1] == 0


def test_bits_of_a_row_depend_on_the_row_alone(core, request, monkeypatch):  # noqa: F811
    """Not on other rows, threads or the schedule, strides or alignment; of whole rows and of shards."""
    V = 12003
    for dtype in DTYPES:
        logits, target = real_looking(3, V, dtype, 0.0), torch.tensor([5, 0, V - 1])

        def run(rows, tokens):
            ranks = ThreadRanks(2, monkeypatch)
            split = clamped(ranks, rows, [0, 6001, 12003], tokens, top_k=8000, temperature=0.7)  # noqa: B023
            whole = torch.cat(clamped_stats(rows, tokens, 8000, RowSpec(0, 12003, 0.7))[:2], 1)
            return torch.cat((whole, split[0].clamped_entropy[:, None], split[1].clamped_entropy[:, None]), 1)

        results = [run(logits, target)]
        if core == EMULATED:
            product = request.getfixturevalue("products")["plain"]
            for seed in (1, 2):
                emulated.set_seed(product, seed)
                results.append(run(logits, target))
            emulated.set_seed(product, 0)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "get_num_threads", lambda: 2)
                results.append(run(logits, target))
        wide = torch.full((3, V + 7), torch.nan, dtype=dtype)
        wide[:, 3 : V + 3] = logits
        results.append(run(wide[:, 3 : V + 3], target))
        results.append(torch.cat([run(logits[t : t + 1], target[t : t + 1]) for t in range(3)]))
        assert all(torch.equal(result, results[0]) for result in results), dtype


def test_a_failed_launch_says_what_was_launched(core, request):  # noqa: F811
    if core != EMULATED:
        pytest.skip("nothing is launched")
    with pytest.raises(RuntimeError, match="clamped_stats: the launch of 4294967296 blocks of 256 threads failed"):
        kernels = request.getfixturevalue("kernels")
        kernels.clamped_stats((1, 0, 8, 2**32, 8), 0, (0, 8, 1.0, -100), 4, 0, (0,) * 5, 0, 0, 0)


# ---- the ops --------------------------------------------------------------------------------------------------------


def steps(kept=100, V=200, T=3):
    """Right arguments of clamp_bracket, clamp_partial and clamp_refine, for one shard."""
    logits = 3 + torch.randn(T, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    target, spec = torch.zeros(T, dtype=torch.int64), RowSpec(0, V)
    sketches = message(clamp_sketch(logits, target, spec), target, 1, 0, V)[None]
    bracket = (sketches, target, kept, V // 40, spec)
    partial = (logits, target, clamp_bracket(*bracket), spec)
    partials = message(clamp_partial(*partial), target, 1, 0, V)[None]
    stats = merge_row_stats(partials, target, spec)[0]
    return bracket, partial, (partials, target, stats, partial[2], torch.zeros(T, 4), kept, spec)


def test_opcheck(core):  # noqa: F811
    if core == EMULATED:
        pytest.skip("fresh memory of NaN is not what opcheck wants")
    logits, target, spec = torch.randn(5, 13), torch.tensor([0, 3, -100, 12, 5]), (0, 13, 0.7, -100)
    torch.library.opcheck(torch.ops.entcov.clamped_stats.default, (logits, target, 6, *spec))
    torch.library.opcheck(torch.ops.entcov.clamp_sketch.default, (logits, target, *spec))
    for name, (*arguments, row_spec) in zip(("bracket", "partial", "refine"), steps(), strict=True):
        torch.library.opcheck(getattr(torch.ops.entcov, f"clamp_{name}").default, (*arguments, *row_spec))


def test_the_ops_say_what_is_wrong():
    bracket, partial, refine = steps()
    with pytest.raises(ValueError, match=r"messages must be \[R, T \* width \+ 4\] with T = 3 and width >= 64"):
        clamp_bracket(bracket[0][:, :31].contiguous(), *bracket[1:])
    with pytest.raises(ValueError, match="kept and vocab_size must have .*got 9 and 8"):
        clamp_bracket(*bracket[:2], 9, 1, RowSpec(0, 8))
    with pytest.raises(TypeError, match="bracket must be torch.int32"):
        clamp_partial(*partial[:2], partial[2].long(), partial[3])
    with pytest.raises(ValueError, match=r"messages must be .* width >= 166"):
        clamp_refine(bracket[0], *refine[1:])
    with pytest.raises(ValueError, match=r"kept must be in \[1, 2\^25\), got 0"):
        clamp_refine(*refine[:5], 0, refine[6])
    logits, target = torch.randn(5, 13), torch.tensor([0, 3, -100, 12, 5])
    for kept, vocab_size, wrong in ((0, 13, "kept must be in"), (14, 13, "kept must be in"), (6, 14, "vocab_size")):
        with pytest.raises(ValueError, match=wrong):
            clamped_stats(logits, target, kept, RowSpec(0, vocab_size, 0.7))


def test_more_columns_than_counts_hold_are_an_error():
    logits = torch.empty(1, 2**24 + 1, device="meta")
    target = torch.zeros(1, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"at most 2\^24 columns on a rank for a clamp, got 16777217"):
        torch.ops.entcov.clamped_stats(logits, target, 5, 0, 2**24 + 1, 1.0, -100)


@pytest.mark.parametrize("value", [-1.0, 0.5, 1e30, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("field", range(8))
def test_partials_that_no_shard_can_have_sent_spoil_their_own_row_alone(field, value):
    """Fields 3 to 5 are counts, 6 on the cells. Whatever they say, the other rows are right and nothing is written
    elsewhere (under the sanitizers: tests/fuzz)."""
    *_, refine = steps()
    bracket, right, _, unfinished = clamp_refine(*refine)
    assert right.isfinite().all() and unfinished == 0 and (bracket[:, 2] == 2).all()
    partials = refine[0].clone()
    partials[0, (4 + PARTIAL) + 4 + field] = value  # of row 1, behind its statistics
    _, clamp, *_ = clamp_refine(partials, *refine[1:])
    assert torch.equal(clamp[[0, 2]], right[[0, 2]])


def test_sketches_with_a_nan_give_a_bracket_all_the_same():
    (sketches, *rest), *_ = steps()
    right, spoiled = clamp_bracket(sketches, *rest), sketches.clone()
    spoiled[0, SKETCH : 2 * SKETCH] = torch.nan
    assert torch.equal(clamp_bracket(spoiled, *rest)[[0, 2]], right[[0, 2]])
