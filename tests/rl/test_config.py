"""Recipes: what a wrong one is told, overrides, and the round trip of a resolved one."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from entcov.objective.advantages import ADVANTAGES
from entcov.objective.tokens import OBJECTIVE_KNOBS
from entcov.rl.data.prompt_policy import PREPO
from entcov.rl.load_config import load_config, parse_config, save_config
from entcov.rl.recipe import ConfigError
from entcov.rl.rewards.shaping import Overlong, Reactivate, RelativeLength
from entcov.rl.run import for_sampling
from tests.support.tiny_run import recipe


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path / "run")))
    return path


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("actor.learning_rate", 1.0, "actor.learning_rate: unknown key"),
        ("rollouts", {}, "rollouts: unknown key"),
        ("actor.lr", -1.0, "actor.lr: .*greater than 0, got -1"),
        ("actor.lr", "fast", "actor.lr: .*number.*got 'fast'"),
        ("rollout.group_size", 0, "rollout.group_size: .*greater than or equal to 1, got 0"),
        ("rollout.temperature", 0.0, "rollout.temperature: .*greater than 0"),
        ("steps", 1.5, "steps: .*integer.*got 1.5"),
        ("advantage", "gae", "advantage: must be one of grpo.*got 'gae'"),
        ("control", ["clip_cow"], "control: must be one of none, .*clip_cov.*got 'clip_cow'"),
        ("controls.kl_cov", {"kl_cov_ratio": 20}, "controls.kl_cov: kl_cov_ratio .*20.*fraction, not a percent"),
        ("controls.kl_cov", {"kl_coef": 1}, "controls.kl_cov: .*no knob 'kl_coef'"),
        ("controls.aent", {"clamp_p": 33}, "controls.aent: clamp_p .*33"),
        ("loss", {"clip_low": 20}, "clip_low .*20"),
        ("loss", {"clip_lo": 0.2}, "loss.clip_lo: unknown key"),
        ("loss", {"aggregation": "mean"}, "aggregation .*'mean'"),
        ("model.path", "somewhere", "model: exactly one of path and config"),
        ("model.tokenizer", None, "model.tokenizer must be given"),
        ("data.train_files", ["x.parquet"], "data: exactly one of task and train_files"),
        ("actor.updates_per_rollout", 7, "updates_per_rollout: must not exceed rollout.prompts_per_step .*7 > 6"),
    ],
)
def test_a_wrong_key_is_named_with_its_rule_and_value(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(recipe(tmp_path, **{key: value}))


def test_all_mistakes_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        parse_config(recipe(tmp_path, **{"actor.lr": -1, "seed": -1, "wat": 1}))
    assert len(str(error.value).splitlines()) == 4


def test_overrides(recipe_file):
    config = load_config(
        recipe_file,
        ["actor.lr=0.5", "control=[clip_cov,kl_cov]", "controls.clip_cov.clip_cov_ratio=0.25", "data.settings.terms=3"],
    )
    assert config.actor.lr == 0.5 and config.data.settings["terms"] == 3
    clip_cov, kl_cov = config.build_controls()
    assert (clip_cov.name, clip_cov.clip_cov_ratio, kl_cov.name) == ("clip_cov", 0.25, "kl_cov")
    for override, message in (
        ("actor.lr", "must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("actor.lr=", "actor.lr"),
        ("actor.speed=3", "actor.speed: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(recipe_file, [override])


def test_a_saved_config_loads_to_the_same_run(recipe_file, tmp_path):
    config = load_config(recipe_file, ["control=[aent]", "controls.aent.entropy_coef=0.005", "loss.dual_clip=3"])
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml is not a file"):
        load_config(tmp_path / "nowhere.yaml")
    for text in ("a: [1", "- 1\n- 2\n", ": : :"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match="bad.yaml"):
            load_config(tmp_path / "bad.yaml")


MEAN = "seq-mean-token-mean"


def test_a_recipe_names_its_reward_shapings_and_its_prompt_policy(tmp_path):
    tree = recipe(
        tmp_path,
        reward_shaping=["rlr", "overlong", "reactivate"],
        reward_shapings={"overlong": {"buffer": 4, "factor": 0.5}, "rlr": {"length_base": 1000}},
        prompt_policy="prepo",
        prompt_policies={"prepo": {"oversample": 3}, "erpo": {"increment": 0.1}},
    )
    config = parse_config(tree)
    assert config.build_reward_shapings() == [RelativeLength(length_base=1000), Overlong(4, 0.5), Reactivate()]
    assert config.build_prompt_policy() == PREPO(oversample=3)
    plain = parse_config(recipe(tmp_path))
    assert plain.build_reward_shapings() == [] and plain.build_prompt_policy() is None
    files = {"train_files": ["x.jsonl"], "order": "file"}
    for name, knobs in (("erpo", {"increment": 0.1}), ("greso", {"p_easy": 0.3})):
        tree = recipe(tmp_path, data=files, prompt_policy=name, prompt_policies={name: knobs}, **{"eval.prompts": 0})
        policy = parse_config(tree).build_prompt_policy()
        assert policy.name == name and {knob: getattr(policy, knob) for knob in knobs} == knobs
    sampled = for_sampling(parse_config(tree | {"loss": {"kl_coef": 0.1, "kl_estimator": "k1", "kl_weight": "ratio"}}))
    assert sampled.build_reward_shapings() == [] and sampled.build_prompt_policy() is None


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_every_advantage_is_chosen_by_name_with_its_knobs(name):
    changed = {"grpo": {"scale_rewards": "batch"}, "w_reinforce": {"weight": 0.5}}.get(name, {})
    config = parse_config(recipe("unused", advantage=name, advantages={"dr_grpo": {}, name: changed}))
    estimator = config.build_estimator()
    assert type(estimator) is ADVANTAGES[name] and all(getattr(estimator, k) == v for k, v in changed.items())


@pytest.mark.parametrize("name", sorted(OBJECTIVE_KNOBS))
def test_every_objective_is_chosen_by_name(name, tmp_path):
    loss = {"objective": name, "aggregation": MEAN, "tis_cap": 2.0, "tis_level": "sequence"}
    loss |= {"dro": {"dro_beta": 0.1}, "vespo": {"tis_level": "token", "vespo_k_pos": 1}}.get(name, {})
    config = parse_config(recipe("unused", loss=loss, rollout_rs={"level": "token", "high": 2}))
    save_config(config, tmp_path / "recipe.yaml")
    again = load_config(tmp_path / "recipe.yaml")
    assert again == config and (again.loss.objective, again.rollout_rs.high) == (name, 2)
