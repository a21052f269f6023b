"""The benchmark's sets: which prompts are in which, and under which names."""

import pytest

from entcov.rl.data.stream import load_rows, write_rows
from entcov.rl.rewards.rules import score
from entcov.rl.types import Example
from entcov.studies.hard_prompts import HardPrompts

SOLVED = [0, 1, 0, 3, 2, 0, 0, 1, 0]  # of nine prompts: five were never solved


@pytest.fixture
def bench(tmp_path):
    examples = [
        Example("entcov/countdown", ({"role": "user", "content": f"use {n} 1 make {n + 1}: "},), f"{n} 1 make {n + 1}")
        for n in range(2, 11)
    ]
    write_rows(examples, tmp_path / "subset.parquet", {"solved": SOLVED, "samples": [32] * 9})
    return HardPrompts(pool=9, train=3, held_out=2, seen=2)


def numbers(path):
    return [int(example.ground_truth.split()[0]) for example in load_rows(path)]


def test_the_sets_share_no_prompt_of_training_and_evaluation(bench, tmp_path):
    bench._write_sets(tmp_path, tmp_path / "subset.parquet")
    residual, sparse = (bench.files(tmp_path, name) for name in ("residual", "sparse"))
    assert [numbers(residual[kind]) for kind in ("held_out", "train", "seen")] == [[2, 3], [4, 5, 6], [4, 5]]
    assert [numbers(sparse[kind]) for kind in ("held_out", "train", "seen")] == [[2, 4], [7, 8, 10], [7, 8]]


def test_fewer_training_prompts_are_the_first_ones(bench, tmp_path):
    bench._write_sets(tmp_path, tmp_path / "subset.parquet")
    few = bench.files(tmp_path, "residual", 1)
    assert numbers(few["train"]) == numbers(few["seen"]) == [4] and numbers(few["held_out"]) == [2, 3]


def test_evaluated_prompts_have_a_source_of_their_own_and_the_same_reward(bench, tmp_path):
    bench._write_sets(tmp_path, tmp_path / "subset.parquet")
    files = bench.files(tmp_path, "residual")
    sources = {kind: {example.data_source for example in load_rows(path)} for kind, path in files.items()}
    assert sources == {
        "train": {"entcov/countdown"}, "seen": {"entcov/countdown/seen"}, "held_out": {"entcov/countdown/held_out"},
    }  # fmt: skip
    example = load_rows(files["held_out"])[0]
    assert score(example, "#2+1") == 1 and score(example, "#2*1") == 0


def test_too_few_prompts_are_refused(bench, tmp_path):
    small = HardPrompts(pool=9, train=3, held_out=5, seen=2)
    with pytest.raises(ValueError, match="pool: 9 prompts have 5 of the sparse set, .* held_out, 5"):
        small._write_sets(tmp_path, tmp_path / "subset.parquet")
