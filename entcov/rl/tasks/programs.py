"""Programs from examples: "f(0)=4 f(1)=7 f(2)=10 f(60)=184: " -> "#def f(x): return 3*x+4", run in a sandbox.

Many programs are right: operands in any order, a lambda, a local variable. A policy warm-started on them has entropy
that does not touch the reward, beside that of what it has to work out, the shape and the constants.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from entcov.rl.rewards.code import parse_tests, passes
from entcov.rl.sandbox import IsolationError, isolation
from entcov.rl.tasks.base import MARK, GeneratedTask, answer_after_mark, check_choices, check_int, register
from entcov.rl.types import Example

SHOWN = (0, 1, 2, 60)  # they tell every function of a setting from every other one, 60 for the divisors up to 7
TESTED = (*SHOWN, 3, 25, 100, -7)


class Question(NamedTuple):
    shape: str
    a: int
    b: int


def _product(rng: random.Random, *factors: object) -> str:
    return "*".join(map(str, rng.sample(factors, len(factors))))


# shape -> its value for (x, a) before b is added, and its text, in one of the ways to write it
SHAPES: dict[str, tuple[Callable[[int, int], int], Callable[[random.Random, int], str]]] = {
    "line": (lambda x, a: a * x, lambda rng, a: _product(rng, a, "x")),
    "square": (lambda x, a: a * x * x, lambda rng, a: _product(rng, a, "x", "x")),
    "quotient": (lambda x, a: x // a, lambda rng, a: f"x//{a}"),
    "distance": (lambda x, a: abs(x - a), lambda rng, a: f"abs({rng.choice((f'x-{a}', f'{a}-x'))})"),
    "maximum": (lambda x, a: max(x, a), lambda rng, a: f"max({rng.choice((f'x,{a}', f'{a},x'))})"),
}


@register
@dataclass(frozen=True, kw_only=True)
class Programs(GeneratedTask[Question]):
    """A function of one integer, from four of its values. Reward: the program after the last "#" defines f, and f is
    right for those four arguments and four others, run in a sandbox as `rewards.code` does.

    Args:
        max_coefficient: largest a of a*x, a*x*x, x//a, abs(x-a) and max(x,a), 3 to 7; the smallest is 2.
        max_constant: largest absolute value of what is added, 1 to 99.
        shapes: which functions to draw from with equal chance: line, square, quotient, distance, maximum.

    Raises:
        IsolationError: this system lacks what confines a program.
    """

    name: ClassVar[str] = "programs"
    ability: ClassVar[str] = "code"
    max_coefficient: int = 5
    max_constant: int = 9
    shapes: tuple[str, ...] = tuple(SHAPES)

    def __post_init__(self) -> None:
        check_int(self, "max_coefficient", 3, 7)
        check_int(self, "max_constant", 1, 99)
        check_choices(self, "shapes", tuple(SHAPES))
        super().__post_init__()
        if lacking := isolation.missing():
            raise IsolationError("programs", lacking)

    def draw(self, rng: random.Random) -> Question:
        shape = rng.choice(self.shapes)
        return Question(shape, rng.randint(2, self.max_coefficient), rng.randint(-self.max_constant, self.max_constant))

    def key(self, question: Question) -> str:
        return " ".join(map(str, question))

    def prompt(self, question: Question) -> str:
        return " ".join(f"f({x})={value_of(question, x)}" for x in SHOWN) + ": "

    def answer(self, question: Question) -> str:
        outputs = [value_of(question, x) for x in TESTED]
        return json.dumps({"fn_name": "f", "inputs": [[x] for x in TESTED], "outputs": outputs})

    def solve(self, question: Question, rng: random.Random) -> str:
        core, b = SHAPES[question.shape][1](rng, question.a), question.b
        style = rng.choice(("return", "lambda", "variable"))
        if style == "variable":
            return f"{MARK}def f(x):\n y={core}\n return {_sum(rng, 'y', b)}"
        return MARK + {"return": "def f(x): return ", "lambda": "f=lambda x: "}[style] + _sum(rng, core, b)

    @staticmethod
    def score(example: Example, response: str) -> float:
        program = answer_after_mark(response)
        return float(program is not None and passes(program, parse_tests(example.ground_truth)))


def value_of(question: Question, x: int) -> int:
    return SHAPES[question.shape][0](x, question.a) + question.b


def _sum(rng: random.Random, text: str, b: int) -> str:
    if b > 0 and rng.random() < 0.5:
        return f"{b}+{text}"
    return f"{text}{b:+d}" if b else text
