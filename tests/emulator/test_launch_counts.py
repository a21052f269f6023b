"""How many kernels the public functions launch on a GPU: the launches of the CUDA code itself, counted by the emulator.
What torch launches beside them, and the names of the launchers, are in tests/stats/test_launches.py.
"""

import pytest
import torch

from entcov import linear_token_stats, logit_covariance, token_stats
from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import covariance_summary, token_covariance
from tests.emulator import emulated
from tests.support.thread_ranks import ThreadRanks

SHORT, LONG = (4, 300), (2, 41003)  # a row of one segment, and one of two, which are merged by one launch
WORLD = 2


def leaf(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def stats(shape, **settings):
    logits = leaf(shape)
    found = token_stats(logits, torch.arange(shape[0]) % shape[1], **settings)
    outputs = [x for x in (found.logprob, found.entropy, found.clamped_entropy) if x is not None]
    return sum(x.sum() for x in outputs), logits


def covariance(shape, **settings):
    logits = leaf(shape)
    found = logit_covariance(logits.detach() + 0.1, logits, **settings)
    return (found.covariance + found.kl).sum(), logits


def head(shape, **settings):
    hidden, weight = leaf((shape[0], 8)), leaf((shape[1], 8))
    found = linear_token_stats(hidden, weight, torch.arange(shape[0]), **settings)
    return (found.logprob + found.entropy).sum(), hidden


# call(shape, **settings) -> (its loss, a leaf); settings; kernels forward and backward for a SHORT and for a LONG row
CALLS = {
    "token_stats": (stats, {}, (1, 1), (2, 1)),
    "token_stats, moments": (stats, {"moments": True}, (1, 1), (2, 1)),
    "token_stats, clamp": (stats, {"clamp_p": 0.3}, (1, 1), (1, 1)),
    "token_stats, clamp and moments": (stats, {"clamp_p": 0.3, "moments": True}, (2, 1), (3, 1)),
    "logit_covariance": (covariance, {}, (2, 1), (2, 1)),
    "linear_token_stats, logits kept": (head, {}, (1, 1), (2, 1)),
    "linear_token_stats, 2 chunks": (head, {"chunk_size": 2}, (2, 2), None),
}
# With a clamp: sketch, message, bracket, merge, and twice partial, message, refine, since these logits use all bits of
# fp32 (tests/stats/test_launches.py has the usual one round).
SHARDED = {
    "token_stats": (stats, {}, (3, 1), (4, 1)),
    "token_stats, moments": (stats, {"moments": True}, (3, 1), (4, 1)),
    "token_stats, clamp": (stats, {"clamp_p": 0.3}, (10, 1), None),
    "logit_covariance": (covariance, {}, (3, 1), (4, 1)),
    "linear_token_stats": (head, {"reduce_hidden_grad": False}, (3, 1), None),
}


@pytest.fixture
def count(products):
    emulated.launches(products["plain"])
    return lambda: emulated.launches(products["plain"])


@pytest.mark.parametrize("name, shape", [(n, s) for n, c in CALLS.items() for s in (SHORT, LONG) if s == SHORT or c[3]])
def test_whole_rows(name, shape, count):
    call, settings, short, long = CALLS[name]
    loss, leaf = call(shape, **settings)
    forward = count()
    torch.autograd.grad(loss, leaf)
    assert (forward, count()) == (short if shape == SHORT else long)


@pytest.mark.parametrize(
    "name, shape", [(n, s) for n, c in SHARDED.items() for s in (SHORT, LONG) if s == SHORT or c[3]]
)
def test_shards(name, shape, count, monkeypatch):
    call, settings, short, long = SHARDED[name]
    ranks = ThreadRanks(WORLD, monkeypatch)
    found = ranks.run(lambda rank: call(shape, group=ranks, **settings))
    forward = count()
    for loss, leaf in found:
        torch.autograd.grad(loss, leaf)
    assert (forward, count()) == tuple(WORLD * n for n in (short if shape == SHORT else long))


def test_targets_of_more_than_4096_tokens_are_hashed_by_one_more_launch(count, monkeypatch):
    ranks = ThreadRanks(WORLD, monkeypatch)
    for tokens, launches in ((4096, 3), (4097, 4)):
        ranks.run(lambda rank, n=tokens: stats((n, 2), group=ranks))
        assert count() == WORLD * launches


# ---- selections ------------------------------------------------------------------------------------------------------

# Launches and bytes a token that are read, where all scores lie in the interval and differ. One more launch clears the
# sums of the covariance, torch's. csrc/cuda/token_select.cu has the sums.
SELECTIONS = {
    "covariance": (2, 4 * 4 + 2),
    "summary": (4, 2 * 5),
    "clip": (8, 5 * (5 + 1 + 8)),
    "kl": (10, 7 * 5 + 2 * 8),
}


@pytest.mark.parametrize("T", [1, 5000])
def test_selections_launch_and_read_what_is_promised(T, count, products):
    rng = torch.Generator().manual_seed(0)
    logprob, advantage, mask = -torch.rand(T, generator=rng), torch.randn(T, generator=rng), torch.ones(T) > 0
    ids = torch.randperm(T, generator=rng)
    scores = token_covariance(logprob, advantage, mask)
    everywhere = {"low": -9.0, "high": 9.0, "exclude": ~mask}
    calls = {
        "covariance": lambda: token_covariance(logprob, advantage, mask),
        "summary": lambda: covariance_summary(scores),
        "clip": lambda: select_clip_cov(scores, ids, ratio=0.01, at_least=1, seed=0, step=1, **everywhere),
        "kl": lambda: select_largest(scores, ids, ratio=0.01, at_least=1, seed=0, step=1),
    }
    for name, (launches, read) in SELECTIONS.items():
        count(), emulated.loaded_bytes(products["plain"])
        calls[name]()
        found = emulated.loaded_bytes(products["plain"])
        tied = 4 * 8  # an id in each stage of the draw: of KL-Cov's one token at the threshold
        assert count() == launches and read * T <= found <= read * T + tied, name
