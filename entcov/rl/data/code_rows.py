"""Rows of public sets of programs: the question, and the tests as `rewards.code` reads them.

    PRIME-RL/Eurus-2-RL-Data   verl's rows; prompt [system, user], reward_model.ground_truth JSON {"inputs", "outputs"}
                               with or without "fn_name"; ability "code" beside "math"
    TIGER-Lab/AceCode-87K      question, test_cases: a list of "assert f(...) == ..."
    KodCode/KodCode-V1         question, solution, test_info: [{function_declaration, ...}], test: a pytest module with
                               "from solution import f" and functions test_*; style "instruct" or "complete" (those of
                               "online_judge" are left out)

A row with a test that the reward cannot judge is left out whole: with the others alone it would ask for less.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator
from typing import Any

from entcov.rl.rewards.code import parse_tests, passes

# PRIME's wording, with which the rows of Eurus-2-RL-Data end.
INSTRUCTION = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
_ENDINGS = (INSTRUCTION.strip(), INSTRUCTION.strip().replace("```\nat", "``` at"))
_MOST_TESTS = 1000  # that parametrize makes of one row


def _field(row: dict, name: str, kind: type, rule: str) -> Any:
    if not isinstance(row.get(name), kind):
        raise ValueError(f"{name} must be {rule}, got {row.get(name)!r:.80}" if name in row else f"{name} is missing")
    return row[name]


def _usable(truth: str) -> str | None:
    try:
        parse_tests(truth)
    except ValueError:
        return None
    return truth


# ---- verl's rows ---------------------------------------------------------------------------------------------------


def user_question(row: dict) -> str:
    """The last message of the user without PRIME's instruction. A system message is left out."""
    messages = _field(row, "prompt", list, "a list of messages")
    texts = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    if not texts or not isinstance(texts[-1], str):
        raise ValueError(f"prompt must have a message of the user, got {messages!r:.80}")
    text = texts[-1].strip()
    for ending in _ENDINGS:
        text = text.removesuffix(ending).rstrip()
    if not text:
        raise ValueError("prompt must ask something, got the instruction alone")
    return text


def own_tests(row: dict) -> str | None:
    """reward_model.ground_truth, None where the reward does not take it."""
    truth = _field(row, "reward_model", dict, "an object").get("ground_truth")
    return _usable(truth) if isinstance(truth, str) else None


# ---- AceCode -------------------------------------------------------------------------------------------------------


def acecode_tests(row: dict) -> str | None:
    return _usable(json.dumps({"assert_case": _field(row, "test_cases", list, "a list of tests")}))


# ---- KodCode -------------------------------------------------------------------------------------------------------


def kodcode_question(row: dict) -> str:
    """The question and, where they are given, the declarations of the functions that the tests call."""
    question = _field(row, "question", str, "text").strip()
    if not question:
        raise ValueError("question must be a non-empty string, got ''")
    declarations = [
        info["function_declaration"].strip()
        for info in row.get("test_info") or []
        if isinstance(info, dict) and isinstance(info.get("function_declaration"), str)
    ]
    if not any(declarations):
        return question
    return question + "\n\nDeclare it as " + ", ".join(f"`{one}`" for one in declarations if one) + "."


def kodcode_solution(row: dict) -> str | None:
    solution = row.get("solution")
    return f"```python\n{solution.strip()}\n```" if isinstance(solution, str) and solution.strip() else None


def kodcode_tests(row: dict) -> str | None:
    """The tests of the row's pytest module; None where they cannot be judged, or the row's own solution does not pass.

    Raises:
        IsolationError: this system lacks what confines the solution.
    """
    cases = kodcode_statements(_field(row, "test", str, "text"))
    truth = _usable(json.dumps({"assert_case": cases}))
    return truth if truth is not None and passes(_field(row, "solution", str, "text"), parse_tests(truth)) else None


def kodcode_statements(module: str) -> list[str]:
    """The tests of a pytest module as single statements; none where it holds anything that these cannot say."""
    try:
        cases = list(_statements(module))
    except _NotPlain:
        return []
    return cases if len(cases) <= _MOST_TESTS else []


class _NotPlain(Exception):
    """A test that is more than assignments of names, asserts and pytest.raises."""


def _statements(module: str) -> Iterator[str]:
    """Each assert, and each call under pytest.raises, with the names that were assigned before put in."""
    try:
        body = ast.parse(module).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _NotPlain from None
    known: dict[str, ast.expr] = {}
    for node in body:
        match node:
            case ast.ImportFrom("solution", names) if not any(name.asname for name in names):
                pass
            case ast.Import([ast.alias("pytest" | "math", None)]):
                pass
            case ast.Expr(ast.Constant()):
                pass
            case ast.Assign([ast.Name(name)], value):
                known[name] = _filled(value, known)
            case ast.FunctionDef(name, _, statements, decorators) if name.startswith("test"):
                for parameters in _parametrized(node, decorators):
                    yield from _tests_of(statements, {**known, **parameters})
            case _:
                raise _NotPlain


def _parametrized(function: ast.FunctionDef, decorators: list[ast.expr]) -> Iterator[dict[str, ast.expr]]:
    """What the parameters of a test stand for, once for each time that pytest runs it."""
    wanted = [argument.arg for argument in function.args.args]
    match decorators:
        case [] if not wanted:
            yield {}
        case [
            ast.Call(
                ast.Attribute(ast.Attribute(ast.Name("pytest"), "mark"), "parametrize"),
                [ast.Constant(str(names)), ast.List(rows) | ast.Tuple(rows)],
                [],
            )
        ]:
            named = [name.strip() for name in names.split(",")]
            for row in rows:
                values = [row] if len(named) == 1 else getattr(row, "elts", [])
                if sorted(named) != sorted(wanted) or len(values) != len(named):
                    raise _NotPlain
                yield dict(zip(named, values, strict=True))
        case _:
            raise _NotPlain


def _tests_of(statements: list[ast.stmt], known: dict[str, ast.expr]) -> Iterator[str]:
    for node in statements:
        match node:
            case ast.Expr(ast.Constant()):
                pass
            case ast.Assign([ast.Name(name)], value):
                known = {**known, name: _filled(value, known)}
            case ast.Assert(test):
                yield f"assert {ast.unparse(_filled(test, known))}"
            case ast.With([ast.withitem(context, None)], [ast.Expr(call)]):
                yield f"with {ast.unparse(context)}:\n    {ast.unparse(_filled(call, known))}"
            case _:
                raise _NotPlain


def _filled(expression: ast.expr, known: dict[str, ast.expr]) -> ast.expr:
    """The expression with the names of `known` replaced. A name that it binds itself must not be among them."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id not in known:
                return node
            if not isinstance(node.ctx, ast.Load):
                raise _NotPlain
            return copy.deepcopy(known[node.id])

    return Fill().visit(copy.deepcopy(expression))
