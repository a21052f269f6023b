"""pass@k against exact binomials and its expectation, the record of solve counts and its bound."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest

from entcov.rl.answers import Answers
from entcov.rl.solve_counts import MOST_PROMPTS, SolveCounts, pass_at_k, read_solve_counts, write_solve_counts
from entcov.rl.types import Example, Prompt, Rollout


def test_pass_at_k_is_the_ratio_of_binomials():
    for n in range(1, 13):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-15)
    exact = 1 - Fraction(math.comb(1_999_993, 1_000), math.comb(2_000_000, 1_000))  # floats of these overflow
    assert pass_at_k(2_000_000, 7, 1_000) == pytest.approx(float(exact), rel=1e-9)


def test_pass_at_k_is_unbiased():
    """Its expectation over c ~ Binomial(n, p) is 1 - (1 - p)^k."""
    n, p = 8, 0.3
    for k in (1, 3, 8):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "samples must be at least 1, got 0"),
        ((4, 5, 1), r"solved must be in \[0, 4\], got 5"),
        ((4, 2, 0), r"k must be in \[1, 4\], got 0"),
        ((4, 2, 5), r"k must be in \[1, 4\], got 5"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def rollouts(source: str, first_uid: int, *rewards: list[float]) -> list[Rollout]:
    return [
        Rollout(Prompt(uid, Example(source, (), "1"), (1,)), sample, [3], [0.0], True, 0, reward=reward)
        for uid, own in enumerate(rewards, start=first_uid)
        for sample, reward in enumerate(own)
    ]


def test_counts_of_an_evaluation_and_its_curve(tmp_path):
    """A response is right from reward 1 on. pass@2 of 4: (1/2, 0, 5/6, 1) for c = 1, 0, 2, 4."""
    found = rollouts("a", 3, [0, 1, 0.9, 0], [0.5, 0, 0, 0], [1, 0, 1.2, 0], [1, 1, 1, 1]) + rollouts("b", 7, [0], [1])
    write_solve_counts(tmp_path, 40, found)
    write_solve_counts(tmp_path, 0, found[::-1][:1])
    again = read_solve_counts(tmp_path)
    assert list(again) == [0, 40] and list(again[40]) == ["a", "b"]
    a = again[40]["a"]
    assert a == SolveCounts(4, (1, 1, 1, 0, 1), (1, 0, 2, 4), Answers(1.0, None))  # all responses have one text
    assert again[40]["b"] == SolveCounts(1, (1, 1), (0, 1))
    assert a.curve() == pytest.approx({1: 7 / 16, 2: (1 / 2 + 5 / 6 + 1) / 4, 4: 3 / 4})
    assert SolveCounts.of(6, [3]).curve().keys() == {1, 2, 4, 6}
    assert read_solve_counts(tmp_path / "none") == {}


def test_the_record_is_bounded_and_its_histogram_is_of_all_prompts(tmp_path):
    write_solve_counts(tmp_path, 1, rollouts("a", 0, *([1.0] for _ in range(MOST_PROMPTS)), [0.0], [0.0]))
    found = read_solve_counts(tmp_path)[1]["a"]
    assert len(found.solved) == MOST_PROMPTS and found.histogram == (2, MOST_PROMPTS)
    assert found.pass_at(1) == MOST_PROMPTS / (MOST_PROMPTS + 2)
    assert (tmp_path / "solve_counts" / "step_1.json").stat().st_size < 5_000


def test_a_damaged_record_is_named(tmp_path):
    write_solve_counts(tmp_path, 1, rollouts("a", 0, [1.0]))
    path = tmp_path / "solve_counts" / "step_1.json"
    for text in ('{"a": {"samples": 1}}', "[1]", path.read_text()[:-9], json.dumps({"a": 3})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"step_1\.json: holds no solve counts"):
            read_solve_counts(tmp_path)
