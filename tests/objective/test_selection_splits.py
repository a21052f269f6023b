"""Selections over the mini-batch: the same for every split into micro-batches, every order and 1, 2 and 4 ranks."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from entcov.controls import ClipCov, KLCov, select
from entcov.objective.tokens import PolicyLossConfig
from tests.support.objective_oracle import (
    chosen_ids,
    clip_cov_oracle,
    exact_covariance,
    kl_cov_oracle,
    make_batch,
    part,
)
from tests.support.thread_ranks import ThreadRanks

CONFIG = PolicyLossConfig()
WORLDS = (1, 2, 4)
CONTROLS = [
    ClipCov(clip_cov_ratio=0.02, clip_cov_lb=0.3, clip_cov_ub=3.0, seed=1),
    KLCov(kl_cov_ratio=0.02, seed=1),
    ClipCov(clip_cov_ratio=0.02, clip_cov_lb=0.3, clip_cov_ub=3.0, semantics="reference"),
    KLCov(kl_cov_ratio=0.01, semantics="paper"),
]


def split_cases(world):
    """(name, rank of each sequence, sequences a micro-batch, shuffle): what one mini-batch may look like."""
    for data_seed in (0, 1):
        for per_micro_batch in (1, 3, 24):
            for layout in ("round-robin", "skewed", "one-rank"):
                if world == 1 and layout != "round-robin":
                    continue
                yield data_seed, per_micro_batch, layout, per_micro_batch == 3


def micro_batches_of(tokens, sequence, rank, world, per_micro_batch, layout, shuffle):
    owner = {
        "round-robin": lambda s: s % world,
        "skewed": lambda s: min(s // 12, world - 1),
        "one-rank": lambda s: world - 1,  # every other rank has nothing
    }[layout]
    mine = [s for s in range(int(sequence.max()) + 1) if owner(s) == rank]
    groups = [mine[i : i + per_micro_batch] for i in range(0, len(mine), per_micro_batch)] or [[]]
    out = []
    for group in groups:
        index = torch.isin(sequence, torch.tensor(group, dtype=torch.int64)).nonzero().flatten()
        if shuffle:
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(rank))]
        out.append(part(tokens, index))
    return out


def run_cases(rank, world, group):
    results = []
    for data_seed, per_micro_batch, layout, shuffle in split_cases(world):
        tokens, sequence = make_batch(data_seed)
        parts = micro_batches_of(tokens, sequence, rank, world, per_micro_batch, layout, shuffle)
        selections, metrics = select(CONTROLS, parts, step=data_seed + 5, config=CONFIG, group=group)
        picks = [chosen_ids(parts, selections, k) for k in range(len(CONTROLS))]
        results.append((data_seed, picks, {k: float(v) for k, v in metrics.items()}))
    return results


def error_on_every_rank(rank, group, make):
    """The message that this rank gets when only rank 0 has the problem."""
    tokens, sequence = make_batch(0)
    try:
        select(CONTROLS[:1], [make(part(tokens, sequence % 2 == rank % 2), rank)], step=0, config=CONFIG, group=group)
    except ValueError as error:
        return str(error)


def nothing_anywhere(tokens, rank):
    tokens.loss_mask = torch.zeros_like(tokens.loss_mask)
    return tokens


def nan_on_rank_0(tokens, rank):
    if rank == 0:
        tokens.advantage = tokens.advantage.clone()
        tokens.advantage[tokens.loss_mask.nonzero()[0]] = torch.nan
    return tokens


def count_collectives(group):
    """(all-reduces, bytes) of one select with one Clip-Cov, and with one KL-Cov."""
    tokens, _ = make_batch(0)
    out = []
    real = dist.all_reduce
    for control in CONTROLS[:2]:
        sizes = []
        dist.all_reduce = lambda t, **k: (sizes.append(t.numel() * t.element_size()), real(t, **k))  # noqa: B023
        try:
            # Every rank passes the same tokens under other ids: the counts are what is looked at.
            tokens.token_id = torch.arange(len(tokens.loss_mask)) + 10**6 * dist.get_rank()
            select([control], [tokens], step=0, config=CONFIG, group=group)
        finally:
            dist.all_reduce = real
        out.append((len(sizes), sum(sizes)))
    return out


def worker(rank, folder):
    """One of four ranks; the first one and the first two also work as data-parallel groups of their own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    report = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            report[world] = {
                "cases": run_cases(rank, world, group),
                "empty": error_on_every_rank(rank, group, nothing_anywhere),
                "nan": error_on_every_rank(rank, group, nan_on_rank_0),
                "collectives": count_collectives(group),
            }
    torch.save(report, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """world size -> what each rank reports. Starting processes is what costs, so they start once for all cases."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=4, join=True)
    reports = [torch.load(folder / f"{rank}.pt") for rank in range(4)]
    return {world: [report[world] for report in reports[:world]] for world in WORLDS}


@pytest.fixture(scope="module")
def expected():
    """Selections of the two data sets from the oracles, and the metrics of the unsplit batch."""
    out = {}
    for data_seed in (0, 1):
        tokens, _ = make_batch(data_seed)
        mask, ids, step = tokens.loss_mask, tokens.token_id, data_seed + 5
        value = exact_covariance(tokens.logprob, tokens.advantage, mask)
        n = int(mask.sum())
        ratio = (tokens.logprob - tokens.old_logprob).exp()
        clipped = ((tokens.advantage > 0) & (ratio > 1.2)) | ((tokens.advantage < 0) & (ratio < 0.8))
        picks = [
            clip_cov_oracle(value, mask, ids, 0.02, 0.3, 3.0, 1, step),
            kl_cov_oracle(value, mask, ids, int(0.02 * n), 1, step),
            clip_cov_oracle(np.where(clipped, np.nan, value), mask, ids, 0.02, 0.3, 3.0, 0, step),
            kl_cov_oracle(value, mask, ids, int(0.01 * n), 0, step),
        ]
        assert all(picks)
        _, metrics = select(CONTROLS, [tokens], step=step, config=CONFIG)
        out[data_seed] = ([sorted(p) for p in picks], {k: float(v) for k, v in metrics.items()})
    return out


def test_one_process_any_split(expected):
    for data_seed, picks, metrics in run_cases(0, 1, None):
        assert (picks, metrics) == expected[data_seed]


def test_ranks_in_threads(expected, monkeypatch):
    """As below, without processes to start."""
    ranks = ThreadRanks(2, monkeypatch)
    for case in zip(*ranks.run(lambda rank: run_cases(rank, 2, ranks)), strict=True):
        data_seed = case[0][0]
        joined = [sorted(i for _, picks, _ in case for i in picks[k]) for k in range(len(CONTROLS))]
        assert joined == expected[data_seed][0]
        assert [metrics for _, _, metrics in case] == [expected[data_seed][1]] * 2


@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_ranks(ranks, expected, world):
    reports = [report["cases"] for report in ranks[world]]
    assert len(reports[0]) == (6 if world == 1 else 18)
    for case in zip(*reports, strict=True):
        data_seed = case[0][0]
        joined = [sorted(i for _, picks, _ in case for i in picks[k]) for k in range(len(CONTROLS))]
        assert joined == expected[data_seed][0]
        for _, _, metrics in case:
            assert metrics == expected[data_seed][1]


@pytest.mark.parametrize("world", WORLDS)
def test_a_problem_on_one_rank_is_an_error_on_all(ranks, world):
    for report in ranks[world]:
        assert "none in the whole mini-batch" in report["empty"]
        assert "1 of" in report["nan"] and "over all ranks are not" in report["nan"]


def test_documented_collectives(ranks):
    """The docstrings of `select`, `token_covariance`, ... promise these counts, whatever the batch."""
    assert ranks[1][0]["collectives"] == [(0, 0), (0, 0)]
    (clip, clip_bytes), (kl, kl_bytes) = ranks[2][0]["collectives"]
    assert (clip, kl) == (3 + 6, 3 + 8)
    small = 600  # sums, counts, and what ranks must agree on
    counts, ids = 257 * 2**10, 2**19
    assert 0 < clip_bytes - (2 + 4) * counts - ids < small and 0 < kl_bytes - (2 + 6) * counts - ids < small
