"""Addition with written-out steps: "47+85=" -> "7+5=12,1+8+4=13#132".

One sum has many right responses: six styles of working, any order of operands, any separators. A policy warm-started on
them has entropy. Part of it does not change the reward (order, separators), part does: a small model makes more errors
in some styles than in others. So entropy collapse shows in this task.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from entcov.rl.tasks.base import GeneratedTask, check_choices, check_int, join_steps, register

Terms = tuple[int, ...]


def _shuffled_sum(rng: random.Random, values: list[int]) -> str:
    rng.shuffle(values)
    return "+".join(map(str, values))


def _columns_of(terms: Terms) -> list[list[int]]:
    """Digits by column, ones first; a shorter number has no digit in the columns beyond its own."""
    texts = [str(term)[::-1] for term in terms]
    return [[int(t[place]) for t in texts if place < len(t)] for place in range(max(map(len, texts)))]


def _direct(terms: Terms, rng: random.Random) -> list[str]:
    """Nothing written: every carry has to be seen at once."""
    return []


def _digits(terms: Terms, rng: random.Random) -> list[str]:
    """The sum's digits, ones first: carries go from digit to digit unwritten."""
    return list(str(sum(terms))[::-1])


def _columns(terms: Terms, rng: random.Random) -> list[str]:
    """Column sums, ones first, with the carry as one more operand: 7+5=12, 4+1+8=13."""
    steps, carry = [], 0
    for digits in _columns_of(terms):
        total = sum(digits) + carry
        steps.append(f"{_shuffled_sum(rng, digits + [carry] if carry else digits)}={total}")
        carry = total // 10
    return steps


def _carries(terms: Terms, rng: random.Random) -> list[str]:
    """Column digit and carry, ones first: 7+5=2c1, 4+8=3c1. The carry is not repeated in the next column."""
    steps, carry = [], 0
    for digits in _columns_of(terms):
        total = sum(digits) + carry
        carry = total // 10
        steps.append(f"{_shuffled_sum(rng, digits)}={total % 10}c{carry}")
    return steps


def _places(terms: Terms, rng: random.Random) -> list[str]:
    """Sums by place value in either direction, then their running total: 40+80=120, 7+5=12, 120+12=132."""
    places = [[digit * 10**place for digit in digits] for place, digits in enumerate(_columns_of(terms))]
    if rng.random() < 0.5:
        places.reverse()
    steps = [f"{_shuffled_sum(rng, values)}={sum(values)}" for values in places]
    running = sum(places[0])
    for values in places[1:]:
        total = running + sum(values)
        steps.append(f"{_shuffled_sum(rng, [running, sum(values)])}={total}")
        running = total
    return steps


def _adds(terms: Terms, rng: random.Random) -> list[str]:
    """Adds one place of a later number at a time, in either direction: 47+80=127, 127+5=132."""
    order = list(terms)
    rng.shuffle(order)
    steps, running = [], order[0]
    for term in order[1:]:
        parts = [int(digit) * 10**place for place, digit in enumerate(str(term)[::-1]) if digit != "0"]
        if rng.random() < 0.5:
            parts.reverse()
        for part in parts:
            steps.append(f"{running}+{part}={running + part}")
            running += part
    return steps


STYLES: dict[str, Callable[[Terms, random.Random], list[str]]] = {
    "direct": _direct,
    "digits": _digits,
    "columns": _columns,
    "carries": _carries,
    "places": _places,
    "adds": _adds,
}


@register
@dataclass(frozen=True, kw_only=True)
class CarryArithmetic(GeneratedTask[Terms]):
    """Sums of `terms` numbers of `min_digits` to `max_digits` digits. Reward: the text after the last "#" is the sum.

    Args:
        min_digits, max_digits: digits of each number, 1 <= min_digits <= max_digits <= 9.
        terms: numbers to add, 2 to 5.
        styles: the ways of working that solutions draw from with equal chance: direct, digits, columns, carries,
            places, adds.
    """

    name: ClassVar[str] = "carry_arithmetic"
    min_digits: int = 1
    max_digits: int = 3
    terms: int = 2
    styles: tuple[str, ...] = tuple(STYLES)

    def __post_init__(self) -> None:
        check_int(self, "max_digits", 1, 9)
        check_int(self, "min_digits", 1, self.max_digits)
        check_int(self, "terms", 2, 5)
        check_choices(self, "styles", tuple(STYLES))
        super().__post_init__()

    def draw(self, rng: random.Random) -> Terms:
        digits = (rng.randint(self.min_digits, self.max_digits) for _ in range(self.terms))
        return tuple(rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in digits)

    def key(self, question: Terms) -> str:
        return "+".join(map(str, sorted(question)))

    def prompt(self, question: Terms) -> str:
        return "+".join(map(str, question)) + "="

    def answer(self, question: Terms) -> str:
        return str(sum(question))

    def solve(self, question: Terms, rng: random.Random) -> str:
        return join_steps(rng, STYLES[rng.choice(self.styles)](question, rng), self.answer(question))
