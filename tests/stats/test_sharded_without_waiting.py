"""Sharded calls where the host must not look at values, as on a GPU: nothing is read back, and ranks that were called
differently get NaN everywhere. The GPU's way is taken here on CPU tensors over ranks that are threads, and on meta
tensors, which have no values to read; tests/gpu/test_public_functions.py repeats it on a GPU with NCCL."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entcov import arguments
from entcov.objective.selection import Selection
from entcov.objective.token_covariance import TokenCovariance
from entcov.objective.token_means import TokenMeans
from entcov.stats import shards
from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from tests.support import disagreements
from tests.support.thread_ranks import ThreadRanks

T, V, WORLD = 5, 48, 3
WIDTH = V // WORLD
LOGITS = torch.randn(T, V, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([3, 40, 0, 20, -100])
MASK = torch.tensor([True, True, True, True, False])


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(shards.ranks, "host_may_read", lambda device: False)
    return ThreadRanks(WORLD, monkeypatch)


def outputs(ranks, rank, changes=None):
    """All outputs of both functions and a gradient of each. `changes`: what the last rank does differently."""
    call = {"dtype": torch.float32, "target": TARGET, "mask": MASK, "temperature": 0.7, "vocab_start": WIDTH * rank}
    call |= {"vocab_size": V, "moments": True} | (changes if changes and rank == WORLD - 1 else {})
    leaf = LOGITS[:, WIDTH * rank : WIDTH * (rank + 1)].to(call["dtype"]).requires_grad_()
    place = {"group": ranks, **{name: call[name] for name in ("temperature", "vocab_start", "vocab_size")}}
    stats = token_stats(leaf, call["target"], moments=call["moments"], **place)
    changed = logit_covariance(leaf.detach() * 0.5, leaf, loss_mask=call["mask"], **place)
    found = [x for x in (*stats, *changed) if x is not None]
    for value in (stats.logprob + stats.entropy, changed.covariance + changed.kl):
        found += torch.autograd.grad(value.sum(), leaf)
    return [x.detach() for x in found]


def test_ranks_that_agree_get_the_bits_of_the_checked_way(monkeypatch):
    ranks = ThreadRanks(WORLD, monkeypatch)
    checked = ranks.run(lambda rank: outputs(ranks, rank))
    monkeypatch.setattr(shards.ranks, "host_may_read", lambda device: False)
    for mine, expected in zip(ranks.run(lambda rank: outputs(ranks, rank)), checked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        assert not any(x.isnan().any() for x in mine)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.8},
        {"vocab_size": V - 1},
        {"vocab_start": 2 * WIDTH - 1},
        {"vocab_start": 2 * WIDTH + 1},
        {"dtype": torch.bfloat16},
        {"target": TARGET.flip(0), "mask": MASK.flip(0)},
        {"target": TARGET + (TARGET == 3).long(), "mask": ~MASK},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_ranks_that_disagree_all_get_nan(ranks, changes):
    for rank, found in enumerate(ranks.run(lambda rank: outputs(ranks, rank, changes))):
        skipped = ~MASK
        if rank == WORLD - 1 and "mask" in changes:
            skipped = ~changes["mask"]
        for i, value in enumerate(found):
            ignored = changes["target"] == -100 if "target" in changes and rank == WORLD - 1 else TARGET == -100
            zeros = ignored if i < 5 or i == len(found) - 2 else skipped
            value = value[..., : WIDTH - 1]  # the last column is padding for one of the changes: 0
            assert value[~zeros].isnan().all() and not value[zeros].isnan().any(), (rank, i)


def spoilt(result):
    """Whether a result cannot be taken for a good one."""
    if isinstance(result, Selection):
        marked = result.threshold is None or bool(result.threshold.isnan())
        return int(result.count) == -1 and bool(result.mask.all()) and marked
    if isinstance(result, TokenCovariance):
        return bool(result.value.isnan().all())
    if isinstance(result, TokenMeans):
        result = result.mean
    if isinstance(result, dict):  # a summary
        return all(value.isnan() for value in result.values())
    if isinstance(result[0], list):  # (selections, metrics) of select
        return all(result[1][f"actor/cov_{name}"].isnan() for name in ("mean", "max", "p999"))
    return all(value[disagreements.TARGET != -100].isnan().all() for value in result if value is not None)


def on_every_rank(ranks, call):
    """Results and exceptions, where the last rank is the odd one."""

    def one(rank):
        try:
            return call(ranks, rank, WORLD, rank == WORLD - 1)
        except Exception as error:
            return error

    return ranks.run(one)


BLIND = [name for name in disagreements.FAILURES if "select alone" not in name]


def test_a_rank_that_fails_raises_and_the_others_get_nan(ranks):
    """With the kernels of a GPU too: tests/emulator/test_kernels.py."""
    call, message = disagreements.FAILURES["logit_covariance mask"]
    *others, failed = on_every_rank(ranks, call)
    assert isinstance(failed, TypeError) and re.search(message, str(failed))
    assert all(spoilt(other) for other in others)


@pytest.mark.parametrize("name", BLIND)
def test_a_rank_that_fails_in_any_call_raises_and_the_others_get_nan(ranks, monkeypatch, name):
    monkeypatch.setattr(arguments, "readable", lambda tensor: False)
    call, message = disagreements.FAILURES[name]
    *others, failed = on_every_rank(ranks, call)
    assert isinstance(failed, ValueError | TypeError) and re.search(message, str(failed)), failed
    assert all(not isinstance(other, Exception) and spoilt(other) for other in others), others
    ranks = ThreadRanks(WORLD, monkeypatch)
    assert not any(spoilt(result) for result in ranks.run(lambda rank: call(ranks, rank, WORLD, False)))


SAME_SHAPES = [name for name in disagreements.DISAGREEMENTS if not re.search("token_stats clamp|another", name)]


@pytest.mark.parametrize("name", [*SAME_SHAPES, *disagreements.REPEATED])
def test_ranks_that_disagree_in_anything_all_get_nan(ranks, monkeypatch, name):
    monkeypatch.setattr(arguments, "readable", lambda tensor: False)
    call, _ = (disagreements.DISAGREEMENTS | disagreements.REPEATED)[name]
    results = on_every_rank(ranks, call)
    assert all(not isinstance(result, Exception) and spoilt(result) for result in results), results


class ReadsNothing(TorchDispatchMode):
    """Fails on any tensor of the host's, and with it on every copy between host and device."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, found))
        on_host = [x for x in flat if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        assert not on_host, f"{func} has a tensor on the host: {on_host}"
        assert func is not torch.ops.aten._local_scalar_dense.default
        self.ops.append(str(func))
        return found


def test_no_value_is_read_and_nothing_is_copied_from_the_host(monkeypatch):
    """Meta tensors stand for a GPU's: not on the CPU, and any look at a value is an error."""
    ranks = ThreadRanks(1, monkeypatch)

    def call(rank):
        logits = torch.empty(T, WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(T, dtype=torch.int64, device="meta")
        mask = torch.empty(T, dtype=torch.bool, device="meta")
        with ReadsNothing() as seen:
            stats = token_stats(logits, target, group=ranks, moments=True, temperature=0.7)
            (stats.logprob + stats.entropy).sum().backward()
            changed = logit_covariance(logits.detach(), logits, group=ranks, loss_mask=mask)
            changed.kl.sum().backward()
        return seen.ops

    (ops,) = ranks.run(call)
    for name in ("message", "merge_row_stats", "logits_grad", "covariance_stats", "merge_covariance_stats"):
        assert any(f"entcov.{name}" in op for op in ops), name


def test_reading_a_value_would_be_noticed():
    with pytest.raises(AssertionError, match="on the host"), ReadsNothing():
        torch.tensor([1.0])
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").max().item()


def test_the_host_reads_on_the_cpu_and_where_torch_is_asked_to_debug(monkeypatch):
    level = torch.distributed.DebugLevel
    may_read, cpu, other = shards.ranks.host_may_read, torch.device("cpu"), torch.device("meta")
    monkeypatch.setattr(shards.dist, "get_debug_level", lambda: level.INFO)
    assert may_read(cpu) and not may_read(other)
    monkeypatch.setattr(shards.dist, "get_debug_level", lambda: level.DETAIL)
    assert may_read(other)
