"""Which of carry_arithmetic's styles of working a response is written in, and a reward that counts them.

The style is told from the form of the response alone: a step with a wrong sum is still a step of its style.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from entcov.rl.tasks.base import MARK, TASKS
from entcov.rl.tasks.carry_arithmetic import STYLES
from entcov.rl.types import Example

SEVERAL, OTHER = "several", "other"
KINDS = (*STYLES, SEVERAL, OTHER)
SHARE, RIGHT_SHARE = "share", "right"
_SUM = re.compile(r"\d+(\+\d+)*=\d+")
_CARRY = re.compile(r"\d(\+\d)*=\dc\d")
_ROUND = re.compile(r"[1-9]0*")
Step = tuple[list[str], str]  # operands and result of "7+5=12"


def style_of(terms: Sequence[int], response: str) -> str:
    """The style of a response to the sum of `terms`, one of KINDS.

    several: the form is that of more than one style, as "7+5=12#12" for 7+5, which columns, places and adds all give.
    other: of none, or without an answer.
    """
    working, mark, _ = response.rpartition(MARK)
    if not mark:
        return OTHER
    if not working:
        return "direct"  # adds gives the same where there is nothing but zeros to add
    steps = re.split("[ ,\n]", working)
    places = max(len(str(term)) for term in terms)
    if len(steps) in (places, places + 1) and all(re.fullmatch(r"\d", step) for step in steps):
        return "digits"
    counts = [sum(len(str(term)) > place for term in terms) for place in range(places)]  # digits of each column
    if len(steps) == places and all(map(_CARRY.fullmatch, steps)):
        return "carries" if [step.count("+") + 1 for step in steps] == counts else OTHER
    if not all(map(_SUM.fullmatch, steps)):
        return OTHER
    sums = [(left.split("+"), right) for left, right in (step.split("=") for step in steps)]
    fitting = [name for name, fits in _FORMS.items() if fits(terms, counts, sums)]
    return fitting[0] if len(fitting) == 1 else SEVERAL if fitting else OTHER


def _columns(terms: Sequence[int], counts: Sequence[int], sums: Sequence[Step]) -> bool:
    """One sum of digits for each column, but for the ones with one more operand where there is a carry."""
    return len(sums) == len(counts) and all(
        max(map(len, operands)) == 1 and len(operands) - count in ((0, 1) if place else (0,))
        for place, ((operands, _), count) in enumerate(zip(sums, counts, strict=True))
    )


def _places(terms: Sequence[int], counts: Sequence[int], sums: Sequence[Step]) -> bool:
    """One sum for each place, of round numbers, rising or falling, then sums of two for the running total."""
    own, rest = sums[: len(counts)], sums[len(counts) :]

    def of_place(operands: Sequence[str], place: int) -> bool:
        return len(operands) == counts[place] and all(
            value == "0" or (len(value) == place + 1 and not int(value[1:] or 0)) for value in operands
        )

    return (
        len(sums) == 2 * len(counts) - 1
        and any(
            all(of_place(operands, place) for place, (operands, _) in zip(order, own, strict=True))
            for order in (range(len(counts)), reversed(range(len(counts))))
        )
        and all(len(operands) == 2 for operands, _ in rest)
    )


def _adds(terms: Sequence[int], counts: Sequence[int], sums: Sequence[Step]) -> bool:
    """Sums of a number and a round one; the first begins with a term, each further one with the result before it."""
    if any(len(operands) != 2 or not _ROUND.fullmatch(operands[1]) for operands, _ in sums):
        return False
    begins = [operands[0] for operands, _ in sums]
    return begins[0] in map(str, terms) and begins[1:] == [result for _, result in sums[:-1]]


_FORMS: dict[str, Callable[[Sequence[int], Sequence[int], Sequence[Step]], bool]] = {
    "columns": _columns,
    "places": _places,
    "adds": _adds,
}


def score(example: Example, response: str) -> dict[str, float]:
    """The task's reward in components, whose means over a step's responses are the shares of the styles.

    right/STYLE is the reward where the response has that style, else 0. share/STYLE is 1 where it has, else 0.
    share/all is -1, so that the shares add nothing to the sum of the components, which is the reward.
    """
    terms = [int(term) for term in example.prompt[-1]["content"].removesuffix("=").split("+")]
    style, reward = style_of(terms, response), TASKS["carry_arithmetic"].score(example, response)
    found = {f"{SHARE}/all": -1.0}
    for kind in KINDS:
        found[f"{SHARE}/{kind}"] = float(kind == style)
        found[f"{RIGHT_SHARE}/{kind}"] = reward if kind == style else 0.0
    return found
