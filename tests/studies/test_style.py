"""The study of a premature style: styles told from responses, the curriculum's file, and what is said of runs."""

import json
import random
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from entcov.cli import main
from entcov.rl.data.stream import load_rows
from entcov.rl.load_config import load_config
from entcov.rl.rewards.rules import score as task_score
from entcov.rl.tasks.base import join_steps
from entcov.rl.tasks.carry_arithmetic import STYLES
from entcov.studies import benchmark, training
from entcov.studies.base import How
from entcov.studies.catalogue import STUDIES
from entcov.studies.curriculum import Curriculum
from entcov.studies.page import run_study
from entcov.studies.plan import Plan, merged
from entcov.studies.style_study import REACHED, WINDOW, phases, preferred, style_findings, values_of
from entcov.studies.styles import KINDS, score, style_of
from entcov.studies.training import TrainingStudy

STUDY = STUDIES["style"]
LONG = "val-core/entcov/carry_arithmetic/long/held_out/acc"

# ---- the parser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "response", "style"),
    [
        ((47, 85), "#132", "direct"),
        ((47, 85), "#", "direct"),
        ((47, 85), "2 3 1#132", "digits"),
        ((47, 85), "2,3#132", "digits"),  # one digit was forgotten
        ((47, 85), "2 3 1 1#132", "other"),
        ((47, 85), "7+5=2c1,4+8=3c1#132", "carries"),
        ((47, 85), "5+7=3c1\n8+4=9c0#93", "carries"),  # wrong sums have the style all the same
        ((47, 85), "7+5=2c1,4+8+1=3c1#132", "other"),  # the carry is repeated, which the style does not do
        ((47, 85), "7+5=12,4+1+8=13#132", "columns"),
        ((47, 85), "7+5=11,4+8=12#131", "columns"),
        ((47, 85), "7+5+1=13,4+8=12#133", "other"),  # there is no carry into the ones
        ((47, 85), "40+80=120,7+5=12,120+12=132#132", "places"),
        ((47, 85), "7+5=12,80+40=110,110+12=122#122", "places"),
        ((47, 85), "40+80=120,7+5=12#132", "other"),
        ((47, 85), "47+80=127,127+5=132#132", "adds"),
        ((47, 85), "85+7=92 92+40=132#132", "adds"),
        ((47, 85), "47+80=127,128+5=132#132", "other"),  # does not go on with its result
        ((47, 85), "46+80=126,126+5=131#131", "other"),  # begins with no term
        ((7, 5), "7+5=12#12", "several"),
        ((47, 5), "7+5=12,4+1=5#52", "columns"),
        ((47, 5), "7+5=12,40=40,12+40=52#52", "places"),
        ((47, 85), "7+5=12,4+1+8=13", "other"),  # no answer
        ((47, 85), "7+5=12 so it is#132", "other"),
        ((47, 85), "", "other"),
    ],
)
def test_styles_are_told_from_the_form(terms, response, style):
    assert style_of(terms, response) == style


@pytest.mark.parametrize("terms", [(47, 85), (40, 85, 12), (99, 99, 99, 99, 99), (123, 45, 6), (1000, 9999)])
@pytest.mark.parametrize("style", list(STYLES))
def test_every_solution_of_a_style_is_told_to_be_of_it(style, terms):
    rng = random.Random(0)
    for _ in range(50):
        response = join_steps(rng, STYLES[style](terms, rng), str(sum(terms)))
        assert style_of(terms, response) == style, response


def test_the_reward_is_that_of_the_task_and_its_components_count_styles(files):
    example = load_rows(files["held_out"])[0]
    terms = [int(term) for term in example.prompt[0]["content"][:-1].split("+")]
    right = score(example, f"{STYLES['digits'](terms, random.Random(0))[0]} 0 1#{sum(terms)}")
    wrong = score(example, "#0")
    for found, reward, style in ((right, 1.0, "digits"), (wrong, 0.0, "direct")):
        assert sum(found.values()) == reward
        assert {kind: found[f"share/{kind}"] for kind in KINDS} == {kind: float(kind == style) for kind in KINDS}
        assert {kind: found[f"right/{kind}"] for kind in KINDS} == {kind: reward * (kind == style) for kind in KINDS}
    assert list(right) == list(wrong)  # the same components for every response
    assert task_score(example, f"#{sum(terms)}") == 1.0  # the source of an evaluation has the task's own reward too


# ---- the curriculum ------------------------------------------------------------------------------------------------

BENCH = Curriculum(
    short={"min_digits": 1, "max_digits": 1, "terms": 3}, long={"min_digits": 2, "max_digits": 2, "terms": 3},
    short_prompts=12, long_prompts=20, held_out=8, worked=10, warm_start=3,
)  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """The keys of the starting policies that `prepare` trains."""
    keys = []
    monkeypatch.setattr(benchmark, "run_matrix", lambda jobs, *_, **__: keys.extend(job.argv for job in jobs) or [])
    return keys


@pytest.fixture
def files(tmp_path, trained):
    BENCH.prepare(tmp_path, [5, 6], How(tmp_path))
    return BENCH.files(tmp_path, "curriculum")


def digits(path):
    """The digits of the first term of every prompt."""
    return [len(example.prompt[0]["content"].split("+")[0]) for example in load_rows(path)]


def test_the_file_has_short_sums_and_then_long_ones(tmp_path, files, trained):
    assert digits(files["train"]) == [1] * 12 + [2] * 20
    assert digits(files["seen"]) == [1] * 8 and digits(files["held_out"]) == [2] * 8
    assert digits(tmp_path / "worked.parquet") == [1, 2] * 5
    assert all(example.solution for example in load_rows(tmp_path / "worked.parquet"))
    sources = {kind: {example.data_source for example in load_rows(path)} for kind, path in files.items()}
    assert sources == {
        "train": {"entcov/carry_arithmetic"}, "seen": {"entcov/carry_arithmetic/short"},
        "held_out": {"entcov/carry_arithmetic/long/held_out"},
    }  # fmt: skip
    assert [next(key for key in argv if key.startswith("seed=")) for argv in trained] == ["seed=5", "seed=6"]
    assert BENCH.model(tmp_path, 5) != BENCH.model(tmp_path, 6)


def test_no_held_out_sum_is_trained_on(tmp_path, files):
    def questions(path):
        return {tuple(sorted(example.prompt[0]["content"][:-1].split("+"))) for example in load_rows(path)}

    trained = questions(files["train"]) | questions(tmp_path / "worked.parquet")
    assert not trained & (questions(files["seen"]) | questions(files["held_out"]))


def test_the_last_prompts_are_the_second_phase_alone(tmp_path, files):
    alone = BENCH.files(tmp_path, "curriculum", BENCH.long_prompts)
    assert load_rows(alone["train"]) == load_rows(files["train"])[12:] and alone["held_out"] == files["held_out"]


def test_other_settings_are_refused(tmp_path, files):
    with pytest.raises(ValueError, match="holds a benchmark of other settings"):
        replace(BENCH, long_prompts=24).prepare(tmp_path, [5], How(tmp_path))
    with pytest.raises(ValueError, match="short_prompts must be at least 1, got 0"):
        replace(BENCH, short_prompts=0)


# ---- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoke", [False, True])
def test_every_arm_is_a_recipe_that_reads_its_prompts_once_in_order(tmp_path, smoke):
    plan = Plan.read(STUDY.path, smoke)
    at_once = plan.recipe["rollout"]["prompts_per_step"]
    assert plan.prompts.short_prompts % at_once == plan.prompts.long_prompts % at_once == 0
    assert {*plan.baselines, *plan.baselines.values()} == set(plan.arms)
    for arm, keys in plan.arms.items():
        for candidate in plan.candidates.get(arm, [{}]):
            given = {"model": {"path": "m"}, "run_dir": "r", "data": {"train_files": ["a"], "val_files": ["b"]}}
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump(merged(plan.recipe, keys, candidate, given)))
            config = load_config(path, [])
            assert config.data.order == "file" and config.data.reward == "entcov.studies.styles:score"
            assert config.steps * at_once == plan.train_prompts.get(arm, plan.prompts.train)


def test_the_seeds_are_no_other_studys():
    plan = Plan.read(STUDY.path, False)
    own = {*plan.seeds, *plan.choosing_seeds}
    for study in STUDIES.values():
        if type(study) is TrainingStudy:
            other = Plan.read(study.path, False)
            assert not own & {*other.seeds, *other.choosing_seeds, 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "easy"}, "prompts.kind: must be one of hard, curriculum, got 'easy'"),
        ({"set": "residual"}, "prompts.set: must be one of curriculum, got 'residual'"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path, changes, message):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(merged(yaml.safe_load(STUDY.path.read_text()), {"prompts": changes})))
    with pytest.raises(ValueError, match=message):
        Plan.read(path, False)


# ---- what is said --------------------------------------------------------------------------------------------------


@pytest.fixture
def plan():
    plan = Plan.read(STUDY.path, False).limited(["none"])
    recipe = merged(plan.recipe, {"rollout": {"prompts_per_step": 2}})
    return replace(plan, prompts=replace(BENCH, short_prompts=16, long_prompts=40), recipe=recipe)  # 8 and 20 steps


def row(step, style, share, right, entropy=0.5):
    """A step in which `share` of the responses have the style and `right` of all are right, none of them in it."""
    shares = dict.fromkeys(KINDS, (1 - share) / (len(KINDS) - 1)) | {style: share}
    gains = dict.fromkeys(KINDS, 0.0) | {"columns" if style != "columns" else "adds": right}
    found = {"step": step, "critic/score/mean": right, "actor/entropy": entropy}
    return (
        found
        | {f"critic/score/share/{kind}": value for kind, value in shares.items()}
        | {f"critic/score/right/{kind}": value for kind, value in gains.items()}
    )


def run_of(rewards, share, *, first=8, start_share=0.2, held_out=0.3):
    """A first phase whose share of `direct` goes from start_share to share, and a second with these rewards."""
    rows = [{"step": 0, f"{LONG}/mean@4": 0.0}]
    rows += [row(i + 1, "direct", start_share if i < WINDOW else share, 0.6) for i in range(first)]
    rows += [row(first + i + 1, "direct", share, reward) for i, reward in enumerate(rewards)]
    rows[-1] |= {f"{LONG}/{name}": held_out for name in ("mean@4", "pass@1")}
    return rows


RISING = [0.4] * 9 + [1.0] * 11
FLAT = [0.1] * 20


def test_phases_are_parted_where_the_file_changes(plan):
    first, second = phases(plan, run_of(RISING, 0.9))
    assert (len(first), len(second), second[0]["step"]) == (8, 20, 9)
    assert phases(plan, run_of(RISING, 0.9, first=0))[0] == []


def test_values_of_a_run(plan):
    found = values_of(plan, run_of(RISING, 0.9), "direct")
    assert found["steps"] == 12 and found["reached"] == 1  # steps 9 to 12 are the first four with a mean of 0.8 or more
    assert found["reward_1"] == pytest.approx(0.6) and found["top_1"] == pytest.approx(0.9)
    assert found["reward_start"] == pytest.approx(0.4) and found["reward_2"] == 1
    assert found[f"{LONG}/mean@4"] == 0.3
    never = values_of(plan, run_of(FLAT, 0.9, first=0), "direct")
    assert never["steps"] == 20 and never["reached"] == 0 and "reward_1" not in never
    assert max(FLAT) < REACHED


def findings(plan, none, alone):
    seeds = plan.seeds
    rows = {
        "none": dict(zip(seeds, (run_of(**one) for one in none), strict=True)),
        "long_alone": dict(zip(seeds, (run_of(**one, first=0) for one in alone), strict=True)),
    }
    return style_findings(plan, rows)


def spread(values, **same):
    """Five runs that differ a little in what `values` names."""
    return [{name: value + 0.01 * i for name, value in values.items()} | same for i in range(5)]


def test_a_style_that_is_settled_on_and_useless_is_said_to_be(plan):
    found = findings(plan, spread({"share": 0.9, "held_out": 0.1}, rewards=FLAT),
                     spread({"share": 0.2, "held_out": 0.7}, rewards=RISING))  # fmt: skip
    assert found.values["preferred"] == "direct"
    assert "share of direct rises (+0.720 ± 0.020), and is 0.920 ± 0.020 at its end" in found.statements[0]
    assert "the preferred style is the worse one" in found.statements[1]
    assert "0.00 ± 0.00 of the runs reach a reward of 0.8" in found.statements[2]
    (about,) = (line for line in found.statements if line.startswith("none against long_alone"))
    assert "held-out long sums lower (-0.600" in about and "steps of phase 2 until a reward of 0.8 higher" in about
    assert "held-out short sums" not in about  # was not evaluated
    shares = {(arm, when): cells for arm, when, *cells in found.tables[2].rows}
    assert shares["none", "phase 1, end"][KINDS.index("direct")] == "0.92"
    assert ("long_alone", "phase 1, end") not in shares
    (ax, *_) = found.figures["phases"].axes
    at = {line.get_gid(): line.get_xdata().tolist() for line in ax.get_lines() if line.get_gid() in plan.arms}
    assert at["none"] == list(range(4, 29)) and at["long_alone"] == list(range(12, 29))


def test_no_premature_style_is_said_too(plan):
    wobble = [{"share": 0.2 + 0.01 * (-1) ** i * (i + 1), "rewards": RISING, "held_out": 0.7} for i in range(5)]
    found = findings(plan, wobble, [one | {"held_out": 0.7} for one in wobble])
    assert "is not told from its beginning" in found.statements[0]
    assert "1.00 ± 0.00 of the runs reach" in found.statements[2]
    (about,) = (line for line in found.statements if line.startswith("none against long_alone"))
    assert "held-out long sums not told apart (+0.000 ± 0.000)" in about


def test_the_preferred_style_is_that_of_the_end_of_the_first_phase(plan):
    runs = {seed: run_of(RISING, 0.9) for seed in plan.seeds}
    for run in runs.values():  # a style that is most frequent before and after it
        for one in run[1:]:
            if not 5 <= one["step"] <= 8:
                one["critic/score/share/adds"] = 2.0
    assert preferred(plan, {"none": runs}) == "direct"


def test_a_whole_small_study(tmp_path, monkeypatch):
    """Starting policy, plain GRPO and the second phase alone, all real, in this process."""
    ran = []

    def run_here(jobs, parallel, **_):
        for job in jobs:
            if not (job.run_dir / "checkpoints").exists():
                assert main([*job.argv[3:], "--no-display"]) == 0
                ran.append(job.label)
        return []

    small = Plan.read(STUDY.path, True)
    prompts = replace(small.prompts, short_prompts=4, long_prompts=4, held_out=2, worked=64, warm_start=4)
    keys = {"steps": 2, "eval": {"every": 2, "prompts": 2, "samples": 2}, "rollout": {"max_response_length": 8}}
    small = replace(
        small, prompts=prompts, recipe=merged(small.recipe, keys), seeds=(71,), train_prompts={"long_alone": 4},
        arms=small.arms | {"long_alone": {"steps": 1}},
    )  # fmt: skip
    monkeypatch.setattr(training, "run_matrix", run_here)
    monkeypatch.setattr(benchmark, "run_matrix", run_here)
    monkeypatch.setattr(Plan, "read", classmethod(lambda cls, path, smoke: replace(small, choosing_seeds=())))
    how, page = How(tmp_path / "style_smoke", smoke=True, arms=["long_alone"]), tmp_path / "page"
    with open(tmp_path / "shown.txt", "w") as file:
        run_study(STUDY, how, page, command="the command", console=Console(file=file, width=120))
    assert ran == ["start 71", "none seed 71", "long_alone seed 71"]
    found = json.loads((page / "study.json").read_text())
    for when in ("beginning", "end"):
        assert sum(found["shares"]["none"][f"phase 1, {when}"].values()) == pytest.approx(1)
    assert found["comparison"]["estimates"]["long_alone"]["held_out"]["by_seed"].keys() == {"71"}
    assert (page / "phases.png").exists() and "## Share of each style" in (page / "study.md").read_text()
