"""Confidence intervals of a mean from few runs: Student's t, exact for every whole number of degrees of freedom."""

import math
from collections.abc import Sequence
from functools import cache


@cache
def student_t(degrees: int, level: float = 0.95) -> float:
    """The t with P(|T| < t) = level for `degrees` >= 1 degrees of freedom.

    Source: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4 (closed form of the probability),
    inverted by bisection.

    Raises:
        ValueError: degrees < 1, or level outside (0, 1).
    """
    if degrees < 1:
        raise ValueError(f"degrees must be >= 1, got {degrees}")
    if not 0 < level < 1:
        raise ValueError(f"level must be a fraction in (0, 1), got {level}")
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees)), in which the probability is smooth and bounded
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its confidence interval; the half width is NaN for a single value.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, student_t(count - 1, level) * math.sqrt(variance / count)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
