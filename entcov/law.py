"""The law of entropy and reward, R = -a exp(H) + b: its fit with intervals, its forecast, and how long entropy lasts.

Source: Cui et al., The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv 2505.22617,
eq. 6. H is the policy's entropy in nats per token, R the accuracy or mean reward. At H = 0 nothing is left to pay with:
the law's ceiling is b - a. The intervals, the forecast's interval and the rule of `entropy_lasts` are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from entcov.intervals import student_t

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MIN_POINTS = 8  # with fewer, two coefficients and the residuals' autocorrelation cannot be told apart
LEFT = 0.1  # entropy counts as gone when so much is left of exp(H) - 1, which is what the law says it can buy
_MIN_SPREAD = 1e-6  # of exp(H): below it the points say nothing about a
_MOST_AUTOCORRELATION = 0.97
_FAR = math.log(1e6)  # an end a million times as far away is no forecast
_START = 5  # points whose median is the entropy that a run begins with


@dataclass(frozen=True)
class Law:
    """R = -a exp(H) + b, fitted to `points` points. Intervals are of level `level`; see `fit_law` for what they cover.

    covariance: of the estimates (a, b), from the bootstrap.
    quantile: Student's t that the standard errors are multiplied by.
    r2: share of the (weighted) variance of R that the law explains.
    residual_sd: standard deviation of the residuals, in units of R.
    autocorrelation: of successive residuals, corrected for the bias of short series; in [0, 0.97].
    block: successive points that a block of the bootstrap has.
    entropy_range: smallest and largest H of the points, nats.
    """

    a: float
    b: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    quantile: float
    level: float
    points: int
    r2: float
    residual_sd: float
    autocorrelation: float
    block: int
    entropy_range: tuple[float, float]

    @property
    def ceiling(self) -> float:
        """b - a: what the law gives for entropy 0."""
        return self.b - self.a

    @property
    def half_width_a(self) -> float:
        return float(self._half_width(np.array([1.0, 0.0])))

    @property
    def half_width_b(self) -> float:
        return float(self._half_width(np.array([0.0, 1.0])))

    @property
    def half_width_ceiling(self) -> float:
        return float(self._half_width(np.array([-1.0, 1.0])))

    def predict(self, entropy: ArrayLike) -> np.ndarray:
        """R of the law at these entropies (nats), of the same shape."""
        return self.b - self.a * np.exp(np.asarray(entropy, dtype=float))

    def forecast(self, entropy: ArrayLike, reward: ArrayLike | None = None) -> Forecast:
        """R at entropies that the fit has not seen, such as those of the rest of a run; with `reward` also its error.

        As in the paper the entropy is known and the reward is forecast, so an error is the law's alone.

        Args:
            entropy: [M] nats, in the order of the run, M >= 1.
            reward: [M] what was measured there.

        Raises:
            ValueError: a value is not finite, an entropy is negative, or the lengths differ.
        """
        later = _series("entropy", entropy, least=0.0)
        predicted = self.predict(later)
        half = self._half_width(np.stack([-np.exp(later), np.ones_like(later)], axis=-1))
        if reward is None:
            return Forecast(predicted, half)
        error = predicted - _series("reward", reward, count=len(later))
        last = error[-max(1, round(0.1 * len(error))) :]
        return Forecast(
            predicted, half, math.sqrt(float(np.mean(error**2))), float(error.mean()), float(last.mean())
        )  # fmt: skip

    def _half_width(self, combination: np.ndarray) -> np.ndarray:
        """Of the interval of c . (a, b), for each row c of `combination`."""
        variance = np.einsum("...i,ij,...j->...", combination, np.array(self.covariance), combination)
        return self.quantile * np.sqrt(np.maximum(variance, 0.0))


@dataclass(frozen=True)
class Forecast:
    """What a law gives for entropies that it was not fitted to.

    predicted, half_width: [M] in units of R. The interval is that of the law's curve: a measured mean of few responses
        scatters around it by its own noise.
    rmse, bias, end_error: root mean square, mean, and mean over the last tenth of (predicted - measured); None where
        nothing was measured.
    """

    predicted: np.ndarray
    half_width: np.ndarray
    rmse: float | None = None
    bias: float | None = None
    end_error: float | None = None


@dataclass(frozen=True)
class EntropyLasts:
    """How much entropy is left to pay with, and how long it will last.

    left: (exp(H) - 1) / (exp(H_start) - 1), H of the fitted line at the last step.
    step: at which `left` comes down to the given share if entropy goes on falling as it does; it may lie in the past.
        None: it does not fall.
    """

    left: float
    step: float | None


def fit_law(entropy: ArrayLike, reward: ArrayLike, *, weight: ArrayLike | None = None, level: float = 0.95) -> Law:
    """Fits R = -a exp(H) + b to the points of one run: weighted least squares in exp(H).

    The intervals are those of the moving-block bootstrap of the residuals (Kuensch 1989) around the fitted curve:
    successive points of a run are no independent draws, so blocks of successive residuals are drawn, and residuals
    rather than pairs, since a resample of pairs would often lack the run's beginning, where most of the spread of
    exp(H) is. Both coefficients are linear in the residuals, so the variance over all resamples is summed exactly:
    nothing is drawn, the result depends on the data alone. The length of a block follows from the residuals'
    autocorrelation rho (Andrews 1991, for an AR(1) process); rho is raised by (1 + 4 rho) / N for the bias of short
    series, and the variance multiplied by what blocks of that length miss of an AR(1) process. The interval is the
    estimate +- Student's t for (number of blocks - 2) degrees of freedom, at least 1, times the standard error.

    What they cover, simulated at level 0.95: with N >= 60 points and rho <= 0.8, 0.91 to 0.97 (0.87 for the ceiling
    where the noise grows threefold along the run); with 24 points 0.96 at rho 0, 0.94 at 0.5, and 0.82 to 0.88 at 0.8.
    Noise of H and a law that bends are not covered.

    Args:
        entropy: [N] H in nats, in the order of the run.
        reward: [N] R, such as accuracy as a fraction.
        weight: [N] > 0, proportional to 1 / variance of R, such as the number of responses; default: all equal.
        level: of the intervals.

    Raises:
        ValueError: fewer than 8 points, lengths that differ, a value that is not finite, a negative entropy, a weight
            that is not positive, exp(H) without spread, or a level outside (0, 1).

    Source: arXiv 2505.22617, eq. 6 (the law); the intervals are ours.
    """
    h = _series("entropy", entropy, least=0.0)
    if len(h) < MIN_POINTS:
        raise ValueError(f"entropy must have at least {MIN_POINTS} points for a fit, got {len(h)}")
    r = _series("reward", reward, count=len(h))
    w = np.ones_like(h) if weight is None else _series("weight", weight, count=len(h))
    if (w <= 0).any():
        raise ValueError(f"weight must be greater than 0, got {w[w <= 0][0]:g}")
    if not 0 < level < 1:
        raise ValueError(f"level must be a fraction in (0, 1), got {level}")
    check_spread(h)
    a, b = coefficients(h, r, w)
    x, count, root = np.exp(h), len(h), np.sqrt(w / w.mean())
    inverse = np.linalg.pinv(np.stack([-x, np.ones(count)], axis=1) * root[:, None])  # [2, N]
    residual = root * (r - b + a * x)
    rho = _autocorrelation(residual)
    block = _block_length(rho, count)
    covariance = _resampled_covariance(inverse, residual * math.sqrt(count / (count - 2)), block)
    covariance = covariance * _missed_by_blocks(rho, block)
    total = float(np.sum(w * (r - np.average(r, weights=w)) ** 2) / w.mean())
    return Law(
        a=a,
        b=b,
        covariance=((covariance[0, 0], covariance[0, 1]), (covariance[1, 0], covariance[1, 1])),
        quantile=student_t(max(1, count // block - 2), level),
        level=level,
        points=count,
        r2=1 - float(residual @ residual) / total if total > 0 else math.nan,
        residual_sd=math.sqrt(float(residual @ residual) / (count - 2)),
        autocorrelation=rho,
        block=block,
        entropy_range=(float(h.min()), float(h.max())),
    )


def coefficients(entropy: np.ndarray, reward: np.ndarray, weight: np.ndarray | None = None) -> tuple[float, float]:
    """(a, b) by weighted least squares: the closed form, without checks and intervals."""
    x = np.exp(entropy)
    mean_x, mean_r = np.average(x, weights=weight), np.average(reward, weights=weight)
    slope = np.average((x - mean_x) * (reward - mean_r), weights=weight) / np.average((x - mean_x) ** 2, weights=weight)
    return -float(slope), float(mean_r - slope * mean_x)


def has_spread(entropy: np.ndarray) -> bool:
    """Whether exp(H) varies enough to say anything about a."""
    return bool(np.ptp(np.exp(entropy)) > _MIN_SPREAD)


def check_spread(entropy: np.ndarray) -> None:
    if not has_spread(entropy):
        raise ValueError(
            f"entropy must vary for a fit: exp(H) must spread over more than {_MIN_SPREAD:g}, got "
            f"{len(entropy)} points from {entropy.min():g} to {entropy.max():g} nats"
        )


def entropy_lasts(step: ArrayLike, entropy: ArrayLike, *, left: float = LEFT) -> EntropyLasts:
    """At which step a run's entropy will be gone.

    Gone: exp(H) - 1 is down to `left` of what the run began with (the median of its first five points). By the law,
    a (exp(H) - 1) is the reward that is still to be had, so a run has then got 1 - left of what its entropy pays for.
    The rule of extrapolation: a least-squares line through log H over log(step), over the later half of the points,
    goes on: a power of the step. (A line over the step itself calls the end too early: at step 40 of two runs whose
    entropy was gone at about step 160 it says 65 and 72, this rule 94 and 121.)

    Args:
        step: [N] rising, greater than 0.
        entropy: [N] nats.
        left: in (0, 1).

    Raises:
        ValueError: fewer than 8 points, lengths that differ, a value that is not finite, a negative entropy, one of 0
            at the start, steps that do not rise, or `left` outside (0, 1).
    """
    at = _series("step", step)
    h = _series("entropy", entropy, count=len(at), least=0.0)
    if len(at) < MIN_POINTS:
        raise ValueError(f"entropy must have at least {MIN_POINTS} points for an extrapolation, got {len(at)}")
    if at[0] <= 0 or (np.diff(at) <= 0).any():
        raise ValueError(f"step must be greater than 0 and rise, got {at.tolist()}")
    if not 0 < left < 1:
        raise ValueError(f"left must be a fraction in (0, 1), got {left}")
    start = float(np.median(h[:_START]))
    if start <= 0:
        raise ValueError("entropy must be greater than 0 at the start, got 0: nothing is there to be spent")
    later = slice(len(at) // 2, None)
    x, y = np.log(at[later] / at[-1]), np.log(np.maximum(h[later], 1e-12))
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    now = float(y.mean() - slope * x.mean())
    share = math.expm1(math.exp(now)) / math.expm1(start)
    if slope >= 0:
        return EntropyLasts(share, None)
    gone = math.log(math.log1p(left * math.expm1(start)))
    ahead = (gone - now) / slope  # log of (step / last step)
    return EntropyLasts(share, float(at[-1]) * math.exp(ahead) if ahead < _FAR else None)


def _series(name: str, values: ArrayLike, *, count: int | None = None, least: float = -math.inf) -> np.ndarray:
    """[N] float64, finite, N >= 1."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {type(values).__name__} ({error})") from None
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must have one dimension and at least one value, got shape {array.shape}")
    if count is not None and len(array) != count:
        raise ValueError(f"{name} must have {count} values as the others, got {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: {int((~np.isfinite(array)).sum())} of {len(array)} values are not")
    if array.min() < least:
        raise ValueError(f"{name} must be at least {least:g}, got {array.min():g}")
    return array


def _autocorrelation(residual: np.ndarray) -> float:
    """Of neighbours, with the first-order correction for the bias that a fitted line causes in a short series."""
    energy = float(residual @ residual)
    rho = max(0.0, float(residual[1:] @ residual[:-1]) / energy) if energy > 0 else 0.0
    return min(_MOST_AUTOCORRELATION, rho + (1 + 4 * rho) / len(residual))


def _block_length(rho: float, count: int) -> int:
    """Andrews 1991, eq. 6.2, 6.4: the bandwidth of Bartlett's kernel, which moving blocks amount to; at most N / 5."""
    best = 1.1447 * (4 * rho**2 / (1 - rho**2) ** 2 * count) ** (1 / 3)
    return int(min(max(1, math.ceil(best)), max(1, count // 5)))


def _resampled_covariance(inverse: np.ndarray, residual: np.ndarray, block: int) -> np.ndarray:
    """[2, 2] covariance of inverse @ e* where e* is filled up, block by block, from equally likely places."""
    windows = sliding_window_view(residual, block)  # [N - block + 1, block]
    total = np.zeros((2, 2))
    for first in range(0, len(residual), block):
        part = inverse[:, first : first + block]
        drawn = part @ windows[:, : part.shape[1]].T  # [2, places]
        drawn -= drawn.mean(axis=1, keepdims=True)
        total += drawn @ drawn.T / drawn.shape[1]
    return total


def _missed_by_blocks(rho: float, block: int) -> float:
    """Long-run variance of an AR(1) process over what Bartlett's weights of this length see of it."""
    lag = np.arange(1, block)
    return (1 + rho) / (1 - rho) / (1 + 2 * float(np.sum((1 - lag / block) * rho**lag)))
