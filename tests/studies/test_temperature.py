"""The temperature study: each policy at its own best temperature, and what is said of the difference."""

import pytest

from entcov.studies.plan import Plan
from entcov.studies.temperature import SAMPLES, TEMPERATURES, TemperatureStudy, evaluate

PLAN = Plan.read(TemperatureStudy.runs.path, False).limited(["clip_cov"])


def curves(values):
    """pass@k at each temperature, the same for both k, with a little noise over five seeds."""
    return {seed: {t: {1: v + 0.001 * seed, SAMPLES: v + 0.001 * seed} for t, v in values.items()} for seed in range(5)}


@pytest.mark.parametrize(
    ("none", "said"),
    [
        ((0.1, 0.2, 0.4, 0.1), "not told apart from none (+0.000"),  # hotter sampling is as good
        ((0.1, 0.2, 0.3, 0.1), "ahead of none (+0.100"),
        ((0.1, 0.2, 0.5, 0.1), "behind none (-0.100"),
    ],
)
def test_each_policy_has_its_best_temperature(none, said):
    found = evaluate(
        PLAN,
        {
            "none": curves(dict(zip(TEMPERATURES, none, strict=True))),
            "clip_cov": {
                seed: {t: {k: x + 1e-4 * (seed % 2) for k, x in own.items()} for t, own in by_t.items()}
                for seed, by_t in curves(dict(zip(TEMPERATURES, (0.3, 0.4, 0.2, 0.1), strict=True))).items()
            },
        },
    )
    assert [f"pass@{k}, each at its best temperature: clip_cov is {said}" in found.statements[i]
            for i, k in enumerate((1, SAMPLES))] == [True, True]  # fmt: skip
    rows = {row[0]: row for row in found.tables[1].rows}
    assert rows["none"][-2] == "1.4" and rows["clip_cov"][-2] == "1" and rows["none"][-1] == "—"
