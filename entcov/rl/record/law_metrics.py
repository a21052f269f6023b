"""The law's metrics of a run while it goes on: law/a, law/b, law/ceiling, law/entropy_left, law/gone_step."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from entcov.law import coefficients, entropy_lasts, has_spread

ENTROPY, REWARD = "actor/entropy_response_mean", "critic/score/mean"
_FIRST = 20  # points: with fewer the numbers change from step to step


class LawMetrics:
    """Fits the law to the steps of a run so far: H and the mean score of each step's rollouts, both of one policy.

    Two floats a step are kept, and a step costs one pass over them. `law/gone_step` is absent where entropy does not
    fall. Intervals, forecasts and held-out numbers: `python -m entcov fit-law`.

    Args:
        rows: of a run that goes on, as `read_metrics` gives them.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._points: list[tuple[float, float, float]] = []
        for row in rows:
            self._take(row["step"], row)

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Takes the step's metrics in; returns the law's, none before the 20th step."""
        if not self._take(step, metrics) or len(self._points) < _FIRST:
            return {}
        at, entropy, reward = np.array(self._points).T
        if not has_spread(entropy):
            return {}
        a, b = coefficients(entropy, reward)
        found = {"law/a": a, "law/b": b, "law/ceiling": b - a}
        if np.median(entropy[:5]) > 0:
            lasts = entropy_lasts(at, entropy)
            found["law/entropy_left"] = lasts.left
            if lasts.step is not None:
                found["law/gone_step"] = lasts.step
        return found

    def _take(self, step: float, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics are those of a step of training."""
        point = (step, metrics.get(ENTROPY, math.nan), metrics.get(REWARD, math.nan))
        if not all(map(math.isfinite, point)):
            return False
        if not self._points or step > self._points[-1][0]:  # a step may be recorded twice where its line failed
            self._points.append(point)
        return True
