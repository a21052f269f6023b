"""A run's folder: no secret in it, no run that goes on with other values, nothing that a stranger's file may do."""

from __future__ import annotations

import importlib.machinery
import json
import stat
import sys
import types
from pathlib import Path

import pytest
import yaml

from entcov.cli import main
from entcov.rl.load_config import load_config, save_config
from entcov.rl.recipe import ConfigError
from entcov.rl.run import train
from entcov.rl.stored_recipe import check_same_recipe, load_run, store_recipe
from tests.support.tiny_run import recipe

SECRET = "s3cret-of-the-user-0123456789"


def go_on(run, config):
    """What a start does with the folder's recipe."""
    check_same_recipe(run, config)
    store_recipe(run, config)


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """write(key=value ...) -> the path of a recipe with these keys; two variables are in the environment."""
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("SOME_LENGTH", "12")

    def write(**overrides) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(tmp_path / "run", **overrides)))
        return path

    return write


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_no_byte_of_a_run_s_folder_holds_a_secret_from_the_environment(tmp_path, recipe_file, monkeypatch):
    given = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: (
        given.append(settings) or types.SimpleNamespace(id="1", log=lambda *_, **__: None, finish=lambda: None)
    )
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    arguments = {"hf_token": "${logging.wandb.settings.api_key}", "list": ["a", "x-${oc.env:SOME_TOKEN}"]}
    path = recipe_file(**{
        "logging": {"tensorboard": True, "wandb": {"project": "p", "settings": {"api_key": "${oc.env:SOME_TOKEN}"}}},
        "rollout.vllm": {"engine_args": arguments}, "data.max_prompt_length": "${oc.decode:${oc.env:SOME_LENGTH}}",
        "steps": 1, "warm_start.steps": 1, "eval.prompts": 1,
    })  # fmt: skip
    overrides = ["eval.sources.b.samples=3", "logging.wandb.notes=${oc.env:SOME_TOKEN}"]
    config = load_config(path, overrides)
    assert config.rollout.vllm.engine_args == {"hf_token": SECRET, "list": ["a", f"x-{SECRET}"]}
    assert config.logging.wandb["notes"] == SECRET and config.data.max_prompt_length == 12
    train(config, display=False)
    assert given[0]["settings"]["api_key"] == SECRET
    assert len(list((tmp_path / "run").rglob("*"))) > 15 and holding(tmp_path / "run", SECRET) == []
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["logging"]["wandb"]["settings"]["api_key"] == stored["logging"]["wandb"]["notes"] == overrides[1][20:]
    assert stored["rollout"]["vllm"]["engine_args"]["list"] == ["a", "x-${oc.env:SOME_TOKEN}"]
    digests = tmp_path / "run" / "config.digests.json"
    assert list(json.loads(digests.read_text())["values"]) == ["data.max_prompt_length"]  # nothing of what is free
    assert stat.S_IMODE(digests.stat().st_mode) == 0o600

    train(load_config(path, [*overrides, "steps=2"]), display=False)  # goes on
    monkeypatch.setenv("SOME_TOKEN", "another-secret")  # so may a run with a new token
    go_on(tmp_path / "run", load_config(path, overrides))
    monkeypatch.setenv("SOME_LENGTH", "11")
    changed = r"another recipe.*:\n  data.max_prompt_length: was '\$\{oc.decode:.*, which has another value now$"
    with pytest.raises(ConfigError, match=changed):
        go_on(tmp_path / "run", load_config(path, overrides))
    assert holding(tmp_path / "run", SECRET) == holding(tmp_path / "run", "another-secret") == []


def test_what_decides_a_run_is_compared_by_value_however_it_is_written(tmp_path, recipe_file, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()

    def claim(**overrides):
        go_on(run, load_config(recipe_file(**overrides)))

    claim(**{"model.config.hidden_size": "${oc.decode:${oc.env:SOME_LENGTH}}", "data.settings.seed": "${steps}"})
    claim(**{"model.config.hidden_size": 12, "data.settings.seed": 3})  # the same values, spelt out
    assert not (run / "config.digests.json").exists()
    claim(**{"model.config.hidden_size": "${oc.decode:${oc.env:SOME_LENGTH}}", "data.settings.seed": 3})
    with pytest.raises(ConfigError, match=r"model.config.hidden_size: was '\$\{oc.decode:.*', is 13$"):
        claim(**{"model.config.hidden_size": 13, "data.settings.seed": 3})
    monkeypatch.delenv("SOME_LENGTH")
    with pytest.raises(ConfigError, match=f"{run}/config.yaml: .*Environment variable 'SOME_LENGTH' not found"):
        claim(**{"model.config.hidden_size": 12, "data.settings.seed": 3})
    monkeypatch.setenv("SOME_LENGTH", "12")
    (run / "config.digests.json").write_text("{}")
    with pytest.raises(ConfigError, match="config.digests.json is damaged"):
        claim(**{"model.config.hidden_size": 12, "data.settings.seed": 3})


def test_digests_have_a_salt_of_their_own_and_are_closed_to_others(tmp_path, recipe_file):
    """So that nobody looks a value up in a table of digests, or sees that two runs have the same one."""
    config = load_config(recipe_file(**{"data.settings.key": "${oc.env:SOME_TOKEN}", "data.max_prompt_length": 16}))
    digests = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        store_recipe(tmp_path / name, config)
        file = tmp_path / name / "config.digests.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        digests.append(json.loads(file.read_text())["values"]["data.settings.key"])
    assert digests[0] != digests[1] and SECRET not in digests


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("actor.lr", "${oc.env:SOME_TOKEN}", r"actor.lr: .*got '\$\{oc.env:SOME_TOKEN\}'"),
        ("advantage", "${oc.env:SOME_TOKEN}", r"advantage: must be one of .*got '\$\{oc.env:SOME_TOKEN\}'"),
        ("logging.wandb", "${oc.env:SOME_TOKEN}", r"logging.wandb: .*got '\$\{oc.env:SOME_TOKEN\}'"),
        ("eval", {"x": "a-${oc.env:SOME_TOKEN}"}, "eval.x: unknown key"),
        ("control", ["none", "${oc.env:SOME_TOKEN}"], "control: must be one of .*got .*SOME_TOKEN"),
        ("data.train_files", {"a": ["${oc.env:SOME_TOKEN}"]}, "data.train_files: .*SOME_TOKEN"),
    ],
)
def test_an_error_shows_the_interpolation_and_not_its_value(recipe_file, key, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(recipe_file(**{key: value}))
    assert SECRET not in str(error.value)


def test_a_value_that_a_message_cuts_is_not_shown_in_part(recipe_file, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "sk-" + "0123456789" * 20)
    for key in ("advantage", "data.settings"):
        with pytest.raises(ConfigError) as error:
            load_config(recipe_file(**{key: "${oc.env:SOME_TOKEN}"}))
        assert "sk-0" not in str(error.value) and "${oc.env:SOME_TOKEN}" in str(error.value)


def test_a_key_that_the_program_has_changed_is_stored_as_it_is(tmp_path, recipe_file):
    config = load_config(recipe_file(**{"logging.wandb": {"a": "${oc.env:SOME_TOKEN}", "b": r"\${kept}"}}))
    assert config.logging.wandb == {"a": SECRET, "b": "${kept}"}
    config.logging.wandb["a"] = "mine"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").logging.wandb == {"a": "mine", "b": "${kept}"}


# ---- a stranger's run ----------------------------------------------------------------------------------------------


def reward(example, response: str) -> float:
    return 1.0


@pytest.fixture
def strangers(tmp_path):
    """make(key=value ...) -> a run's folder whose config.yaml says so."""

    def make(**overrides) -> Path:
        folder = tmp_path / "stranger"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe(folder, **overrides)))
        return folder

    return make


SERVER = {"mode": "server", "url": "http://stranger.example:80"}
WANTS = [
    ({"data.reward": "tests.stranger:reward"}, "data.reward: 'tests.stranger:reward' imports a module"),
    ({"data.task": "tests.stranger:Task"}, "data.task: 'tests.stranger:Task' imports a module"),
    ({"data": "${eval.x}", "eval.x": {"task": "tests.stranger:Task"}}, "x: unknown key"),
    (
        {"data.reward": "${logging.wandb.a}", "logging.wandb": {"a": "tests.stranger:reward"}},
        "data.reward: .*imports a",
    ),
    ({"seed": "${oc.decode:${oc.env:SOME_LENGTH}}"}, "seed: .* reads more than other keys"),
    ({"model.config.x": ["b", "${oc.${advantage}:SOME_TOKEN}"]}, "model.config.x: .* reads more than other keys"),
    ({"data.settings": {"a": "http://e/${oc.env:SOME_TOKEN}"}}, "data.settings.a: .* reads more than other keys"),
    ({"model.attn_implementation": "stranger/kernel"}, "runs a kernel from the Hugging Face hub"),
    (
        {"rollout.sampler": "vllm", "rollout.vllm": SERVER},
        "rollout.vllm.url: 'http://stranger.example:80' sends prompts",
    ),
    (
        {"rollout.sampler": "vllm", "rollout.vllm": {"engine_args": {"trust_remote_code": True}}},
        "rollout.vllm.engine_args: {'trust_remote_code': True} may import modules",
    ),
]


@pytest.mark.parametrize("overrides, message", WANTS)
def test_a_stranger_s_config_is_refused_by_name_before_anything_of_it_is_done(
    strangers, monkeypatch, capsys, overrides, message
):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("SOME_LENGTH", "12")
    folder = strangers(**overrides)
    with pytest.raises(ConfigError, match=message) as error:
        load_run(folder, [], trusted=False)
    assert main(["eval", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {error.value}\n"
    assert SECRET not in str(error.value) and "tests.stranger" not in sys.modules
    assert "--trust-run" in str(error.value) or "unknown key" in message


def test_tokens_for_logging_are_not_read_to_evaluate(strangers, monkeypatch):
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    folder = strangers(**{"logging.wandb": {"settings": {"api_key": "${oc.env:SOME_TOKEN}"}}})
    assert load_run(folder, [], trusted=False).logging.wandb == {"settings": {"api_key": None}}


def test_what_the_user_says_is_the_user_s_own(strangers, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    key = "rollout.vllm.engine_args"
    folder = strangers(**{"data.reward": "tests.stranger:reward", key: {"a": "${oc.env:SOME_TOKEN}"}})
    config = load_run(folder, [], trusted=True)
    assert config.data.reward == "tests.stranger:reward" and config.rollout.vllm.engine_args == {"a": SECRET}
    own = "tests.rl.test_stored_recipe:reward"
    config = load_run(folder, [f"data.reward={own}", f"{key}.a=${{oc.env:SOME_TOKEN}}"], trusted=False)
    assert config.data.reward == own and config.rollout.vllm.engine_args == {"a": SECRET}
    assert config.run_dir == str(folder)
    folder = strangers(**{key: {"a": 1, "ab": "${oc.env:SOME_TOKEN}"}})
    for beside in (f"{key}.a=1", f"{key}.abc=1", f"{key}.b=1"):
        with pytest.raises(ConfigError, match=f"{key}.ab: "):
            load_run(folder, [beside], trusted=False)
    folder = strangers(**{"data.reward": "tests.stranger:reward"})
    with pytest.raises(ConfigError, match="data.reward"):
        load_run(folder, ["data.overlong=filter"], trusted=False)


def test_an_own_run_of_the_trainer_s_own_parts_needs_no_trust(strangers):
    vllm = {"engine_args": {"max_num_batched_tokens": 64}}  # of another sampler than this run's
    plain = {"seed": 3, "data.settings.seed": "${seed}", "rollout.vllm": vllm}
    assert load_run(strangers(**plain), ["eval.samples=3"], trusted=False).data.settings["seed"] == 3
