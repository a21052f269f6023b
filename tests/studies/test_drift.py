"""First-order drift: the theorems on a table, the numbers of docs/math.md, sentences that follow the numbers."""

import math

import pytest
import torch

from entcov.cli import main
from entcov.studies import base, drift
from entcov.studies.drift import TABLE_STEPS, Drift, relative_error, slope
from entcov.studies.drift_steps import covariance, entropy, table
from tests.support.study_parts import InlinePool


def test_the_numbers_of_the_formulas():
    """docs/math.md, numbers to check by hand."""
    log_p = torch.tensor([2.0, 1, 0, -1], dtype=torch.float64).log_softmax(-1)
    p, reward = log_p.exp(), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    advantage = reward - p[0]
    assert float(entropy(log_p)) == pytest.approx(0.947537, abs=1e-6)
    assert float(covariance(p, log_p, p * advantage)) == pytest.approx(0.1016552, abs=1e-7)
    assert float(covariance(p, log_p, advantage)) == pytest.approx(0.3266881, abs=1e-7)


def test_the_theorems_are_exact_to_first_order():
    rows = table(0, TABLE_STEPS)
    assert set(rows) == {"policy gradient", "natural gradient", "sampled gradient", "AdamW"}
    for kind, own in rows.items():
        assert slope(own, largest=1e-3) == pytest.approx(2, abs=0.05), kind
        assert own[0]["correlation"] > 0.999 and own[0]["error"] < 1e-2 * own[0]["size"], kind
        assert own[4]["product_error"] == pytest.approx(own[4]["error"], rel=0.2), kind  # a step of 0.01
    assert rows["AdamW"][0]["of_drift"] < 0.99
    # The mean of the sampled gradient is the policy gradient of theorem 1, where advantages are centred.
    assert rows["sampled gradient"][4]["size"] == pytest.approx(rows["policy gradient"][4]["size"], rel=0.2)


def test_slope_and_relative_error_by_hand():
    rows = [{"eta": e, "kl": e**2, "error": 3 * e**2, "size": 2 * e} for e in (0.01, 0.1, 1.0)]
    assert slope(rows) == pytest.approx(2) and math.isnan(slope(rows, largest=0.1))
    assert relative_error(rows, 1e-2) == pytest.approx(0.15) and relative_error(rows, 1e-3) == pytest.approx(
        0.15 / 10**0.5
    )
    assert math.isnan(relative_error(rows, 1e-5)) and math.isnan(relative_error(rows, 10))


def results(curve=2.0, correlation=0.1, mean=0.5):
    def rows():
        steps = (0.003, 0.01, 0.03, 0.1)
        own = {"product_error": 1e-9, "rounding": 1e-9, "correlation": 1.0, "drift": correlation, "of_drift": 0.5}
        own |= {"mean_change": 1e-3, "mean_predicted": mean * 1e-3}
        return [{"eta": e, "kl": e**2, "error": e**curve, "size": e} | own for e in steps]

    kinds = ("policy gradient", "natural gradient", "sampled gradient", "AdamW")
    tables = {f"table {seed}": {kind: rows() for kind in kinds} for seed in range(2)}
    network = {"rows": {name: rows() for name in drift.NETWORK_STEPS}, "entropy": 1.0, "reward": 0.5}
    return tables | {f"transformer {seed}": network for seed in range(2)}


def test_statements_follow_the_numbers():
    good, bad = (" ".join(Drift().findings(results(curve)).statements) for curve in (2.0, 1.5))
    assert "policy gradient 2.000 ± 0.000" in good and "as theory says" in good and "The slope is 2 for each" in good
    assert "which is not the 2 of theory for policy gradient" in bad and "not 2 for gradient descent" in bad
    assert "the right sign there" in good and "not by how much" in good
    assert "the wrong sign there" in " ".join(Drift().findings(results(correlation=-0.3)).statements)
    assert "that of single tokens too" in " ".join(Drift().findings(results(correlation=0.95)).statements)
    assert "off by 50% to 50%, and has the wrong sign in 0 of 2" in good
    assert "off by 200% to 200%, and has the wrong sign in 2 of 2" in " ".join(
        Drift().findings(results(mean=-1.0)).statements
    )


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(drift, "NETWORK_SEEDS", (1,))
    assert main(["study", "drift", "--smoke", "--out", str(tmp_path)]) == 0
    page = tmp_path / "drift_smoke/page"
    assert sorted(path.name for path in page.iterdir()) == ["drift.png", "study.json", "study.md"]
    assert "| transformer | AdamW | 1 |" in (page / "study.md").read_text()
