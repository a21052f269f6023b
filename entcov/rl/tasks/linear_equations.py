"""Linear equations: "3x+5=20, x=" -> "3x=15,x=15/3#5"."""

import random
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from entcov.rl.tasks.base import GeneratedTask, check_int, join_steps, register


class Question(NamedTuple):
    a: int  # coefficient of x, >= 2
    b: int  # constant beside it, not 0
    x: int
    form: str  # how the equation is written; questions that differ in it alone are the same

    @property
    def total(self) -> int:
        return self.a * self.x + self.b


FORMS = ("ax+b=c", "b+ax=c", "c=ax+b", "c=b+ax")


@register
@dataclass(frozen=True, kw_only=True)
class LinearEquations(GeneratedTask[Question]):
    """Solve a*x + b = c with an integer solution. Reward: the text after the last "#" is x.

    Solutions subtract first or, where a divides b, may divide first; writing the subtraction out, and a check at the
    end, come and go at random.

    Args:
        max_coefficient: a lies in [2, max_coefficient], at most 99.
        max_constant: b lies in [-max_constant, max_constant] without 0, at most 999.
        max_solution: x lies in [-max_solution, max_solution], at most 999.
    """

    name: ClassVar[str] = "linear_equations"
    max_coefficient: int = 9
    max_constant: int = 20
    max_solution: int = 12

    def __post_init__(self) -> None:
        check_int(self, "max_coefficient", 2, 99)
        check_int(self, "max_constant", 1, 999)
        check_int(self, "max_solution", 1, 999)
        super().__post_init__()

    def draw(self, rng: random.Random) -> Question:
        b = rng.choice((-1, 1)) * rng.randint(1, self.max_constant)
        x = rng.randint(-self.max_solution, self.max_solution)
        return Question(rng.randint(2, self.max_coefficient), b, x, rng.choice(FORMS))

    def key(self, question: Question) -> str:
        return f"{question.a}x{question.b:+d}={question.total}"

    def prompt(self, question: Question) -> str:
        a, b = question.a, question.b
        side = f"{a}x{b:+d}" if question.form in ("ax+b=c", "c=ax+b") else f"{b}+{a}x"
        both = f"{question.total}={side}" if question.form.startswith("c=") else f"{side}={question.total}"
        return f"{both}, x="

    def answer(self, question: Question) -> str:
        return str(question.x)

    def solve(self, question: Question, rng: random.Random) -> str:
        a, b, x, _ = question
        if b % a == 0 and rng.random() < 0.5:
            steps = [f"x{b // a:+d}={question.total // a}", f"x={question.total // a}{-b // a:+d}"]
        else:
            written_out = [f"{a}x={question.total}{-b:+d}"] if rng.random() < 0.5 else []
            steps = [*written_out, f"{a}x={a * x}", f"x={a * x}/{a}"]
        if rng.random() < 0.3:
            steps.append(f"{a}*{x}{b:+d}={question.total}" if x >= 0 else f"{a}*({x}){b:+d}={question.total}")
        return join_steps(rng, steps, self.answer(question))
