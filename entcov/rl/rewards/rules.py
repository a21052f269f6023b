"""Scoring a response: `score(example, response) -> 0.0 or 1.0`, by the example's style and data source.

docs/tasks.md has the table of styles and data sources. No response makes `score` raise; an example that cannot be
scored (unknown source, unusable ground truth) does.
"""

import functools
import re
from collections.abc import Callable
from decimal import Decimal

from entcov.rl.rewards.code import CODE_SOURCES, score_code
from entcov.rl.sandbox import SandboxPool
from entcov.rl.tasks.base import TASKS, answer_after_mark, import_object, score_after_mark
from entcov.rl.tasks.reasoning_gym import answer_in_tags
from entcov.rl.types import Example

# One number, or several by name, whose sum is the reward (the advantage gdpo normalises each alone).
RewardFunction = Callable[[Example, str], float | dict[str, float]]

MATH_SOURCES = (
    "DigitalLearningGmbH/MATH-lighteval",
    "HuggingFaceH4/MATH-500",
    "lighteval/MATH",
    "math",
    "math_dapo",
    "math_dapo_reasoning",
)
_TIME_LIMIT = 5.0  # seconds for one comparison by math-verify; a longer one scores 0
_MAX_ANSWER = 1000  # characters; a longer answer is wrong
_NUMBER = re.compile(r"-?\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)")
_ANSWER_LINE = re.compile(r"answer\s*:([^\n]+)", re.IGNORECASE)


def score(example: Example, response: str) -> float:
    """Reward of a decoded response (without the end-of-sequence token). Safe to call from several threads.

    Raises:
        ValueError: unknown style or data source (the message lists the known ones), or an unusable ground truth.
    """
    return _scorer(example)(example, response)


def final_answer(example: Example, response: str) -> str | None:
    """The answer in a response that `score` judges, as text without decoration; None where it has none.

    GSM8K's numbers are equal texts where they are equal numbers. Otherwise 1/2 and 0.5 are two answers.

    Raises:
        ValueError: unknown style or data source, or one of programs.
    """
    scorer = _scorer(example)
    if scorer is _score_gsm8k:
        number = _gsm8k_answer(response)
        return None if number is None else str(number.normalize())
    if scorer in (_score_math, _score_math_boxed):
        answer = _math_answer(response) if scorer is _score_math else last_boxed(response)
        return _bare(answer or "") or None
    if scorer is score_code:
        raise ValueError(f"data_source {example.data_source!r}: a program is no final answer that could be compared")
    find = answer_in_tags if scorer is TASKS["reasoning_gym"].score else answer_after_mark
    return find(response) or None


def load_reward(spec: str | None) -> RewardFunction:
    """The reward function that a recipe names: None for `score`, or "module:function" for your own.

    Your function gets (example, response text) and returns a finite number, or a dict of them with the same keys for
    every response, whose sum is the reward.
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
    family, _, rest = source.partition("/")
    name = rest.partition("/")[0]  # what follows names a part of the task's prompts: entcov/countdown/residual
    if family == "entcov" and name in TASKS:
        return TASKS[name].score
    if family == "reasoning_gym" and name:
        return TASKS["reasoning_gym"].score
    if source == "openai/gsm8k":
        return _score_gsm8k
    if source in MATH_SOURCES or source.lower().startswith(("aime", "amc")):
        return _score_math
    if source in CODE_SOURCES:
        return score_code
    known = [*(f"entcov/{name}[/PART]" for name in sorted(TASKS) if name != "reasoning_gym"), "reasoning_gym/DATASET"]
    known += ["openai/gsm8k", *MATH_SOURCES, "aime*", "amc*", *CODE_SOURCES]
    raise ValueError(
        f"no reward for data_source {source!r}; known: {', '.join(known)}. Other data can set reward_model.style to "
        f"{', '.join(STYLES)}, or bring a reward function of its own as 'module:function'"
    )


# ---- GSM8K ---------------------------------------------------------------------------------------------------------


def _score_gsm8k(example: Example, response: str) -> float:
    truth = _number(example.ground_truth.rpartition("####")[2])
    if truth is None:
        raise ValueError(f"gsm8k ground_truth must be a number, or end in '#### number', got {example.ground_truth!r}")
    return 1.0 if _gsm8k_answer(response) == truth else 0.0


def _gsm8k_answer(response: str) -> Decimal | None:
    _, mark, tail = response.rpartition("####")
    answer = tail if mark else last_boxed(response)
    return None if answer is None else _number(answer)


def _number(text: str) -> Decimal | None:
    """The number that `text` starts with: 1,234.50 and $5 and -3 are numbers, what follows them does not matter."""
    match = _NUMBER.match(text[:_MAX_ANSWER].strip())
    return Decimal(match[1].replace(",", "")) if match else None


# ---- math-verify ---------------------------------------------------------------------------------------------------


def _score_math(example: Example, response: str) -> float:
    return _equals_truth(example, _math_answer(response))


def _score_math_boxed(example: Example, response: str) -> float:
    return _equals_truth(example, last_boxed(response))


def _equals_truth(example: Example, answer: str | None) -> float:
    if answer is None or len(answer) > _MAX_ANSWER:
        return 0.0
    boxed_truth = last_boxed(example.ground_truth)
    answer, truth = _bare(answer), _bare(example.ground_truth if boxed_truth is None else boxed_truth)
    if not answer:
        return 0.0
    return 1.0 if answer == truth else _math_pool().score(gold=truth, answer=answer)


def _math_answer(response: str) -> str | None:
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    lines = _ANSWER_LINE.findall(response)
    return lines[-1] if lines else None


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces; None where there is none."""
    mark = "\\boxed{"
    start = text.rfind(mark)
    if start < 0:
        return None
    depth = 0
    for end in range(start + len(mark) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(mark) : end]
    return None


def _bare(answer: str) -> str:
    """Without surrounding white space, emphasis, dollar signs, and the full stop of a sentence."""
    return answer.lstrip(" \t\r\n*$").rstrip(" \t\r\n*$.")


@functools.cache
def _math_pool() -> SandboxPool:
    return SandboxPool("math", limit=_TIME_LIMIT, extra="train")


STYLES: dict[str, RewardFunction] = {
    "exact": score_after_mark,
    "gsm8k": _score_gsm8k,
    "math": _score_math,
    "math_boxed": _score_math_boxed,
    "code": score_code,
}
