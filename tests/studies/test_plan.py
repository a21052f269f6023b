"""Plans of studies: what is refused, what an arm's recipe becomes, and that all plans of the project can be run."""

import pytest
import yaml

from entcov.rl.load_config import load_config
from entcov.studies import plan as plans
from entcov.studies.catalogue import STUDIES
from entcov.studies.plan import PLANS, Plan, merged
from entcov.studies.training import TrainingStudy

GOOD = {
    "title": "t", "question": "q", "prompts": {"pool": 20, "train": 8}, "recipe": {"steps": 3},
    "arms": {"none": {}, "one": {"candidates": [{"a": 1}, {"a": 2}]}, "two": {"candidates": [{"b": 1}, {"b": 2}]}},
    "baselines": {"one": "none", "two": "one"}, "choose": {"seeds": [1], "by": "held_out"}, "seeds": [5, 6],
}  # fmt: skip


def read(folder, changes, smoke=False):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(merged(GOOD, changes)))
    return Plan.read(path, smoke)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [3]}, "keys must be among base, title, .*, got seed"),
        ({"seeds": [1, 2]}, r"seeds: must not be those of choose.seeds or prompts.ranked_by, got \[1\]"),
        ({"seeds": [1000]}, r"got \[1000\]"),
        ({"choose": {"seeds": []}}, "choose.seeds: must be given where arms have candidates"),
        ({"choose": {"by": "luck"}}, "choose.by: must be among reward, held_out, .*, got luck"),
        ({"show": ["held_out", "luck"]}, "show: must be among reward, held_out, .*, got luck"),
        ({"arms": {"two": {"candidates": [{"b": 1}]}}}, "equally many for every arm .*, got {'one': 2, 'two': 1}"),
        ({"baselines": {"one": "three"}}, r"baselines: must name arms \['none', 'one', 'two'\], got one: three"),
        ({"arms": {10.2: {}}}, r"must have text as labels, got \[10.2\]"),
        ({"arms": {"none": {"train_prompts": 9}}}, r"arms.none.train_prompts: must be in \[1, 8\] .*, got 9"),
        ({"prompts": {"set": "easy"}}, "prompts.set: must be one of residual, sparse, got 'easy'"),
        ({"prompts": {"pool": 0}}, "pool must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_bad_plan_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, changes)


def test_an_arm_takes_its_baselines_with_it(tmp_path):
    plan = read(tmp_path, {})
    assert list(plan.limited(["two"]).arms) == ["none", "one", "two"]
    assert list(plan.limited(["none"]).arms) == ["none"] and not plan.limited(["none"]).candidates
    with pytest.raises(ValueError, match="--arms: must be among none, one, two, got three"):
        plan.limited(["three"])


def test_the_smoke_version_replaces_keys(tmp_path):
    changes = {"smoke": {"recipe": {"steps": 1}, "seeds": [5]}}
    assert read(tmp_path, changes).recipe["steps"] == 3
    small = read(tmp_path, changes, smoke=True)
    assert small.recipe["steps"] == 1 and small.seeds == (5,) and small.prompts.pool == 20


def test_a_plan_completes_its_base(tmp_path, monkeypatch):
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(GOOD))
    (tmp_path / "own.yaml").write_text("base: common\ntitle: mine\nrecipe: {seed: 1}\n")
    monkeypatch.setattr(plans, "PLANS", tmp_path)
    plan = Plan.read(tmp_path / "own.yaml", False)
    assert plan.title == "mine" and plan.recipe == {"steps": 3, "seed": 1} and list(plan.arms) == ["none", "one", "two"]


OF_PLANS = [study for study in STUDIES.values() if type(study) is TrainingStudy]


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("study", OF_PLANS, ids=lambda study: study.name)
def test_every_arm_of_the_project_is_a_recipe(tmp_path, study, smoke):
    plan = Plan.read(study.path, smoke)
    assert plan.resolves and plan.question
    assert {*plan.baselines, *plan.baselines.values()} == set(plan.arms)
    texts = set()
    for arm, keys in plan.arms.items():
        for candidate in plan.candidates.get(arm, [{}]):
            given = {
                "model": {"path": "model"}, "run_dir": "run",
                "data": {"train_files": ["a.parquet"], "val_files": ["b.parquet"]},
            }  # fmt: skip
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump(merged(plan.recipe, keys, candidate, given)))
            load_config(path, [])
            texts.add((path.read_text(), plan.train_prompts.get(arm)))
    assert len(texts) == sum(len(plan.candidates.get(arm, [{}])) for arm in plan.arms)  # no two are the same


def test_no_two_studies_report_the_same_seeds():
    """A seed that one study has looked at is not fresh for another."""
    seeds = [seed for study in OF_PLANS for seed in Plan.read(study.path, False).seeds]
    chosen = [seed for study in OF_PLANS for seed in Plan.read(study.path, False).choosing_seeds]
    assert len(set(seeds)) == len(seeds) and not set(seeds) & {*chosen, 0}


def test_plans_are_in_the_package():
    assert {path.stem for path in PLANS.glob("*.yaml")} >= {study.name for study in OF_PLANS} | {"hard", "start"}
