"""Tests that are Python statements, judged without the program: `assert f(2) == 4` in this process, f(2) in a sandbox.

A test is one of two statements:

    assert EXPRESSION                 with or without a message
    with pytest.raises(ERROR): CALL   ERROR is a name or a tuple of names

The calls of functions that the program must define, all that are not built in, are found first, with their arguments,
which may not depend on other such calls. When a sandbox has made the calls, the expression is evaluated here with their
results, by an interpreter of plain values: no attribute but those of `_METHODS` and `math`, and a bound on the size of
every result, because a program chooses the numbers that come in. A test beyond that is refused when it is read.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Sequence
from typing import Any

from entcov.rl.sandbox import Call, Outcome

_TYPES = {cls.__name__: cls for cls in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)}
_FUNCTIONS = {
    f.__name__: f
    for f in (
        *(abs, all, any, chr, divmod, enumerate, isinstance, len, max, min, ord, repr, reversed, round, sorted, sum),
        zip,
    )
}
_CONVERSIONS = {name: cls for name, cls in _TYPES.items() if name not in ("bytes", "complex")}  # bytes(n) has n bytes
_METHODS = {
    *("capitalize", "count", "endswith", "get", "index", "isalpha", "isdigit", "islower", "issubset", "isupper"),
    *("items", "join", "keys", "lower", "lstrip", "rstrip", "split", "splitlines", "startswith", "strip", "title"),
    *("upper", "values"),
}
_MATH = {
    *("ceil", "cos", "e", "exp", "fabs", "floor", "inf", "isclose", "isfinite", "isinf", "isnan", "log", "nan", "pi"),
    *("radians", "sin", "sqrt", "tan", "tau"),
}
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip
_UNARY = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}
_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_LARGEST = 1_000_000  # entries of a sequence that a test makes, and bits of an integer
_MOST_STEPS = 300_000  # of evaluating one test, about half a second


_NOT_EVALUATED = (*(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError),)


class Assertion:
    """One test.

    Attributes:
        calls: what the sandbox is asked for, in order.

    Raises:
        ValueError: the text is no such test, or calls nothing of the program. The message says what and why.
    """

    def __init__(self, text: str) -> None:
        self._expression, self._raises, found = _parsed(text)
        self._places = {id(node): place for place, node in enumerate(found)}
        try:
            self.calls = [_call(node) for node in found]
        except _NOT_EVALUATED as error:
            raise ValueError(f"the arguments of a call in {_shown(text)} cannot be worked out here: {error}") from None
        if not self.calls:
            raise ValueError(f"a test must call a function of the program, {_shown(text)} calls none")

    def holds(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether the test passes, given what each of `calls` led to."""
        if self._raises:
            return any(name in outcomes[0].raised for name in self._raises)
        if any(outcome.raised for outcome in outcomes):
            return False
        known = {node: outcomes[place].value for node, place in self._places.items()}
        try:
            return bool(_Evaluation(known).of(self._expression, {}))
        except _NOT_EVALUATED:  # the value is of another kind than the test expects
            return False


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _parsed(text: str) -> tuple[ast.expr, tuple[str, ...], list[ast.Call]]:
    """The expression (of pytest.raises: the call), the errors expected, and the calls of the program's functions."""
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_shown(text)} is no Python: {error}") from None
    match body:
        case [ast.Assert(expression)]:
            raises: tuple[str, ...] = ()
        case [
            ast.With(
                [ast.withitem(ast.Call(ast.Attribute(ast.Name("pytest"), "raises"), [errors], []), None)],
                [ast.Expr(ast.Call() as expression)],
            )
        ]:
            names = errors.elts if isinstance(errors, ast.Tuple) else [errors]
            if not names or not all(isinstance(name, ast.Name) for name in names):
                raise ValueError(f"pytest.raises takes names of exceptions, got {_shown(text)}")
            raises = tuple(name.id for name in names)
        case _:
            raise ValueError(f"a test must be one assert, or one call under pytest.raises, got {_shown(text)}")
    calls = [node for node in ast.walk(expression) if isinstance(node, ast.Call) and _of_program(node)]
    if raises and calls != [expression]:
        raise ValueError(f"pytest.raises must hold one call of the program's function, got {_shown(text)}")
    inner = {id(below) for call in calls for below in ast.walk(call) if below is not call}
    if any(id(call) in inner for call in calls):
        raise ValueError(f"a call whose arguments need another call cannot be made: {_shown(text)}")
    if not raises:
        _check(expression, {id(call) for call in calls}, frozenset(), text)
    return expression, raises, calls


def _of_program(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and not hasattr(builtins, call.func.id)


_NODES = (
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.Subscript, ast.Slice),
)


def _check(node: ast.expr, calls: set[int], bound: frozenset[str], text: str) -> None:
    """Raises ValueError where the evaluation would meet what it does not know."""
    inside: list[ast.expr] = []
    match node:
        case _ if id(node) in calls:
            pass
        case ast.Name(name) if name in bound or name in _TYPES:
            pass
        case ast.Attribute(ast.Name("math"), name) if name in _MATH:
            pass
        case ast.Call(function, arguments, keywords):
            match function:
                case ast.Name(name) if name in _FUNCTIONS or name in _CONVERSIONS or name in ("range", "type"):
                    pass
                case ast.Attribute(ast.Name("math"), name) if name in _MATH:
                    pass
                case ast.Attribute(value, name) if name in _METHODS:
                    inside.append(value)
                case _:
                    raise ValueError(f"{ast.unparse(function)} is not called in a test: {_shown(text)}")
            inside += [*arguments, *(keyword.value for keyword in keywords)]
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            for generator in node.generators:
                _check(generator.iter, calls, bound, text)
                if not isinstance(generator.target, ast.Name):
                    raise ValueError(f"for {ast.unparse(generator.target)} is not evaluated in a test: {_shown(text)}")
                bound |= {generator.target.id}
                inside += generator.ifs
            inside.append(node.elt)
        case ast.Compare(_, ops, rights) if any(
            isinstance(op, (ast.Is, ast.IsNot)) and not _is_unique(right) for op, right in zip(ops, rights, strict=True)
        ):  # what a program returns comes as a copy
            raise ValueError(f"is must be followed by None, True, False or a type in a test: {_shown(text)}")
        case _ if isinstance(node, _NODES):
            inside += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        case _:
            raise ValueError(f"{ast.unparse(node)} is not evaluated in a test: {_shown(text)}")
    for child in inside:
        _check(child, calls, bound, text)


def _is_unique(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None or isinstance(node.value, bool)
    return isinstance(node, ast.Name) and node.id in _TYPES


def _call(node: ast.Call) -> Call:
    """Raises what an evaluation raises where an argument is no plain value by itself."""
    evaluation = _Evaluation({})
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("** is not evaluated")
    arguments = [evaluation.of(argument, {}) for argument in node.args]
    return Call(node.func.id, arguments, {k.arg: evaluation.of(k.value, {}) for k in node.keywords})


class _Evaluation:
    """Evaluates expressions of plain values. Raises one of `_NOT_EVALUATED` where it cannot."""

    def __init__(self, known: dict[int, Any]) -> None:
        self.known = known
        self.steps = 0

    def of(self, node: ast.expr, names: dict[str, Any]) -> Any:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise ValueError(f"a test may take {_MOST_STEPS} steps")
        if id(node) in self.known:
            return self.known[id(node)]
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return names[name] if name in names else _TYPES[name]
            case ast.List(entries):
                return [self.of(entry, names) for entry in entries]
            case ast.Tuple(entries):
                return tuple(self.of(entry, names) for entry in entries)
            case ast.Set(entries):
                return {self.of(entry, names) for entry in entries}
            case ast.Dict(keys, values) if None not in keys:
                pairs = zip(keys, values, strict=True)
                return {self.of(key, names): self.of(value, names) for key, value in pairs}
            case ast.UnaryOp(op, operand):
                return _UNARY[type(op)](self.of(operand, names))
            case ast.BinOp(left, op, right):
                return _bounded(type(op), self.of(left, names), self.of(right, names))
            case ast.BoolOp(op, entries):
                value = None
                for entry in entries:
                    value = self.of(entry, names)
                    if bool(value) is isinstance(op, ast.Or):
                        break
                return value
            case ast.Compare(left, ops, rights):
                left = self.of(left, names)
                for op, right in zip(ops, rights, strict=True):
                    right = self.of(right, names)
                    if not _COMPARE[type(op)](left, right):
                        return False
                    left = right
                return True
            case ast.IfExp(test, body, other):
                return self.of(body if self.of(test, names) else other, names)
            case ast.Slice(lower, upper, step):
                return slice(*(None if bound is None else self.of(bound, names) for bound in (lower, upper, step)))
            case ast.Subscript(value, index):
                return self.of(value, names)[self.of(index, names)]
            case ast.Attribute(ast.Name("math"), name) if name in _MATH:
                return getattr(math, name)
            case ast.Call(function, arguments, keywords):
                arguments = [self.of(argument, names) for argument in arguments]
                named = {keyword.arg: self.of(keyword.value, names) for keyword in keywords}
                return self._function(function, names)(*arguments, **named)
            case ast.ListComp(element, generators):
                return list(self._each(element, generators, names))
            case ast.SetComp(element, generators):
                return set(self._each(element, generators, names))
            case ast.GeneratorExp(element, generators):
                return iter(list(self._each(element, generators, names)))
        raise ValueError(f"{ast.unparse(node)} is not evaluated")

    def _each(self, element: ast.expr, generators: list[ast.comprehension], names: dict[str, Any]):
        first, *rest = generators
        for value in self.of(first.iter, names):
            inner = {**names, first.target.id: value}
            if all(self.of(test, inner) for test in first.ifs):
                if rest:
                    yield from self._each(element, rest, inner)
                else:
                    yield self.of(element, inner)

    def _function(self, function: ast.expr, names: dict[str, Any]) -> Any:
        match function:
            case ast.Name("range"):
                return _range
            case ast.Name("type"):
                return lambda value: type(value)
            case ast.Name(name) if name in _CONVERSIONS:
                return _CONVERSIONS[name]
            case ast.Name(name):
                return _FUNCTIONS[name]
            case ast.Attribute(ast.Name("math"), name) if name in _MATH:
                return getattr(math, name)
            case ast.Attribute(value, name) if name in _METHODS:
                return getattr(self.of(value, names), name)
        raise ValueError(f"{ast.unparse(function)} is not evaluated")


def _range(*arguments: int) -> range:
    if len(made := range(*arguments)) > _LARGEST:
        raise ValueError(f"range of {len(made)} entries, at most {_LARGEST} are made")
    return made


def _bounded(op: type, left: Any, right: Any) -> Any:
    """left op right, where the result cannot be larger than `_LARGEST`."""
    size = 0
    if op is ast.Mult:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int):
                size = len(other) * one if hasattr(other, "__len__") else one.bit_length() + _bits(other)
    elif op is ast.Pow and isinstance(left, int) and isinstance(right, int):
        size = left.bit_length() * right
    elif op is ast.Mod and isinstance(left, (str, bytes)):
        raise ValueError("text % values is not evaluated")
    if size > _LARGEST:
        raise ValueError(f"a result of size {size}, at most {_LARGEST} is made")
    return _BINARY[op](left, right)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0
