"""What every rank gets where one of them differs, on a host that looks: over ranks that are threads.

tests/support/gloo_cases.py does the same over gloo; here each case is a test of its own, which takes milliseconds.
"""

from __future__ import annotations

import re

import pytest

from tests.support import disagreements
from tests.support.thread_ranks import ThreadRanks

WORLD = 2


def on_every_rank(monkeypatch, call) -> list:
    """Results and exceptions, where the last rank is the odd one."""
    ranks = ThreadRanks(WORLD, monkeypatch)

    def one(rank):
        try:
            return call(ranks, rank, WORLD, rank == WORLD - 1)
        except Exception as error:
            return error

    return ranks.run(one)


@pytest.mark.parametrize("name", disagreements.FAILURES)
def test_a_rank_that_fails_raises_its_error_and_the_others_name_it(monkeypatch, name):
    call, message = disagreements.FAILURES[name]
    *others, failed = on_every_rank(monkeypatch, call)
    assert isinstance(failed, ValueError | TypeError) and re.search(message, str(failed)), failed
    told = f"rank {WORLD - 1} of the group cannot do its part: {type(failed).__name__}: {failed}"
    assert all(isinstance(other, RuntimeError) and str(other).endswith(told) for other in others), others


@pytest.mark.parametrize("name", [*disagreements.DISAGREEMENTS, *disagreements.REPEATED])
def test_ranks_that_disagree_all_raise_the_same_error(monkeypatch, name):
    call, message = (disagreements.DISAGREEMENTS | disagreements.REPEATED)[name]
    kind = ValueError if name in disagreements.REPEATED else RuntimeError
    first, *others = on_every_rank(monkeypatch, call)
    assert isinstance(first, kind) and re.search(message, str(first)), first
    assert all(repr(other) == repr(first) for other in others), others


def test_a_rank_that_ends_before_it_says_what_it_was_called_with(monkeypatch):
    """gloo may bring the first messages, of different sizes, and end one process before the second ones."""

    def lost(*arguments, **named):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ThreadRanks, "all_gather_object", lost)
    call, _ = disagreements.DISAGREEMENTS["select_clip_cov step"]
    first, *_ = on_every_rank(monkeypatch, call)
    assert "equally many tokens" in str(first) and "The backend says: Connection closed by peer" in str(first)
    call, message = disagreements.FAILURES[next(iter(disagreements.FAILURES))]
    *_, failed = on_every_rank(monkeypatch, call)
    assert re.search(message, str(failed))  # the one that failed raises its own error
