"""Sentences and cells that follow an interval."""

from __future__ import annotations

import math

from entcov.report.compare import Estimate


def shown(estimate: Estimate, digits: int, *, sign: str = "", star: bool = False) -> str:
    """Mean ± half width, with `star` a * where the interval has no 0 in it."""
    text = f"{estimate.mean:{sign}.{digits}f}"
    if not math.isnan(estimate.half_width):
        text += f" ± {estimate.half_width:.{digits}f}"
    return f"{text} *" if star and estimate.excludes_zero else text


def verdict(estimate: Estimate, more: str, less: str, neither: str) -> str:
    """`more` or `less` where the interval lies on one side of 0; `neither` where it does not, or with one seed."""
    if not estimate.excludes_zero:
        return neither
    return more if estimate.mean > 0 else less
