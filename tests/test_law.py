"""The law's fit against normal equations and a bootstrap by drawing, its coverage, forecasts, the end of entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from entcov import fit_law
from entcov.law import coefficients, entropy_lasts


def falling(points: int) -> np.ndarray:
    return 0.9 * np.exp(-2.2 * np.arange(points) / points)


def noise(rng: np.random.Generator, points: int, rho: float) -> np.ndarray:
    """AR(1) of variance 1, by its definition."""
    out = [rng.normal()]
    for _ in range(points - 1):
        out.append(rho * out[-1] + math.sqrt(1 - rho * rho) * rng.normal())
    return np.array(out)


def design(entropy: np.ndarray) -> np.ndarray:
    return np.stack([-np.exp(entropy), np.ones_like(entropy)], axis=1)


def test_points_on_the_curve_give_its_coefficients():
    h = np.array([1.2, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])
    law = fit_law(h, 1.1 - 0.25 * np.exp(h))
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.25, 1.1, 0.85)) and law.r2 == pytest.approx(1)
    assert law.half_width_a < 1e-12 and law.entropy_range == (0.05, 1.2) and law.points == 8
    assert law.predict([[0.0, math.log(2)]]) == pytest.approx(np.array([[0.85, 0.6]]))


def test_a_weight_counts_like_repeated_points():
    rng = np.random.default_rng(0)
    h, w = falling(12), rng.integers(1, 5, 12)
    r = 1 - 0.3 * np.exp(h) + 0.1 * rng.normal(size=12)
    again_h, again_r = np.repeat(h, w), np.repeat(r, w)
    a, b = np.linalg.solve(design(again_h).T @ design(again_h), design(again_h).T @ again_r)
    law = fit_law(h, r, weight=w)
    assert (law.a, law.b) == pytest.approx((a, b)) and coefficients(h, r, w) == pytest.approx((a, b))
    rest = again_r - design(again_h) @ [a, b]
    assert law.r2 == pytest.approx(1 - rest.var() / again_r.var())
    scaled = fit_law(h, r, weight=10 * w)
    assert (scaled.half_width_a, scaled.residual_sd) == pytest.approx((law.half_width_a, law.residual_sd))


def test_without_autocorrelation_the_interval_is_the_textbooks():
    """Blocks of one point: s^2 (X'X)^-1 and t(N - 2), but for the small correction of rho's bias."""
    rng = np.random.default_rng(2)
    h = falling(50)
    r = 1 - 0.3 * np.exp(h) + 0.05 * rng.normal(size=50)
    law = fit_law(h, r)
    rest = r - design(h) @ [law.a, law.b]
    assert rest[1:] @ rest[:-1] < 0 and law.autocorrelation == pytest.approx(1 / 50) and law.block == 1
    textbook = rest @ rest / 48 * np.linalg.inv(design(h).T @ design(h))
    assert np.array(law.covariance) == pytest.approx(textbook * (1 + 1 / 50) / (1 - 1 / 50))
    assert law.residual_sd == pytest.approx(math.sqrt(rest @ rest / 48))
    assert law.quantile == pytest.approx(2.0106, abs=1e-4)  # t(48), printed tables
    variance = textbook[0, 0] + textbook[1, 1] - 2 * textbook[0, 1]
    assert law.half_width_ceiling == pytest.approx(2.0106 * math.sqrt(variance * 1.02 / 0.98), rel=1e-4)


def test_the_variance_is_that_of_drawn_blocks_of_residuals():
    """The oracle draws blocks and fits every resample anew; 1.6 % is the error of a variance of 8,000 draws."""
    rng = np.random.default_rng(3)
    h = falling(43)  # no multiple of a block: the last one is cut
    law = fit_law(h, 1 - 0.3 * np.exp(h) + 0.05 * noise(rng, 43, 0.7))
    size = law.block
    assert size > 3 and 43 % size
    r = 1 - 0.3 * np.exp(h) + 0.05 * noise(np.random.default_rng(3), 43, 0.7)
    rest = r - design(h) @ [law.a, law.b]
    resamples = []
    for _ in range(8000):
        drawn = [rest[s : s + size] for s in rng.integers(0, 43 - size + 1, -(-43 // size))]
        resamples.append(design(h) @ [law.a, law.b] + np.concatenate(drawn)[:43] * math.sqrt(43 / 41))
    fits = np.linalg.lstsq(design(h), np.array(resamples).T, rcond=None)[0]  # [2, 8000]
    rho = law.autocorrelation
    seen = 1 + 2 * sum((1 - k / size) * rho**k for k in range(1, size))
    expected = np.cov(fits) * (1 + rho) / (1 - rho) / seen
    assert np.array(law.covariance) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_intervals_cover_what_their_docstring_says(rho):
    """240 runs of 80 points; 0.95 nominal, 0.91 to 0.97 stated, 0.017 the standard error here.

    Textbook intervals, which take the points for independent, are the control: they must fail where they are wrong.
    """
    rng, h = np.random.default_rng(int(10 * rho)), falling(80)
    hits, textbook = np.zeros(4), 0
    for _ in range(240):
        own = h * np.exp(0.02 * rng.normal(size=80))
        r = 1 - 0.3 * np.exp(own) + 0.03 * noise(rng, 80, rho)
        law = fit_law(own, r)
        ahead = law.forecast([0.05])
        hits += [
            abs(law.a - 0.3) <= law.half_width_a,
            abs(law.b - 1.0) <= law.half_width_b,
            abs(law.ceiling - 0.7) <= law.half_width_ceiling,
            abs(ahead.predicted[0] - (1 - 0.3 * math.exp(0.05))) <= ahead.half_width[0],
        ]
        s = np.linalg.inv(design(own).T @ design(own))[0, 0] * law.residual_sd**2
        textbook += abs(law.a - 0.3) <= 1.99 * math.sqrt(s)
    assert ((0.89 <= hits / 240) & (hits / 240 <= 0.99)).all(), hits / 240
    assert (textbook / 240 > 0.9) == (rho == 0)


def test_the_errors_of_a_forecast_by_hand():
    h = np.linspace(1, 0.5, 20)
    law = fit_law(h, 2 - 0.5 * np.exp(h))
    later = np.array([0.4, 0.3, 0.2, 0.1, 0.0] * 4)
    measured = law.predict(later) + np.array([0.1] * 10 + [-0.3] * 8 + [-0.2, -0.4])
    found = law.forecast(later, measured)
    assert found.predicted == pytest.approx(2 - 0.5 * np.exp(later))
    assert found.bias == pytest.approx((-1.0 + 2.4 + 0.6) / 20)
    assert found.rmse == pytest.approx(math.sqrt((10 * 0.01 + 8 * 0.09 + 0.04 + 0.16) / 20))
    assert found.end_error == pytest.approx(0.3)  # of the last two
    alone = law.forecast(later)
    assert (alone.rmse, alone.bias, alone.end_error) == (None, None, None)
    assert np.array_equal(alone.predicted, found.predicted)


def test_the_interval_widens_away_from_the_points():
    rng, h = np.random.default_rng(0), np.linspace(1.0, 0.6, 60)
    law = fit_law(h, 1 - 0.3 * np.exp(h) + 0.01 * rng.normal(size=60))
    half = law.forecast([0.8, 0.4, 0.0]).half_width
    assert half[0] < half[1] < half[2] == pytest.approx(law.half_width_ceiling)


def test_entropy_that_falls_as_a_power_of_the_step_ends_where_it_says():
    step = np.arange(1.0, 41)
    h = 0.8 * step**-0.5
    start = np.median(h[:5])
    # H_end = log(1 + 0.1 (exp(H_start) - 1)) = 0.8 s^-0.5
    end = math.log1p(0.1 * math.expm1(start))
    lasts = entropy_lasts(step, h)
    assert lasts.step == pytest.approx((0.8 / end) ** 2) and lasts.step > 40
    assert lasts.left == pytest.approx(math.expm1(h[-1]) / math.expm1(start))
    assert entropy_lasts(step, h, left=0.5).step == pytest.approx((0.8 / math.log1p(0.5 * math.expm1(start))) ** 2)
    assert entropy_lasts(step, h, left=0.5).step < 40  # it has been gone for a while
    # Steps need not follow each other: those of evaluations.
    assert entropy_lasts(step[::4], h[::4], left=0.1).left == pytest.approx(
        math.expm1(h[36]) / math.expm1(np.median(h[::4][:5]))
    )


def test_entropy_that_does_not_fall_has_no_end():
    step = np.arange(1, 31)
    for h in (np.full(30, 0.4), 0.4 + 0.01 * step, np.where(step < 15, 0.9 - 0.04 * step, 0.3)):
        assert entropy_lasts(step, h).step is None
    assert entropy_lasts(step, 0.4 - 1e-9 * step).step is None  # more than a million times as many steps
    assert entropy_lasts(step, 0.4 + 0.01 * step).left > 1
    assert math.isfinite(entropy_lasts(step, np.maximum(0.0, 0.5 - 0.05 * step)).left)  # exact zeros at the end


H, R = falling(12), 1 - 0.3 * np.exp(falling(12))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_law(H[:7], R[:7]), ValueError, "entropy must have at least 8 points for a fit, got 7"),
        (lambda: fit_law(H, R[:9]), ValueError, "reward must have 12 values as the others, got 9"),
        (lambda: fit_law(H, R * math.nan), ValueError, "reward must be finite: 12 of 12"),
        (lambda: fit_law(-H, R), ValueError, "entropy must be at least 0, got -0.9"),
        (lambda: fit_law(H, R, weight=H * 0), ValueError, "weight must be greater than 0, got 0"),
        (lambda: fit_law(H, R, level=95), ValueError, r"level must be a fraction in \(0, 1\), got 95"),
        (lambda: fit_law(H * 0 + 0.5, R), ValueError, "entropy must vary for a fit: .*12 points from 0.5 to 0.5 nats"),
        (lambda: fit_law([[0.1, 0.2]], R), ValueError, r"entropy must have one dimension .*shape \(1, 2\)"),
        (lambda: fit_law("abc", R), TypeError, "entropy must be numbers, got str"),
        (lambda: fit_law(H, R).forecast([]), ValueError, "entropy must have one dimension and at least one value"),
        (lambda: fit_law(H, R).forecast([0.1], [0, 1]), ValueError, "reward must have 1 values as the others, got 2"),
        (lambda: entropy_lasts([1, 2, 3], H[:3]), ValueError, "at least 8 points for an extrapolation, got 3"),
        (lambda: entropy_lasts(np.arange(12), H), ValueError, "step must be greater than 0 and rise"),
        (lambda: entropy_lasts([1] * 12, H), ValueError, "step must be greater than 0 and rise"),
        (lambda: entropy_lasts(np.arange(1, 13), H, left=10), ValueError, "left must be a fraction .*, got 10"),
        (lambda: entropy_lasts(np.arange(1, 13), H * 0), ValueError, "entropy must be greater than 0 at the start"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
