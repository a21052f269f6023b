"""Scoring a response: `score(example, response) -> 0.0 or 1.0`, by the example's style and data source.

    style   data_source                         rule
    rule    entcov/TASK                         the task's own `score`
    exact   any                                 the text after the last "#" equals the ground truth

No response makes `score` raise; an example that cannot be scored at all (unknown source, unusable ground truth) does.
"""

from __future__ import annotations

from collections.abc import Callable

from entcov.rl import tasks
from entcov.rl.tasks.base import import_object, score_after_mark
from entcov.rl.types import Example

RewardFunction = Callable[[Example, str], float]


def score(example: Example, response: str) -> float:
    """Reward of a decoded response (without the end-of-sequence token). Safe to call from several threads.

    Raises:
        ValueError: unknown style or data source (the message lists the known ones), or an unusable ground truth.
    """
    return _scorer(example)(example, response)


def load_reward(spec: str | None) -> RewardFunction:
    """The reward function that a recipe names: None for `score`, or "module:function" for your own.

    Your function gets (example, response text) and returns a finite number.
    """
    if spec is None:
        return score
    function = import_object(spec, "reward")
    if not callable(function):
        raise ValueError(f"reward {spec!r} must be a function of (example, response), got {type(function).__name__}")
    return function


def _scorer(example: Example) -> RewardFunction:
    if example.style != "rule":
        if example.style not in STYLES:
            raise ValueError(f"unknown reward style {example.style!r}; known: rule, {', '.join(STYLES)}")
        return STYLES[example.style]
    source = example.data_source
    family, _, name = source.partition("/")
    if family == "entcov" and name in tasks.TASKS:
        return tasks.TASKS[name].score
    known = sorted(f"entcov/{name}" for name in tasks.TASKS)
    raise ValueError(f"no reward for data_source {source!r}; known: {', '.join(known)}")


STYLES: dict[str, RewardFunction] = {"exact": score_after_mark}
