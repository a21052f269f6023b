"""The reasoning-gym adapter: disjoint splits, binary rewards, and the package's traps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from entcov.rl.rewards import score
from entcov.rl.tasks import make_task
from entcov.rl.types import Example

pytestmark = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("reasoning_gym"), reason="reasoning-gym is an optional extra"
)


def text(example: Example) -> str:
    return example.prompt[0]["content"]


def test_reasoning_gym_splits_and_scores():
    task = make_task("reasoning_gym", dataset="chain_sum", settings={"max_terms": 2, "max_digits": 1})
    train = [task.example("train", i) for i in range(300)]
    held_out = [task.example("held_out", i) for i in range(60)]
    assert not {text(e) for e in train} & {text(e) for e in held_out}
    assert len({text(e) for e in held_out}) > 20
    for example in train[:100] + held_out:
        assert score(example, example.solution) == 1.0
        assert score(example, example.ground_truth) == 0.0  # no tags
        assert score(example, f"<answer>{int(example.ground_truth) + 1}</answer>") == 0.0
        assert score(example, f"<answer>0</answer> no: <answer> {example.ground_truth}\n</answer>") == 1.0


def test_reasoning_gym_partial_credit_is_no_success_and_its_exceptions_are_zeros():
    """countdown gives 0.01 for an answer that is merely there; prime_factorization's scorer raises on words."""
    for dataset in ("countdown", "prime_factorization"):
        example = make_task("reasoning_gym", dataset=dataset).example("train", 1)
        assert score(example, example.solution) == 1.0
        assert score(example, "<answer>zzz</answer>") == 0.0
        assert score(example, "<answer>1 + 1</answer>") == 0.0


def test_reasoning_gym_is_the_same_in_every_process():
    """isomorphic_strings goes through sets: with a random hash seed, (seed, index) gave another question every time."""
    program = (
        "from entcov.rl.tasks import make_task\n"
        "task = make_task('reasoning_gym', dataset='isomorphic_strings', seed=4)\n"
        "print([task.example('train', i).prompt for i in (0, 1, 64)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and "isomorphic" in outputs.pop()


def test_reasoning_gym_composite_takes_plain_settings():
    settings = {"datasets": [{"name": n, "weight": 1, "config": {}} for n in ("gcd", "chain_sum")]}
    task = make_task("reasoning_gym", dataset="composite", settings=settings)
    examples = [task.example("train", i) for i in range(20)]
    assert {"GCD" in text(e) for e in examples} == {True, False}
    assert all(score(e, e.solution) == 1.0 for e in examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "no_such"}, "unknown dataset 'no_such'; known: ab, "),
        ({"dataset": "codeio"}, "codeio is refused: its snippets draw unseeded numbers"),
        ({"dataset": "game_of_life_halting"}, "refused: its scorer gives every answer the full score"),
        ({"dataset": "chain_sum", "settings": {"seed": 1}}, "settings must not hold 'seed', got 1"),
        ({"dataset": "chain_sum", "settings": {"terms": 1}}, "chain_sum with settings .*'terms': 1.*unexpected"),
        ({"dataset": "chain_sum", "settings": {"min_terms": -1}}, "min_terms must be positive"),
    ],
)
def test_reasoning_gym_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("reasoning_gym", **settings)


def test_reasoning_gym_rows_of_another_making_are_refused():
    example = make_task("reasoning_gym", dataset="gcd").example("train", 0)
    changed = Example(**{**example.__dict__, "extra_info": {**example.extra_info, "item": 5, "version": "0.0.1"}})
    with pytest.raises(ValueError, match="item 5 .* comes out differently .written by reasoning-gym 0.0.1, installed"):
        score(changed, "<answer>1</answer>")
    bare = Example(**{**example.__dict__, "extra_info": json.loads('{"dataset": "gcd"}')})
    with pytest.raises(ValueError, match="extra_info must hold dataset, settings, seed, size, item; missing"):
        score(bare, "<answer>1</answer>")
