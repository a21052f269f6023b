"""The published settings: how a recipe takes one, and that the controls' defaults, the recipes and the docs agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from entcov.controls import CONTROLS
from entcov.controls.published import PUBLISHED
from entcov.rl.load_config import load_config
from entcov.rl.recipe import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TINY = (ROOT / "examples/tiny_cpu.yaml").read_text()


def knobs(name: str) -> tuple[str, dict]:
    """(control, knobs) of a setting with a control."""
    ((control, values),) = PUBLISHED[name].keys["controls"].items()
    return control, values


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "clip_cov", "kl_cov", "aent_math", "entropy_bonus", "skywork", "clip_b", "clip_v", "high_entropy_tokens",
        "entropy_advantage", "positive_advantage_reweighting", "entropic", "sent",
        "entropy_ratio_clip", "adaptive_clip",
    ],
)  # fmt: skip
def test_the_defaults_of_a_control_are_a_published_setting(name):
    control, values = knobs(name)
    assert CONTROLS[control](**values) == CONTROLS[control]()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_is_in_force_on_the_command_line(name):
    """Over the recipe's own keys: tiny_cpu.yaml has a clip and knobs of its own."""
    config = load_config(ROOT / "examples/tiny_cpu.yaml", [f"preset={name}"])
    keys = PUBLISHED[name].keys
    assert config.control == keys["control"] and PUBLISHED[name].source
    assert {key: getattr(config.loss, key) for key in keys.get("loss", {})} == keys.get("loss", {})
    for estimator, wanted in keys.get("advantages", {}).items():
        assert config.advantage == estimator
        assert {key: getattr(config.build_estimator(), key) for key in wanted} == wanted
    for control in config.build_controls():
        wanted = keys["controls"][control.name]
        assert {key: getattr(control, key) for key in wanted} == wanted


def test_the_last_word_on_the_command_line_counts():
    words = ["loss.clip_low=0.1", "preset=clip_higher", "loss.clip_high=0.3"]
    config = load_config(ROOT / "examples/tiny_cpu.yaml", words)
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.3)
    config = load_config(ROOT / "examples/aent_math_1.5b.yaml", ["preset=clip_cov"])
    assert config.control == ["clip_cov"] and config.loss.clip_low == 1.0
    assert config.loss.dual_clip is None  # not that of the recipe's own setting


def test_keys_of_a_recipe_win_over_its_preset(tmp_path):
    config = load_config(written(tmp_path, TINY + "preset: kl_cov_32b\n"))
    assert config.control == ["kl_cov"] and config.controls["kl_cov"]["kl_cov_ratio"] == 0.1  # tiny_cpu.yaml's
    assert config.loss.clip_low == 1.0


@pytest.mark.parametrize("name", ["clip_cow", "3", "[grpo]", "", "${oc.env:HOME}"])
def test_an_unknown_preset_is_named_and_nothing_is_resolved(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", "secret")
    for recipe, overrides in (
        (written(tmp_path, TINY), [f"preset={name}"]),
        (written(tmp_path, f"{TINY}preset: {name}\n"), []),
    ):
        written(tmp_path, TINY if overrides else f"{TINY}preset: {name}\n")
        with pytest.raises(ConfigError, match="preset must be one of grpo, .*skywork, .*; got ") as error:
            load_config(recipe, overrides)
        assert "secret" not in str(error.value) and "\n" not in str(error.value)
        assert ("did you mean clip_cov?" in str(error.value)) == (name == "clip_cow")


def test_the_32b_recipe_has_its_own_setting_s_share_of_tokens():
    config = load_config(ROOT / "examples/qwen2.5_32b_dapo_math.yaml", ["control=[kl_cov]"])
    (control,) = config.build_controls()
    assert control == CONTROLS["kl_cov"](**knobs("kl_cov_32b")[1])


def test_the_docs_have_every_setting():
    page = (ROOT / "docs/methods.md").read_text()

    def shown(values):
        return ", ".join(
            f"{key} {x if isinstance(x, str) else format(x, 'g')}" for key, x in values.items() if x is not None
        )

    for name, setting in PUBLISHED.items():
        loss = setting.keys.get("loss")
        cells = [shown(loss)] if loss else []
        cells += [f"{control}: {shown(values)}" for control, values in setting.keys["controls"].items()]
        cells += [f"{advantage}: {shown(values)}" for advantage, values in setting.keys.get("advantages", {}).items()]
        assert f"| `{name}` | {'; '.join(cells)} | {setting.source} |" in page, name
