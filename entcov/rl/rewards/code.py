"""The reward of programs: the last fenced code block of a response, run in a sandbox against its example's tests.

The ground truth is JSON, one of

    {"inputs": [...], "outputs": [...]}                   programs that read standard input and print
    {"inputs": [...], "outputs": [...], "fn_name": ...}   calls of a function; each input is its list of arguments
    {"assert_case": ["assert f(2) == 4", ...]}            statements, see `assertions`

as in PRIME's Eurus-2-RL-Data (the first two), AceCode and KodCode (the last). The reward is 1.0 where all tests pass,
else 0.0: the law of Cui et al. (2025) is about that. A program never sees what is expected: it gets an input or
arguments, and this process compares what it printed or returned. docs/tasks.md says what differs from PRIME's rules.
"""

from __future__ import annotations

import functools
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from entcov import arguments as check
from entcov.rl.rewards.assertions import Assertion
from entcov.rl.sandbox import Call, call_program, run_program
from entcov.rl.types import Example

CODE_SOURCES = ("apps", "codecontests", "codeforces", "taco")  # the data_source of Eurus-2-RL-Data's rows of code
TEST_LIMIT = 5.0  # seconds for one test
PROGRAM_LIMIT = 15.0  # seconds for all tests of a program
_LONGEST = 1 << 16  # characters of a program
_FENCE = "```"


def score_code(example: Example, response: str) -> float:
    """1.0 where the program in `response` passes all tests of `example.ground_truth`, else 0.0.

    A program that runs out of time scores 0.0 and counts as timed out (`Rollout.timed_out`).

    Raises:
        IsolationError: this system lacks what confines a program.
        ValueError: the ground truth is no such JSON.
    """
    tests = parse_tests(example.ground_truth)
    source = last_code_block(response)
    return float(source is not None and passes(source, tests))


def passes(source: str, tests: Tests) -> bool:
    """Whether a program passes all tests. One that is empty or longer than 65,536 characters does not."""
    return bool(source.strip()) and len(source) <= _LONGEST and tests.passed_by(source)


def last_code_block(text: str) -> str | None:
    """The last block between lines of ``` whose first names Python (python, python3, py), else the last block at all.

    None where there is none. A block that is not closed is none: the response was cut off.
    """
    blocks: dict[bool, str] = {}
    language, lines = None, []
    for line in text.split("\n"):
        bare = line.strip()
        if language is None:
            if bare.startswith(_FENCE) and _FENCE not in bare[3:]:
                language, lines = bare[3:].strip().lower(), []
        elif bare == _FENCE:
            blocks[language in ("python", "python3", "py")] = textwrap.dedent("\n".join(lines))
            language = None
        else:
            lines.append(line)
    return blocks.get(True, blocks.get(False))


# ---- tests ---------------------------------------------------------------------------------------------------------


class Tests(Protocol):
    def passed_by(self, source: str) -> bool: ...


@functools.lru_cache(maxsize=256)  # a group of responses has the same tests
def parse_tests(ground_truth: str) -> Tests:
    """The tests that a ground truth describes.

    Raises:
        ValueError: it is no JSON of one of the three forms; the message names the key, the rule and the value.
    """
    try:
        truth = json.loads(ground_truth)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the ground truth of code must be JSON ({error}), got {check.shown(ground_truth)}") from None
    if not isinstance(truth, dict):
        raise ValueError(f"the ground truth of code must be an object, got {check.shown(ground_truth)}")
    if "assert_case" in truth:
        cases = _list(truth, "assert_case")
        if not all(isinstance(case, str) for case in cases):
            raise ValueError(f"assert_case must be a list of text, got {check.shown(cases)}")
        return AssertTests(tuple(Assertion(case) for case in cases))
    inputs, outputs = _list(truth, "inputs"), _list(truth, "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"inputs and outputs must be as many, got {len(inputs)} and {len(outputs)}")
    name = truth.get("fn_name")
    if name is None:
        texts = [(_text("inputs", one), _text("outputs", other)) for one, other in zip(inputs, outputs, strict=True)]
        return InputTests(tuple(texts))
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"fn_name must be the name of a function, got {check.shown(name)}")
    pairs = [_call_and_result(name, one, other) for one, other in zip(inputs, outputs, strict=True)]
    return CallTests(tuple(call for call, _ in pairs), tuple(result for _, result in pairs))


def _list(truth: dict, key: str) -> list:
    value = truth.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of at least one entry, got {check.shown(value)}")
    return value


def _text(key: str, value: Any) -> str:
    """Text, or a list of its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{key} must hold text, or lists of lines, got {check.shown(value)}")
    return value


def _call_and_result(name: str, given: Any, expected: Any) -> tuple[Call, Any]:
    """Arguments are a list, or text with one JSON value a line; then the result is JSON text too."""
    if isinstance(given, str):
        try:
            given, expected = [json.loads(line) for line in given.split("\n")], json.loads(expected)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"inputs of a function must be lists of arguments, or text with one JSON value a line and outputs of "
                f"JSON text, got {check.shown(given)} and {check.shown(expected)} ({error})"
            ) from None
    if not isinstance(given, list):
        raise ValueError(f"inputs of a function must be lists of arguments, got {check.shown(given)}")
    return Call(name, [_with_integer_keys(argument) for argument in given]), expected


def _with_integer_keys(argument: Any) -> Any:
    """JSON has made text of a dictionary's integer keys: integers again, as PRIME does it."""
    if isinstance(argument, dict) and argument and all(key.lstrip("-").isdecimal() for key in argument):
        return {int(key): value for key, value in argument.items()}
    return argument


@dataclass(frozen=True)
class InputTests:
    """Standard input and the output expected for it. Each test is a process of its own."""

    cases: tuple[tuple[str, str], ...]

    def passed_by(self, source: str) -> bool:
        """Stops at the first test that fails."""
        end = time.monotonic() + PROGRAM_LIMIT
        for given, expected in self.cases:
            left = max(end - time.monotonic(), 0.001)  # a millisecond is too short for any program: it is timed out
            most = 2 * len(expected.encode(errors="replace")) + (1 << 16)
            done = run_program(source, given, limit=min(left, TEST_LIMIT), most_output=most)
            if done.ended_by or done.status or not same_output(done.stdout, expected):
                return False
        return True


def same_output(printed: str, expected: str) -> bool:
    """Whether two texts have the same lines, but for white space at their ends, and empty lines at the end of all."""
    return _lines(printed) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@dataclass(frozen=True)
class CallTests:
    """Calls of one function and the results expected, as JSON has them. All calls share a process."""

    calls: tuple[Call, ...]
    expected: tuple[Any, ...]

    def passed_by(self, source: str) -> bool:
        if self.calls[0].name not in source:
            return False
        outcomes = call_program(source, self.calls, limit=PROGRAM_LIMIT, each=TEST_LIMIT)
        return len(outcomes) == len(self.calls) and all(
            not outcome.raised and _same_result(outcome.value, expected)
            for outcome, expected in zip(outcomes, self.expected, strict=True)
        )


def _same_result(value: Any, expected: Any) -> bool:
    """Whether `value` is `expected`, or its one entry: APPS and TACO put every result into a list."""
    try:
        value = _as_json(value)
        return value == expected or (isinstance(expected, list) and len(expected) == 1 and value == expected[0])
    except RecursionError:  # nested so deeply that it could just be read
        return False


def _as_json(value: Any) -> Any:
    """The value as JSON would give it back: tuples are lists, and keys are text."""
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if isinstance(value, dict):
        return {_key(key): _as_json(entry) for key, entry in value.items()}
    return value


def _key(key: Any) -> Any:
    return json.dumps(key) if key is None or isinstance(key, (int, float)) else key


@dataclass(frozen=True)
class AssertTests:
    """Statements about the results of calls. All calls share a process, in the order of the statements."""

    cases: Sequence[Assertion]

    def passed_by(self, source: str) -> bool:
        calls = [call for case in self.cases for call in case.calls]
        if any(call.name not in source for call in calls):
            return False
        outcomes = call_program(source, calls, limit=PROGRAM_LIMIT, each=TEST_LIMIT)
        if len(outcomes) < len(calls):
            return False
        rest = iter(outcomes)
        return all(case.holds([next(rest) for _ in case.calls]) for case in self.cases)
