"""Countdown: "use 3 5 8 make 23: " -> "#3*5+8". Every number exactly once; + - * / and brackets; any exact rationals.

A question has many right answers, which makes the policy's diversity visible: solutions are drawn from all of them.
"""

import ast
import operator
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

from entcov.rl.tasks.base import MARK, GeneratedTask, answer_after_mark, check_int, register
from entcov.rl.types import Example

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_MAX_EXPRESSION = 200  # characters; far beyond any right answer, and it bounds the checker's work
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


class Question(NamedTuple):
    numbers: tuple[int, ...]
    target: int


class _Term(NamedTuple):
    text: str
    precedence: int  # of the outermost operator; 3: a bare number
    value: Fraction


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Value of an arithmetic expression, exactly, and the numbers it uses in order of appearance.

    Grammar: digits, the binary operators + - * / with the usual precedence (left to right), brackets, spaces. None for
    anything else, a division by zero included. Python's parser reads it, and `eval` is not called.
    """
    compact = expression.replace(" ", "")
    tokens = _TOKEN.findall(compact)
    if not tokens or len(compact) > _MAX_EXPRESSION or "".join(tokens) != compact:
        return None
    numbers = [int(token) for token in tokens if token.isdigit()]
    plain = "".join(str(int(token)) if token.isdigit() else token for token in tokens)  # Python refuses leading zeros
    try:
        return _value(ast.parse(plain, mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError, KeyError):
        return None


def _value(node: ast.expr) -> Fraction:
    """Raises KeyError for what the grammar does not have."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise KeyError(type(node))
    return _APPLY[_SIGNS[type(node.op)]](_value(node.left), _value(node.right))


def _combine(sign: str, left: _Term, right: _Term) -> _Term:
    """Joins two terms and writes only the brackets that the value needs."""
    precedence = _PRECEDENCE[sign]
    left_text = left.text if left.precedence >= precedence else f"({left.text})"
    keeps = right.precedence > precedence or (right.precedence == precedence and sign in "+*")
    right_text = right.text if keeps else f"({right.text})"
    return _Term(left_text + sign + right_text, precedence, _APPLY[sign](left.value, right.value))


def all_solutions(numbers: tuple[int, ...], target: int) -> list[str]:
    """Every expression that uses each number once and makes the target, sorted; minimal brackets, no repeats.

    Negative intermediate values do not appear (the same answer can be written without), fractions do.
    """
    found: set[str] = set()
    visited: set[frozenset[tuple[str, int]]] = set()

    def search(terms: list[_Term]) -> None:
        if len(terms) == 1:
            if terms[0].value == target:
                found.add(terms[0].text)
            return
        texts = [term.text for term in terms]
        state = frozenset((text, texts.count(text)) for text in texts)
        if state in visited:
            return
        visited.add(state)
        for i, left in enumerate(terms):
            for j, right in enumerate(terms):
                if i == j:
                    continue
                rest = [term for k, term in enumerate(terms) if k != i and k != j]
                for sign in "+-*/":
                    if (sign == "/" and right.value == 0) or (sign == "-" and left.value < right.value):
                        continue
                    search([*rest, _combine(sign, left, right)])

    search([_Term(str(number), 3, Fraction(number)) for number in numbers])
    return sorted(found)


@register
@dataclass(frozen=True, kw_only=True)
class Countdown(GeneratedTask[Question]):
    """Make a target from the given numbers. Reward: the expression after the last "#" uses each once and is exact.

    Args:
        numbers: how many numbers, 2 to 4.
        max_number: largest of them, 2 to 99.
        max_target: targets are integers in [1, max_target], at most 9999. Each has at least one solution.
    """

    name: ClassVar[str] = "countdown"
    numbers: int = 3
    max_number: int = 9
    max_target: int = 99

    def __post_init__(self) -> None:
        check_int(self, "numbers", 2, 4)
        check_int(self, "max_number", 2, 99)
        check_int(self, "max_target", 1, 9999)
        super().__post_init__()

    def draw(self, rng: random.Random) -> Question:
        while True:  # (1, 1) alone makes a target within the smallest setting, so this ends
            numbers = tuple(rng.randint(1, self.max_number) for _ in range(self.numbers))
            terms = [_Term(str(number), 3, Fraction(number)) for number in numbers]
            while len(terms) > 1:
                rng.shuffle(terms)
                left, right, sign = terms.pop(), terms.pop(), rng.choice("+-*/")
                if sign == "-" and left.value < right.value:
                    left, right = right, left
                if sign == "/" and (right.value == 0 or (left.value / right.value).denominator != 1):
                    sign = "*"  # answers may have fractions in between; drawn questions have none
                terms.append(_combine(sign, left, right))
            value = terms[0].value
            if 1 <= value <= self.max_target:
                return Question(numbers, int(value))

    def key(self, question: Question) -> str:
        return f"{' '.join(map(str, sorted(question.numbers)))} make {question.target}"

    def prompt(self, question: Question) -> str:
        return f"use {' '.join(map(str, question.numbers))} make {question.target}: "

    def answer(self, question: Question) -> str:
        return f"{' '.join(map(str, question.numbers))} make {question.target}"

    def solve(self, question: Question, rng: random.Random) -> str:
        return MARK + rng.choice(all_solutions(question.numbers, question.target))

    @staticmethod
    def score(example: Example, response: str) -> float:
        numbers_text, separator, target_text = example.ground_truth.partition(" make ")
        numbers = numbers_text.split()
        if not separator or not all(re.fullmatch(r"[0-9]{1,9}", text) for text in [*numbers, target_text]):
            raise ValueError(f"countdown ground_truth must read 'N N N make TARGET', got {example.ground_truth!r}")
        expression = answer_after_mark(response)
        result = evaluate(expression) if expression is not None else None
        if result is None:
            return 0.0
        value, used = result
        return 1.0 if sorted(used) == sorted(map(int, numbers)) and value == int(target_text) else 0.0
