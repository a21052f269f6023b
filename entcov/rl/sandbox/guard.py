"""Restricts the `eval` of libraries that score answers to arithmetic, so that no answer can run code.

There are two such places. Both are checked just before the evaluation, when the code is complete:

    sympy's parse_expr    turns text into Python code ("x**2" becomes Symbol('x')**Integer(2)) and evaluates it with all
                          of sympy and Python's built-in functions in reach. The code must be numbers, symbols,
                          + - * / ** and elementary functions.
    eval in reasoning-gym the text must be literals and operators.

Other functions are refused also because they would earn the reward without solving the question: Integral(f, x)
instead of an antiderivative, expand(...) instead of the product.

The process that scores imports this file without the rest of entcov, so it imports the standard library alone.
"""

import ast
import builtins
import functools
import re
import sys
from collections.abc import Callable, Container
from typing import Any

_LITERALS = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)
_TOKENS = {  # what parse_expr writes round a token, and the text that may be in it
    "Symbol": re.compile(r"[^\W\d]\w*"),
    "Integer": re.compile(r"\d+"),
    "Float": re.compile(r"\d*\.?\d*"),
}
_FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc"),
    *("sinh", "cosh", "tanh", "coth", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt", "Abs", "abs"),
    "factorial",  # "5!" becomes factorial(5)
}
_CONSTANTS = {"pi", "E", "I"}


def check_arithmetic(code: str, symbols: Container[str]) -> None:
    """Refuses code that is more than arithmetic on numbers, symbols and elementary functions.

    Args:
        code: what parse_expr is about to evaluate.
        symbols: names that stand for symbols.

    Raises:
        SyntaxError: as for text that is no expression at all.
    """

    def check(node: ast.expr) -> None:
        match node:
            case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Pow(), right):
                check(left)
                check(right)
            case ast.UnaryOp(ast.UAdd() | ast.USub(), operand):
                check(operand)
            case ast.Constant(value) if type(value) in (int, float):
                pass
            case ast.Name(name) if name in _CONSTANTS or name in symbols:
                pass
            case ast.Call(ast.Name(name), [ast.Constant(value)], []) if name in _TOKENS:
                if not _TOKENS[name].fullmatch(str(value)):
                    raise SyntaxError(f"{value!r} is no number and no name")
            case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS:
                for argument in arguments:
                    check(argument)
            case _:
                raise SyntaxError(f"{ast.unparse(node)} is no arithmetic")

    try:
        check(_parsed(code).body)
    except RecursionError as error:
        raise SyntaxError(str(error)) from None


def evaluate(code: str, *names: Any) -> Any:
    """`eval` for literals and operators.

    Raises:
        SyntaxError: there is anything else in `code`.
    """
    tree = _parsed(code)
    for node in ast.walk(tree):
        if not isinstance(node, _LITERALS):
            raise SyntaxError(f"{type(node).__name__} is no literal and no operator")
    return builtins.eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def _parsed(code: str) -> ast.Expression:
    if "#" in code:  # a comment is no part of an answer, but scorers that search its text would find numbers there
        raise SyntaxError("a comment is no arithmetic")
    try:
        return ast.parse(code.strip(), mode="eval")
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)) from None


def guard_sympy() -> None:
    """From now on parse_expr, and `sympify` of text with it, evaluates arithmetic only, in this process.

    Raises:
        RuntimeError: this version of sympy evaluates text in another way.
    """
    from sympy.parsing import sympy_parser

    original = sympy_parser.stringify_expr

    @functools.wraps(original)
    def stringify_expr(s: str, local_dict: dict, global_dict: dict, transformations: tuple) -> str:
        code = original(s, local_dict, global_dict, transformations)
        check_arithmetic(code, local_dict)
        return code

    sympy_parser.stringify_expr = stringify_expr
    _must_refuse("sympy's parse_expr", sympy_parser.parse_expr)


def guard_reasoning_gym() -> None:
    """The same for `eval` in every module of reasoning-gym that is loaded; `exec` is taken away.

    Raises:
        RuntimeError: this version evaluates answers in another way.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym":
            module.eval, module.exec = evaluate, _no_exec
    countdown = sys.modules["reasoning_gym.games.countdown"]
    countdown.parse_expr = _plain(countdown.parse_expr)
    _must_refuse("reasoning-gym's eval", countdown.eval)
    _must_refuse("reasoning-gym's countdown", countdown.parse_expr)


def _plain(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for what the question of countdown asks for: numbers, + - * / and brackets.

    Its scorer counts the numbers that are written, and pi/pi, 4! or 7//2 would make others out of nothing.
    """

    @functools.wraps(parse)
    def checked(text: str) -> Any:
        if not re.fullmatch(r"[0-9+\-*/() \t\n]*", text) or re.search(r"\*\s*\*|/\s*/", text):
            raise SyntaxError(f"{text!r} is not made of numbers, + - * / and brackets")
        return parse(text)

    return checked


def _no_exec(*arguments: Any) -> None:
    raise SyntaxError("exec is not there")


def _must_refuse(what: str, evaluate: Callable[[str], Any]) -> None:
    """Raises unless `evaluate` refuses code: another version of the library may call `eval` elsewhere."""
    try:
        evaluate("__import__('math').tau")
    except SyntaxError:
        return
    raise RuntimeError(f"{what} evaluates code in spite of the guard: this version of the library is not supported")
