"""Studies of training runs: choosing and reporting are apart, statements follow the numbers, a whole small study."""

import json
import math
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from entcov.cli import main
from entcov.report.run_matrix import Failure
from entcov.studies import benchmark, hard_prompts, training
from entcov.studies.base import How, StudyError
from entcov.studies.page import run_study
from entcov.studies.plan import Plan
from entcov.studies.training import TrainingStudy, evaluate

HELD_OUT = "val-core/entcov/countdown/held_out/acc"


def rows_of(held_out, entropy=0.1, reward=0.5):
    rows = [{"step": step, "actor/entropy": entropy, "critic/score/mean": reward} for step in range(1, 11)]
    rows[-1] |= {f"{HELD_OUT}/mean@4": held_out, f"{HELD_OUT}/best@4/mean": held_out, f"{HELD_OUT}/pass@1": held_out}
    return rows


@pytest.fixture
def faked(monkeypatch):
    """Runs whose held-out accuracy is that of `score`(recipe); returns what was run, in order."""
    ran = []

    def run(jobs, parallel, **_):
        for job in jobs:
            recipe = yaml.safe_load((job.run_dir / "recipe.yaml").read_text())
            ran.append(recipe)
            lines = [json.dumps(row) for row in rows_of(run.score(recipe))]
            (job.run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return run.failures

    run.score, run.failures, run.ran = None, [], ran
    monkeypatch.setattr(training, "run_matrix", run)
    monkeypatch.setattr(hard_prompts.HardPrompts, "prepare", lambda *_: None)
    return run


def knob(recipe):
    """The strength of Clip-Cov; 0 for another arm."""
    return recipe.get("controls", {}).get("clip_cov", {}).get("clip_cov_ratio", 0.0)


def test_strengths_are_chosen_on_the_choosing_seed_alone(tmp_path, faked):
    """On the choosing seed the stronger one is better, on the reported seeds worse: it is reported all the same."""
    faked.score = lambda recipe: 0.5 + (knob(recipe) if recipe["seed"] == 1 else -knob(recipe))
    how = How(tmp_path / "controls", arms=["clip_cov"])
    plan, rows, chosen, tried = TrainingStudy("controls").trained(how)
    assert chosen == {"clip_cov": {"controls": {"clip_cov": {"clip_cov_ratio": 0.015}}}}
    assert tried == {"clip_cov": pytest.approx([0.505, 0.515])}
    assert {recipe["seed"] for recipe in faked.ran[:2]} == {1} and len(faked.ran) == 2 + 2 * 5
    assert {knob(recipe) for recipe in faked.ran[2:]} == {0.0, 0.015}
    assert {recipe["seed"] for recipe in faked.ran[2:]} == set(plan.seeds)
    assert json.loads((tmp_path / "controls/chosen.json").read_text())["chosen"] == chosen
    assert rows["clip_cov"][plan.seeds[0]][-1][f"{HELD_OUT}/mean@4"] == pytest.approx(0.485)


def test_a_failed_run_ends_the_study_with_its_log(tmp_path, faked):
    faked.score, faked.failures = (
        lambda recipe: 0.5,
        [Failure("none seed 11", "exit 1", tmp_path / "log.txt", "no disk")],
    )
    with pytest.raises(StudyError, match="none seed 11 failed .exit 1., end of .*log.txt:\nno disk"):
        TrainingStudy("controls").run(How(tmp_path / "controls", arms=["none"]))


def test_runs_get_the_policy_and_the_prompts_of_their_seed_and_arm(tmp_path, faked, monkeypatch):
    faked.score = lambda recipe: 0.5
    monkeypatch.setattr(hard_prompts, "load_rows", lambda path: [])
    monkeypatch.setattr(hard_prompts, "write_rows", lambda rows, path: None)
    TrainingStudy("prompts").run(How(tmp_path / "prompts", arms=["64_clip_cov"]))
    first, second = faked.ran[:2]
    bench = tmp_path / "hard_prompts"
    assert first["model"]["path"] == f"{bench}/starts/seed_41/checkpoints/step_0/model"
    assert first["data"]["train_files"] == [f"{bench}/residual_train_64.parquet"]
    assert second["data"]["val_files"] == [f"{bench}/residual_seen_64.parquet", f"{bench}/residual_held_out.parquet"]
    assert "control" not in first and second["control"] == ["clip_cov"]


@pytest.fixture
def plan():
    return Plan.read(TrainingStudy("controls").path, False).limited(["clip_cov"])


@pytest.mark.parametrize(("by", "said"), [(0.1, "higher"), (-0.1, "lower"), (0.0, "not told apart")])
def test_statements_follow_the_intervals(plan, by, said):
    noise = [0.01, -0.01, 0.02, -0.02, 0.0]
    pairs = list(zip(plan.seeds, noise, strict=True))
    rows = {
        "none": {seed: rows_of(0.3 + 10 * x) for seed, x in pairs},  # seeds differ by much more than arms
        "clip_cov": {seed: rows_of(0.3 + 10 * x + by + x, entropy=0.2) for seed, x in pairs},
    }
    found = evaluate(plan, rows, {}, {})
    (about,) = (line for line in found.statements if line.startswith("clip_cov against none"))
    assert f"held-out pass@1 {said} ({by:+.3f} ± 0.020)" in about  # t(4) 0.0158 / sqrt 5 = 0.0196
    assert "final entropy, nats higher (+0.100 ± 0.000)" in about
    assert "5 seeds then resolve 0.062" in found.statements[0]
    assert found.values["comparison"]["differences"]["clip_cov"]["held_out"]["mean"] == pytest.approx(by)


def test_figures_show_the_curves_and_the_differences(plan):
    def run(value, start=0.1):
        rows = rows_of(value)
        rows[0] |= {f"{HELD_OUT}/pass@{k}": start * k for k in (1, 2)}
        return [*rows[:-1], rows[-1] | {f"{HELD_OUT}/pass@{k}": value * k for k in (1, 2)}]

    plan = replace(plan, seeds=(11, 12))
    rows = {"none": {11: run(0.2), 12: run(0.3)}, "clip_cov": {11: run(0.3), 12: run(0.4)}}
    figures = evaluate(plan, rows, {}, {}).figures
    (ax,) = figures["pass_at_k"].axes
    shown = {line.get_gid(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert shown["start"] == [[1, 0.1], [2, 0.2]] and shown["none"] == [[1, 0.25], [2, 0.5]]
    assert shown["clip_cov"] == [[1, pytest.approx(0.35)], [2, pytest.approx(0.7)]]
    panel = figures["differences"].axes[0]
    assert panel.get_title("left") == "held-out pass@1" and panel.get_yticklabels()[0].get_text() == "clip_cov − none"
    assert panel.containers[0].lines[0].get_xdata() == pytest.approx([0.1])


def test_accuracies_of_training_prompts_are_not_drawn_as_held_out(plan):
    rows = rows_of(0.2)
    rows[-1] |= {f"{HELD_OUT.replace('held_out', 'seen')}/mean@4": 0.8}
    plan = replace(plan, seeds=(11,), arms={"none": {}}, baselines={})
    figure = evaluate(plan, {"none": {11: rows}}, {}, {}).figures["overview"]
    lines = {line.get_gid(): line.get_ydata() for ax in figure.axes for line in ax.get_lines()}
    assert lines["mean@4:none"] == pytest.approx([0.2])
    assert "held-out accuracy, mean@4" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_many_arms_are_named_where_they_differ_from_their_baseline(plan):
    def run(value):
        return [row | {f"{HELD_OUT}/pass@{k}": value * k for k in (1, 16)} for row in rows_of(value)]

    likes = [f"like_none_{i}" for i in range(8)]
    ends = {"none": 0.02, "clip_cov": 0.05} | dict.fromkeys(likes, 0.02)
    arms = dict.fromkeys(ends, {})
    plan = replace(plan, seeds=(11, 12, 13), arms=arms, baselines={arm: "none" for arm in arms if arm != "none"})
    rows = {
        arm: {seed: run(end + 0.001 * i * (-1) ** (i * (arm in likes))) for i, seed in enumerate(plan.seeds)}
        for arm, end in ends.items()
    }
    figures = evaluate(plan, rows, {}, {}).figures
    (ax,) = figures["pass_at_k"].axes
    assert {line.get_gid() for line in ax.get_lines()} == {"start", *arms}
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[0] == "clip_cov" and set(names) == {"start", "none", "clip_cov", "8 arms not told from their baseline"}
    colours = {line.get_gid(): line.get_color() for line in ax.get_lines()}
    assert len({colours[arm] for arm in likes}) == 1 and len(set(colours.values())) == 4
    names = [text.get_text() for text in figures["overview"].legends[0].get_texts()]
    assert names[:2] == ["none (3 seeds)", "clip_cov (3 seeds)"] and not any("like_none" in name for name in names)
    assert "without 8 arms not told" in figures["overview"].texts[-1].get_text()


def test_one_seed_has_no_interval_and_says_nothing(plan):
    plan = replace(plan, seeds=(11,))
    found = evaluate(plan, {"none": {11: rows_of(0.3)}, "clip_cov": {11: rows_of(0.4)}}, {}, {})
    assert not [line for line in found.statements if "against" in line] and "resolve" not in found.statements[0][-20:]
    assert math.isnan(found.values["comparison"]["differences"]["clip_cov"]["held_out"]["half_width"])


def test_a_whole_small_study(tmp_path, monkeypatch):
    """Starting policies, ranked prompts, choosing and reported runs, all real, in this process."""

    def run_here(jobs, parallel, **_):
        for job in jobs:
            if not (job.run_dir / "checkpoints").exists():
                assert main([*job.argv[3:], "--no-display"]) == 0
                ran.append(job.label)
        return []

    ran = []
    tiny = merged_smoke()
    monkeypatch.setattr(training, "run_matrix", run_here)
    monkeypatch.setattr(benchmark, "run_matrix", run_here)
    monkeypatch.setattr(Plan, "read", classmethod(lambda cls, path, smoke: tiny))
    how, page = How(tmp_path / "controls_smoke", smoke=True, arms=["clip_cov"]), tmp_path / "page"
    study, console = TrainingStudy("controls"), Console(file=open(tmp_path / "shown.txt", "w"), width=120)
    run_study(study, how, page, command="the command", console=console)
    assert ran[:3] == ["start 1000", "start 1", "start 11"] and len(ran) == 3 + 2 + 2
    text = (page / "study.md").read_text()
    assert (
        "The smoke version" in text
        and "the command" in text
        and "| clip_cov | none |" in text
        and (page / "overview.png").exists()
    )
    counts = tiny.prompts.solve_counts(tmp_path / "hard_prompts_smoke")
    assert sum(counts.histogram) == tiny.prompts.pool and counts.samples == tiny.prompts.samples
    run_study(study, how, page, command="the command", console=console)
    assert len(ran) == 7  # nothing was run again
    with pytest.raises(ValueError, match="holds a benchmark of other settings"):
        replace(tiny.prompts, pool=41).prepare(tmp_path / "hard_prompts_smoke", [11], how)


def merged_smoke() -> Plan:
    plan = Plan.read(TrainingStudy("controls").path, True)
    prompts = replace(plan.prompts, pool=40, samples=2, most=2, train=8, held_out=4, seen=4, warm_start=30)
    recipe = plan.recipe | {"steps": 1, "eval": {"every": 1, "prompts": 4, "samples": 2}}
    return replace(plan, prompts=prompts, recipe=recipe, seeds=(11,))
