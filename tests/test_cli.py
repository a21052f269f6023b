"""The commands as a user types them: exit codes, what they print, what they leave."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest
import yaml

from entcov.cli import main
from entcov.cli.command_line import explain
from entcov.rl.recipe import ConfigError
from tests.support.tiny_run import recipe


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path / "run", steps=2)))
    return str(path)


def test_train_eval_plot(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", recipe_file, "eval.samples=1"]) == 0
    assert (run / "plots" / "overview.png").stat().st_size > 10_000
    assert "step 2/2" in capsys.readouterr().out
    assert main(["train", recipe_file, "eval.samples=1"]) == 0
    assert "is complete at step 2" in capsys.readouterr().out
    assert main(["eval", str(run), "eval.samples=3", "eval.temperature=0.6"]) == 0
    shown = capsys.readouterr().out
    row = next(line.split() for line in shown.splitlines() if line.startswith("entcov/carry_arithmetic"))
    assert f"{run}, step 2;" in shown and row[1:4] == ["8", "3", "0.6"]
    kept = json.loads((run / "eval" / "step_2.json").read_text())
    counts = kept["solve_counts"]["entcov/carry_arithmetic"]
    assert kept["settings"]["samples"] == counts["samples"] == 3 and len(counts["solved"]) == 8
    assert main(["plot", str(run), "--out", str(tmp_path / "plots")]) == 0
    assert (tmp_path / "plots" / "entropy.png").exists()
    assert main(["report", str(run)]) == 0
    assert "carry_arithmetic" in (run / "report.html").read_text()


def test_mistakes_are_one_line_of_stderr_and_exit_code_2(recipe_file, tmp_path, capsys):
    for arguments, message in (
        (["train", recipe_file, "actor.lr=-1"], "actor.lr: Input should be greater than 0, got -1"),
        (["train", str(tmp_path / "no.yaml")], "no.yaml is not a file"),
        (["train", recipe_file, "data.task=chess"], "unknown task 'chess'; known: carry_arithmetic"),
        (["eval", str(tmp_path / "no_run")], "run: must be the folder of a run"),
        (["plot", str(tmp_path / "no_run")], "metrics.jsonl does not exist"),
        (["compare", recipe_file, "--controls", "none,clip_cow"], "got 'clip_cow'"),
        (["compare", recipe_file, "--controls", "kl_cov:ppo_kl=2"], "no knob 'ppo_kl'"),
        (["compare", recipe_file, "--seeds", "a"], "--seeds: must be integers parted by commas, got 'a'"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_the_help_is_for_a_user(capsys):
    commands = ("train", "eval", "compare", "plot", "fit-law", "report", "data", "plan", "check")
    for arguments in ([], *([command] for command in commands)):
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--help"])
        shown = capsys.readouterr().out
        assert done.value.code == 0 and "usage: " in shown and "elsewhere" not in shown
        assert arguments or "A recipe is a YAML file" in shown


def test_overrides_may_stand_after_options(recipe_file, tmp_path, capsys):
    line = ["train", recipe_file, "steps=0", "--no-display", "eval.samples=1", "warm_start.steps=0", "eval.prompts=0"]
    assert main(line) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["steps"], saved["eval"]["samples"]) == (0, 1)


def test_the_installed_command_is_the_same():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["entcov"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_debug_shows_where_on_either_side_of_the_command(recipe_file):
    for line in (["--debug", "train", recipe_file, "actor.lr=-1"], ["train", recipe_file, "actor.lr=-1", "--debug"]):
        with pytest.raises(ConfigError, match="actor.lr"):
            main(line)


def test_a_missing_package_of_the_trainer_names_the_extra():
    assert explain(ModuleNotFoundError("No module named 'rich'", name="rich")) == (
        "error: No module named 'rich'. The trainer needs its extra: pip install 'entcov[train]'", 2
    )  # fmt: skip
    assert "extra" not in explain(ModuleNotFoundError("No module named 'mine'", name="mine"))[0]


def test_compare_measures_each_control_against_its_baseline(recipe_file, tmp_path, capsys):
    out = tmp_path / "comparison"
    arms = "none,kl_cov:kl_cov_ratio=0.2"
    assert main(["compare", recipe_file, "--controls", arms, "--seeds", "0", "--out", str(out), "--jobs", "2"]) == 0
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["baselines"] == {"kl_cov:kl_cov_ratio=0.2": "kl_cov@0"}
    assert set(comparison["estimates"]) == {"none", "kl_cov:kl_cov_ratio=0.2", "kl_cov@0"}
    first = {
        arm: json.loads((out / arm / "seed_0" / "metrics.jsonl").read_text().splitlines()[0])
        for arm in ("none", "kl_cov@0")
    }
    assert first["none"] == first["kl_cov@0"]  # the shared warm start, evaluated with the same draws
    assert "kl_cov@0" in (out / "comparison.md").read_text()
