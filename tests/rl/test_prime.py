"""Runs with PRIME: what they leave, that they continue bit for bit, and that no half of a step is ever stored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from entcov.rl.load_config import load_config, parse_config
from entcov.rl.loop import Loop
from entcov.rl.recipe import ConfigError
from entcov.rl.record.checkpoint import load_latest
from entcov.rl.run import evaluate_run, train
from tests.support.tiny_run import recipe, timeless

PRIME = {
    "advantage": "prime", "prime": {"lr": 1e-3, "updates_per_rollout": 2, "beta_train": 0.5}, "warm_start.steps": 0,
    "eval.prompts": 0, "data.reward": "tests.rl.test_prime:even",
}  # fmt: skip


def even(example, text: str) -> float:
    """A reward that an untrained policy gets now and then."""
    return float(sum(map(ord, text[:1])) % 2 == 0)


def run(run_dir: Path, **overrides) -> list[dict[str, float]]:
    train(parse_config(recipe(run_dir, **(PRIME | overrides))), display=False)
    return timeless(run_dir)


def weights(run_dir: Path) -> list[bytes]:
    stored = load_latest(run_dir / "checkpoints")
    return [(stored.file(name) / "model.safetensors").read_bytes() for name in ("model", "reward_model")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[list[dict[str, float]], list[bytes]]:
    folder = tmp_path_factory.mktemp("straight")
    return run(folder), weights(folder)


def test_a_resumed_run_continues_bit_for_bit(straight, tmp_path):
    run(tmp_path, steps=1)
    assert (run(tmp_path), weights(tmp_path)) == straight
    rows = straight[0]
    assert rows[0]["reward_model/dpo_loss"] == pytest.approx(math.log(2), rel=0.2)
    for row in rows:
        assert row["reward_model/lr"] == 1e-3 and row["reward_model/grad_norm"] > 0
        assert 0 <= row["reward_model/dpo_acc"] <= 1
        assert row["critic/advantages/mean"] == pytest.approx(0.0, abs=1e-5)
    step, metrics, _ = evaluate_run(parse_config(recipe(tmp_path, **PRIME | {"eval.prompts": 2})))
    assert step == 3 and metrics


@pytest.mark.parametrize("method", ["assign_advantages", "update"])
def test_a_run_that_fails_between_the_two_models_steps_keeps_neither(straight, tmp_path, monkeypatch, capsys, method):
    """In step 2, when the reward model has taken its steps and the policy none."""
    whole = getattr(Loop, method)

    def failing(self, *arguments):
        if self.steps_done == 1:
            raise OSError("half way")
        return whole(self, *arguments)

    monkeypatch.setattr(Loop, method, failing)
    with pytest.raises(OSError, match="half way"):
        run(tmp_path, **{"checkpoint.every": 0})
    assert "step 1 is lost: step 2 has begun to change the" in capsys.readouterr().err
    assert load_latest(tmp_path / "checkpoints").step == 0
    monkeypatch.undo()
    assert (run(tmp_path), weights(tmp_path)) == straight


def test_a_reward_model_of_its_own_first_weights(straight, tmp_path):
    """It is compared with these; and the vocabulary must be the policy's."""
    run(tmp_path / "source", steps=1)
    folder = str(load_latest(tmp_path / "source" / "checkpoints").file("model"))
    own = {"prime": {"path": folder, "lr": 1e-3}}
    rows = run(tmp_path / "run", **own, steps=1)
    assert rows[0]["reward_model/dpo_loss"] == pytest.approx(math.log(2), rel=1e-6)  # equal to its reference
    assert not (tmp_path / "run" / "reference").exists()
    rows = run(tmp_path / "run", **own, steps=2)
    assert rows[1]["reward_model/dpo_loss"] != pytest.approx(math.log(2), rel=1e-6)
    small = {"model.config.vocab_size": 80}
    with pytest.raises(ConfigError, match=r"prime.path: must hold a model with the policy's vocabulary of 80 tokens"):
        run(tmp_path / "other", **own, **small)


def test_keys_of_a_reward_model_that_is_not_used(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: x}\ndata: {task: carry_arithmetic}\nrun_dir: x\nprime: {lr: 1.0e-5}\n")
    assert load_config(path).prime.lr == 1e-5
    with pytest.raises(ConfigError, match="prime.beta_train: has no effect with advantage=grpo; it needs"):
        load_config(path, ["prime.beta_train=0.1"])
    assert load_config(path, ["prime.beta_train=0.1", "advantage=prime"]).prime.beta_train == 0.1
