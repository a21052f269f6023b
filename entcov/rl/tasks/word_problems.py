"""Short word problems: "tom has 7 pens. ann has 2 more than tom. how many pens have they together?" -> "...#16"."""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from entcov.rl.tasks.base import GeneratedTask, check_choices, check_int, join_steps, register

_PEOPLE = (("ann", "she"), ("mia", "she"), ("eve", "she"), ("tom", "he"), ("sam", "he"), ("leo", "he"))
_THINGS = ("apples", "books", "coins", "pens", "stamps", "shells")


class Scene(NamedTuple):
    who: str
    pronoun: str
    other: str
    thing: str


class Problem(NamedTuple):
    """A template filled in: its text, the steps as (left, operator, right), the last result being the answer."""

    text: str
    steps: tuple[tuple[int, str, int], ...]


_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def _buys(s: Scene, a: int, b: int, c: int) -> Problem:
    c = min(c, a + b)
    text = f"{s.who} has {a} {s.thing}. {s.pronoun} buys {b} more and gives {c} to {s.other}. how many has {s.who} now?"
    return Problem(text, ((a, "+", b), (a + b, "-", c)))


def _boxes(s: Scene, a: int, b: int, c: int) -> Problem:
    text = f"{s.who} fills {a} boxes with {b} {s.thing} each. {c} are left over. how many {s.thing} are there?"
    return Problem(text, ((a, "*", b), (a * b, "+", c)))


def _share(s: Scene, a: int, b: int, c: int) -> Problem:
    friends = min(b, 9)
    text = (
        f"{s.who} gives {a * friends} {s.thing} to {friends} friends, all the same. "
        f"one of them is {s.other}, who had {c} before. how many has {s.other} now?"
    )
    return Problem(text, ((a * friends, "/", friends), (a, "+", c)))


def _compare(s: Scene, a: int, b: int, c: int) -> Problem:
    text = f"{s.who} has {a} {s.thing}. {s.other} has {b} more than {s.who}. how many {s.thing} have they together?"
    return Problem(text, ((a, "+", b), (a + b, "+", a)))


def _times(s: Scene, a: int, b: int, c: int) -> Problem:
    times = min(b, 9)
    text = f"{s.who} has {a} {s.thing}. {s.other} has {times} times as many. how many more has {s.other}?"
    return Problem(text, ((a, "*", times), (a * times, "-", a)))


def _change(s: Scene, a: int, b: int, c: int) -> Problem:
    text = f"{s.who} pays {a * b + c} euro for {a} {s.thing} and gets {c} back. what does each cost?"
    return Problem(text, ((a * b + c, "-", c), (a * b, "/", a)))


TEMPLATES: dict[str, Callable[[Scene, int, int, int], Problem]] = {
    "buys": _buys,
    "boxes": _boxes,
    "share": _share,
    "compare": _compare,
    "times": _times,
    "change": _change,
}


@register
@dataclass(frozen=True, kw_only=True)
class WordProblems(GeneratedTask[Problem]):
    """Two-step word problems in plain lower-case text. Reward: the text after the last "#" is the number asked for.

    Args:
        max_number: largest number drawn, 3 to 999; the smallest is 2. Products of two appear in some texts.
        templates: which kinds to draw from with equal chance: buys, boxes, share, compare, times, change.
    """

    name: ClassVar[str] = "word_problems"
    max_number: int = 20
    templates: tuple[str, ...] = tuple(TEMPLATES)

    def __post_init__(self) -> None:
        check_int(self, "max_number", 3, 999)
        check_choices(self, "templates", tuple(TEMPLATES))
        super().__post_init__()

    def draw(self, rng: random.Random) -> Problem:
        (who, pronoun), (other, _) = rng.sample(_PEOPLE, 2)
        scene = Scene(who, pronoun, other, rng.choice(_THINGS))
        return TEMPLATES[rng.choice(self.templates)](scene, *(rng.randint(2, self.max_number) for _ in range(3)))

    def key(self, question: Problem) -> str:
        return repr(question.steps)  # the same sums with other names and things are the same question

    def prompt(self, question: Problem) -> str:
        return question.text + "\n"

    def answer(self, question: Problem) -> str:
        left, sign, right = question.steps[-1]
        return str(_OPERATIONS[sign](left, right))

    def solve(self, question: Problem, rng: random.Random) -> str:
        """Each step as an equation, with the operands of + and * in free order; or one step within the next."""
        (a, first, b), (_, second, c) = question.steps
        inner = self._written(rng, str(a), first, str(b))
        middle = _OPERATIONS[first](a, b)
        if rng.random() < 0.5:
            outer = self._written(rng, str(middle), second, str(c))
            return join_steps(rng, [f"{inner}={middle}", f"{outer}={self.answer(question)}"], self.answer(question))
        outer = self._written(rng, inner if first in "*/" else f"({inner})", second, str(c))
        return join_steps(rng, [f"{outer}={self.answer(question)}"], self.answer(question))

    @staticmethod
    def _written(rng: random.Random, left: str, sign: str, right: str) -> str:
        if sign in "+*" and rng.random() < 0.5:
            left, right = right, left
        return f"{left}{sign}{right}"
