"""Modular arithmetic: "(13*7+5) mod 11=" -> "13*7=91 91+5=96 96 mod 11=8#8"."""

import random
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from entcov.rl.tasks.base import GeneratedTask, check_int, join_steps, register


class Question(NamedTuple):
    a: int
    b: int
    c: int  # negative: subtracted
    modulus: int


@register
@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(GeneratedTask[Question]):
    """The remainder of a*b+c or a*b-c. Reward: the text after the last "#" is the remainder in [0, modulus).

    Solutions reduce at the end or after every step, at random. The value before the reduction is never negative.

    Args:
        max_operand: largest a, b and c, 3 to 999; the smallest is 1.
        max_modulus: largest modulus, 2 to 999; the smallest is 2.
    """

    name: ClassVar[str] = "modular_arithmetic"
    max_operand: int = 20
    max_modulus: int = 12

    def __post_init__(self) -> None:
        check_int(self, "max_operand", 3, 999)
        check_int(self, "max_modulus", 2, 999)
        super().__post_init__()

    def draw(self, rng: random.Random) -> Question:
        a, b, c = (rng.randint(1, self.max_operand) for _ in range(3))
        if rng.random() < 0.5 and c <= a * b:
            c = -c
        return Question(a, b, c, rng.randint(2, self.max_modulus))

    def key(self, question: Question) -> str:
        a, b, c, modulus = question
        return f"{min(a, b)}*{max(a, b)}{c:+d} mod {modulus}"

    def prompt(self, question: Question) -> str:
        return f"({question.a}*{question.b}{question.c:+d}) mod {question.modulus}="

    def answer(self, question: Question) -> str:
        return str((question.a * question.b + question.c) % question.modulus)

    def solve(self, question: Question, rng: random.Random) -> str:
        steps = self._reduce_last(question, rng) if rng.random() < 0.5 else self._reduce_always(question, rng)
        return join_steps(rng, steps, self.answer(question))

    def _reduce_last(self, question: Question, rng: random.Random) -> list[str]:
        a, b, c, modulus = question
        left, right = rng.sample((a, b), 2)
        value = a * b + c
        return [f"{left}*{right}={a * b}", f"{a * b}{c:+d}={value}", f"{value} mod {modulus}={value % modulus}"]

    def _reduce_always(self, question: Question, rng: random.Random) -> list[str]:
        a, b, c, modulus = question
        steps = [f"{value} mod {modulus}={value % modulus}" for value in rng.sample((a, b), 2) if value >= modulus]
        left, right = rng.sample((a % modulus, b % modulus), 2)
        product = left * right
        steps.append(f"{left}*{right}={product}")
        if product >= modulus:
            steps.append(f"{product} mod {modulus}={product % modulus}")
        product %= modulus
        value = product + c
        steps.append(f"{product}{c:+d}={value}")
        if not 0 <= value < modulus:
            steps.append(f"{value} mod {modulus}={value % modulus}")
        return steps
