"""Sentences and cells that follow an interval."""

from __future__ import annotations

import math

from entcov.report.compare import Estimate


def shown(estimate: Estimate, digits: int, *, sign: str = "") -> str:
    """Mean ± half width of the interval, if there is one."""
    text = f"{estimate.mean:{sign}.{digits}f}"
    return text if math.isnan(estimate.half_width) else f"{text} ± {estimate.half_width:.{digits}f}"


def verdict(estimate: Estimate, more: str, less: str, neither: str) -> str:
    """`more` or `less` where the interval lies on one side of 0; `neither` where it does not, or with one seed."""
    if not estimate.excludes_zero:
        return neither
    return more if estimate.mean > 0 else less
