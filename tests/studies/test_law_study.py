"""The law's study: a law that holds is found and forecast, one that does not is said not to."""

import numpy as np
import pytest

from entcov.report.fit_law import Points
from entcov.studies.law_study import FRACTIONS, LawStudy, averaged, evaluate, laws_of
from entcov.studies.plan import Plan

PLAN = Plan.read(LawStudy.runs.path, False)


def points(a, b, *, seed, noise=0.002, bend=0.0):
    """A run of 256 steps whose entropy falls from 0.45 to 0.15; after its first fifth the law is off by `bend`."""
    rng = np.random.default_rng(seed)
    at = np.arange(1, 257, dtype=float)
    entropy = 0.15 + 0.3 * np.exp(-at / 80) + 0.003 * rng.standard_normal(256)
    reward = b - a * np.exp(entropy) + noise * rng.standard_normal(256) - bend * np.clip((at - 51) / 205, 0, 1)
    return Points(at, entropy, reward, 256)


def of(laws):
    return evaluate(PLAN, {arm: {seed: laws_of(own) for seed, own in enumerate(runs)} for arm, runs in laws.items()})


def test_a_law_that_holds_is_forecast():
    found = of({"none": [points(0.5, 0.9, seed=s) for s in range(5)]})
    arm = found.values["arms"]["none"]
    assert arm["a"] == pytest.approx([0.5] * 5, abs=0.03) and min(arm["r2"]) > 0.95
    assert max(arm["forecasts"]["0.15"]["rmse"]) < 0.02
    assert "the forecast is neither too high nor too low" in found.statements[1]
    assert [len(arm["forecasts"][str(f)]["rmse"]) for f in FRACTIONS] == [5, 5, 5]


def test_a_forecast_that_fails_is_said_to():
    found = of({"none": [points(0.5, 0.9, seed=s, bend=0.1) for s in range(5)]})
    assert "At the end the forecast is too high (+0.0" in found.statements[1]


@pytest.mark.parametrize(("a", "said"), [(0.5, "No arm's a is told apart"), (0.8, r"clip_cov (+0.3")])
def test_arms_are_told_apart_where_they_differ(a, said):
    runs = {"none": [points(0.5, 0.9, seed=s) for s in range(5)]}
    runs["clip_cov"] = [points(a, 0.9, seed=s + 9) for s in range(5)]
    assert said in of(runs).statements[-1]


def test_points_are_means_of_successive_steps():
    own = Points(np.arange(5.0), np.array([1.0, 3.0, 5.0, 7.0, 9.0]), np.arange(5.0) ** 2, 5)
    mean = averaged(own, 2)
    assert mean.at.tolist() == [0.5, 2.5, 4.0] and mean.entropy.tolist() == [2.0, 6.0, 9.0]
    assert mean.reward.tolist() == [0.5, 6.5, 16.0] and mean.budget == 5
