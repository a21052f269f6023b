"""AEnt's clamp: the tasks' values by hand, equal training for equal entropies, sentences that follow the numbers."""

import math
import pickle
from dataclasses import replace

import pytest
import torch

from entcov.cli import main
from entcov.studies import base
from entcov.studies.clamp import found
from entcov.studies.clamp_training import (
    AENT,
    CHAINS,
    DECOYS,
    NONE,
    PLAIN,
    TASKS,
    TOP,
    Budget,
    Task,
    measure,
    regularised_value,
    rewards,
    sample,
    train,
    value,
)
from tests.support.study_parts import InlinePool

SMALL = Task(200, ranks=(20, 60))


def test_the_optimum_of_reward_and_bonus():
    """Against the softmax of all rewards, and the numbers of the module's head."""
    for task, coef, kept in (
        (Task(300, right=2), 0.2, 40),
        (Task(300), 0.05, 300),
        (Task(300), 0.3, 4),
        (Task(9), 1, 1),
    ):
        reward = torch.tensor([1.0] * task.right + [0.5] * DECOYS + [0.0] * 300, dtype=torch.float64)[:kept]
        expected = float((reward * (reward / coef).softmax(0)).sum())
        assert regularised_value(task, coef, kept) == pytest.approx(expected, rel=1e-12)
    named = [regularised_value(Task(a), 0.1, k) for a, k in ((10_000, 10_000), (100_000, 100_000), (10_000, 100))]
    assert [round(own, 2) for own in named] == [0.68, 0.18, 0.98]
    for task, coef in ((Task(100_000), 0.001), (Task(10_000), 1e-4)):  # exp(1 / coef) is no float
        assert regularised_value(task, coef, task.actions) == pytest.approx(1)


def test_rewards_and_values_by_hand():
    kind = torch.tensor([[[2, 2, 1, 0], [2, 1, 1, 2]]])  # one run, two decisions, four responses
    assert rewards(kind).tolist() == [[1.0, 0.5, 0.5, 0.0]]
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    right, decoys = torch.tensor([[0], [1]]), torch.tensor([[1], [0]])
    # both right: .5 * .2; all right or decoys: .75 * .3
    assert value(p, right, decoys, 2).item() == pytest.approx(0.1 + 0.5 * (0.225 - 0.1))
    assert value(p[:1], right[:1], decoys[:1], 1).item() == pytest.approx(0.5 + 0.5 * 0.25)


def test_samples_invert_the_distribution_function():
    g = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(3, 500, generator=g)).softmax(-1)
    uniform = torch.rand(3, 200, generator=g, dtype=torch.float64)
    whole = p.double().cumsum(-1)
    expected = torch.searchsorted(whole, uniform * whole[:, -1:], right=True)
    assert (sample(p, uniform) == expected).float().mean() > 0.99  # block sums are rounded otherwise


def test_the_first_policy_is_a_power_law_with_flat_mass():
    p = Task(4, exponent=1.0, flat=0.5).first_policy()
    assert p.tolist() == pytest.approx([0.5 * x / (25 / 12) + 0.125 for x in (1, 1 / 2, 1 / 3, 1 / 4)])


def test_ways_that_are_the_same_train_the_same():
    """The entropy of the likeliest action alone is 0, and a clamp that removes nothing is the plain bonus."""
    runs = {
        name: train(SMALL, way, 0.1, 6, (0, 1))["value"]
        for name, way in (("none", NONE), ("sent", pickle.loads(pickle.dumps(NONE))), ("one", TOP[1]), ("plain", PLAIN),
                          ("all", replace(AENT, clamp_p=0.0)), ("aent", AENT))
    }  # fmt: skip
    assert runs["none"] == runs["sent"] == runs["one"]
    assert runs["plain"] == pytest.approx(runs["all"], rel=1e-4)
    for other in ("plain", "aent"):
        assert max(abs(a - b) for a, b in zip(runs["none"], runs[other], strict=True)) > 1e-3
    assert max(abs(a - b) for a, b in zip(runs["aent"], runs["all"], strict=True)) > 1e-4


def test_seeds_do_not_depend_on_their_neighbours():
    together = train(SMALL, PLAIN, 0.05, 4, (3, 4, 5))["value"]
    assert train(SMALL, PLAIN, 0.05, 4, (4,))["value"] == pytest.approx(together[1:2], rel=1e-5)


def test_the_coefficient_is_chosen_on_the_choosing_seeds_alone():
    own = measure(SMALL, PLAIN, Budget(4, (0.01, 1.0), (0, 1), (7, 8, 9)))
    assert list(own["by_seed"]) == ["7", "8", "9"] and set(own["scan"]) == {"0.01", "1.0"}
    assert own["scan"]["0.01"] == train(SMALL, PLAIN, 0.01, 4, (0, 1))["value"]
    assert own["coef"] == float(max(own["scan"], key=lambda c: sum(own["scan"][c])))
    assert list(own["by_seed"].values()) == train(SMALL, PLAIN, own["coef"], 4, (7, 8, 9))["value"]


def result(values, coef=0.1):
    by_seed = {str(seed): value for seed, value in enumerate(values)}
    scan = {"0.1": [0.5]} if coef else {}
    return {"coef": coef, "scan": scan, "by_seed": by_seed, "entropy": 1.0, "curve": []}


def results(aent, top=(0.5, 0.5, 0.5), plain=(0.5, 0.5, 0.5), one=(0.4, 0.4, 0.4), chain=(0.5, 0.51, 0.52)):
    ways = {NONE.name: result((0.4, 0.4, 0.4), 0), PLAIN.name: result(plain), AENT.name: result(aent)}
    bandit = ways | {TOP[k].name: result(one if k == 1 else top) for k in TOP}
    few = ways | {TOP[100].name: result(top), PLAIN.name: result(chain)}
    return {"10,000 arms": bandit, "chain, 1 right": few, "chain, 5 right": few}


def test_statements_follow_the_numbers():
    same = found(results((0.5, 0.5, 0.5), chain=(0.5, 0.5, 0.5))).statements
    assert same[0].startswith("On none of 3 tasks")
    assert (
        same[-1]
        == "A bonus on the top 1 alone is no bonus at all: its final values equal those without a bonus on every seed."
    )
    apart = found(results((0.8, 0.81, 0.82), top=(0.9, 0.91, 0.92))).statements
    assert (
        "ends elsewhere than the plain bonus on 3 of 3 tasks" in apart[0] and "10,000 arms: +0.310 ± 0.025" in apart[0]
    )
    assert "top 10 on 10,000 arms +0.410 ± 0.025 (more)" in apart[2]
    assert "bonuses end measurably higher and 0 lower; plain bonus on 10,000 arms +0.100 ± 0.000" in apart[1]
    tiny = found(results((0.5001, 0.5001, 0.5001), chain=(0.5, 0.5, 0.5))).statements
    assert tiny[0].startswith("On none of 3 tasks")  # measured, and below what counts
    less = found(results((0.5, 0.5, 0.5), top=(0.1, 0.11, 0.12))).statements
    assert "top 10 on 10,000 arms -0.390 ± 0.025 (less)" in less[2]
    assert "look for a mistake" in found(results((0.5, 0.5, 0.5), one=(0.4, 0.4, 0.5))).statements[-1]
    helps = found(results((0.5, 0.5, 0.5))).statements[3]
    assert "Here it helps with fewer too" in helps
    none = found(results((0.5, 0.5, 0.5), chain=(0.3, 0.5, 0.4))).statements[3]
    assert "Here it helps with no number of 1, 5" in none


def test_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "ProcessPoolExecutor", InlinePool)
    small = {name: replace(task, actions=1000) for name, task in TASKS.items()}
    monkeypatch.setattr("entcov.studies.clamp.TASKS", small)
    assert main(["study", "clamp", "--smoke", "--out", str(tmp_path)]) == 0
    page = tmp_path / "clamp_smoke/page"
    assert sorted(path.name for path in page.iterdir()) == ["clamp.png", "study.json", "study.md"]
    assert "| 10,000 arms | clamp 0.33 | 670 |" in (page / "study.md").read_text()
    assert math.isfinite(len(CHAINS)) and "top 1 alone is no bonus at all" in capsys.readouterr().out.replace("\n", " ")
