"""Whole runs: what they leave, that they continue bit for bit, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from entcov.rl.data.stream import PromptStream
from entcov.rl.data.tokenizer import char_tokenizer
from entcov.rl.load_config import parse_config
from entcov.rl.recipe import ConfigError
from entcov.rl.record.checkpoint import list_steps, load_latest
from entcov.rl.run import evaluate_run, train
from tests.support.tiny_run import recipe, timeless, token_files


def run(run_dir: Path, resume: str = "auto", **overrides) -> list[dict[str, float]]:
    """Trains and returns the metrics without what depends on the clock."""
    train(parse_config(recipe(run_dir, **overrides)), resume=resume, display=False)
    return timeless(run_dir)


def test_what_a_run_leaves(tmp_path):
    rows = run(tmp_path, **{"logging.tensorboard": True, "checkpoint.every": 2})
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for key in (
        "critic/score/mean", "critic/advantages/max", "response_length/mean", "response_length/clip_ratio",
        "actor/entropy", "actor/entropy_drift", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/grad_norm",
        "actor/lr", "actor/cov_mean", "actor/cov_p999", "training/mismatch", "training/zero_variance_groups",
    ):  # fmt: skip
        assert all(math.isfinite(row[key]) for row in rows[1:]), key
    assert all(row["training/mismatch"] < 1e-5 for row in rows[1:])
    assert all(0 < row["actor/entropy"] < math.log(53) for row in rows[1:])
    evaluated = [row["step"] for row in rows if any(k.startswith("val-core/entcov/carry") for k in row)]
    assert evaluated == [0, 2, 3]  # before, every 2, and the last
    assert list_steps(tmp_path / "checkpoints") == [2, 3]  # every 2, and the last
    assert list(tmp_path.glob("**/events.out.tfevents.*"))
    sample = json.loads((tmp_path / "samples" / "step_3.jsonl").read_text().splitlines()[0])
    assert sample.keys() == {"prompt", "response", "ground_truth", "reward", "finished"}
    ((source, counts),) = json.loads((tmp_path / "solve_counts" / "step_3.json").read_text()).items()
    assert counts["samples"] == 2 and sum(counts["histogram"]) == len(counts["solved"]) == 8
    assert (
        rows[3][f"val-core/{source}/acc/pass@1"]
        == sum(counts["solved"]) / 16
        == rows[3][f"val-core/{source}/acc/mean@2"]
    )


def test_the_learning_rate_warms_up_over_training_steps(tmp_path):
    """Not over updates, of which a step has three: all of a step have one rate. A resumed run goes on with it."""
    settings = {"actor.warmup_steps": 4, "warm_start.steps": 2}
    run(tmp_path, **settings, steps=2)
    rows = run(tmp_path, **settings, steps=5)
    assert [row["actor/lr"] for row in rows[1:]] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_the_law_of_a_run_that_goes_on_is_that_of_all_its_steps(tmp_path):
    settings = {
        "steps": 21,
        "warm_start.steps": 2,
        "eval.prompts": 0,
        "checkpoint.every": 0,
        "actor.updates_per_rollout": 1,
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 2,
        "rollout.max_response_length": 4,
    }
    straight = run(tmp_path / "straight", **settings)
    run(tmp_path / "cut", **settings | {"steps": 20})
    assert run(tmp_path / "cut", **settings) == straight
    assert [row["step"] for row in straight if "law/ceiling" in row] == [20, 21]


CONTROLS = {
    "none": {},
    "clip_cov": {"control": ["clip_cov"], "controls": {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}}},
    "kl_cov": {"control": ["kl_cov"], "controls": {"kl_cov": {"kl_cov_ratio": 0.2}}},
    "aent": {"control": ["aent"], "controls": {"aent": {"warmup": 1, "coef_lr": 0.01}}},
    "adaptive_bonus": {"control": ["adaptive_bonus"]},
    "difficulty_bonus": {
        "control": ["difficulty_bonus", "positive_advantage_reweighting"],
        "controls": {"difficulty_bonus": {"entropy_coef": 0.005}},
    },
    "several_controls": {
        "control": ["entropic", "high_entropy_tokens", "clip_b", "relative_entropy"],
        "controls": {"entropic": {"prob_threshold": 0.5}},
    },
    "reference_kl": {  # in the reward, and all around the objective
        "loss": {"objective": "gspo", "aggregation": "seq-mean-token-mean", "tis_cap": 2.0, "tis_level": "sequence"},
        "kl_in_reward": {"coef": 0.05, "target": 0.01, "horizon": 50},
        "rollout_rs": {"level": "sequence", "high": 1.000001},
        "advantage": "remax",
    },
    "several_epochs": {
        "actor.epochs": 2,
        "advantage": "reinforce_pp",
        "loss": {"aggregation": "seq-mean-token-mean", "kl_coef": 0.05},
    },
}


TOKENS = ["held_out/step_0", "held_out/step_2", "held_out/step_4", "train/step_1", "train/step_4"]


@pytest.mark.parametrize("name", CONTROLS)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, name):
    straight = run(tmp_path / "straight", **CONTROLS[name], steps=4)
    run(tmp_path / "resumed", **CONTROLS[name], steps=2)
    resumed = run(tmp_path / "resumed", **CONTROLS[name], steps=4)
    assert [row["step"] for row in straight] == [0, 1, 2, 3, 4]
    assert resumed == straight
    a, b = (load_latest(tmp_path / d / "checkpoints").file("model") for d in ("straight", "resumed"))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    tokens = token_files(tmp_path / "straight")
    assert sorted(tokens) == [f"{name}.json" for name in TOKENS] and token_files(tmp_path / "resumed") == tokens


def test_going_back_to_an_earlier_checkpoint(tmp_path):
    first = run(tmp_path, steps=4)
    back = str(tmp_path / "checkpoints" / "step_3")
    assert run(tmp_path, resume=back, steps=3) == first[:4]  # stops before it saves anything again
    assert load_latest(tmp_path / "checkpoints").step == 3
    assert run(tmp_path, steps=4) == first
    with pytest.raises(ValueError, match="must be one of this run's checkpoints"):
        run(tmp_path / "other", resume=back)


def test_another_recipe_may_not_take_over_a_folder(tmp_path):
    run(tmp_path, steps=1)
    with pytest.raises(ConfigError, match=r"another recipe.*:\n  actor.lr: was 0.001, is 0.002$"):
        run(tmp_path, **{"actor.lr": 2e-3})
    with pytest.raises(ConfigError, match="holds a run already"):
        run(tmp_path, resume="never")


def test_a_shared_warm_start_is_the_one_it_would_have_made(tmp_path):
    cache = {"warm_start.cache_dir": str(tmp_path / "cache"), "steps": 1}
    plain = run(tmp_path / "plain", steps=1)
    assert run(tmp_path / "made", **cache) == plain
    assert len(list((tmp_path / "cache").glob("*/"))) == 1
    assert run(tmp_path / "taken", **cache) == plain
    run(tmp_path / "other", **cache, seed=1)
    assert len(list((tmp_path / "cache").glob("*/"))) == 2


def test_a_warm_start_learns(tmp_path):
    long = run(tmp_path / "long", steps=0, **{"warm_start.steps": 150, "eval.prompts": 64})
    none = run(tmp_path / "none", steps=0, **{"warm_start.steps": 0, "eval.prompts": 64})
    key = "val-core/entcov/carry_arithmetic/acc/mean@2"
    assert none[0][key] < 0.1 and long[0][key] > none[0][key] + 0.1


def test_dynamic_sampling_keeps_only_groups_that_teach(tmp_path):
    draws = {"rollout.filter_zero_variance": True, "rollout.max_draws": 4, "rollout.on_shortfall": "accept"}
    rows = run(tmp_path, **draws, **{"warm_start.steps": 60})
    assert max(row["training/generation_batches"] for row in rows[1:]) > 1
    assert any(row["training/zero_variance_groups"] > 0 for row in rows[1:])  # described before the filter
    with pytest.raises(RuntimeError, match="kept 0 groups of 12 in 2 draws, and a step needs 6: .*mean 0.000"):
        filtered = {"rollout.filter_zero_variance": True, "rollout.max_draws": 2, "rollout.on_shortfall": "accept"}
        run(tmp_path / "hopeless", **filtered, **{"data.reward": "tests.rl.test_run:no_reward"})


def no_reward(example, response):
    return 0.0


def test_a_recipe_without_solutions_cannot_warm_start(tmp_path):
    rows = [
        {
            "data_source": "mine", "prompt": [{"role": "user", "content": f"{i}+1="}], "ability": "math",
            "reward_model": {"style": "exact", "ground_truth": str(i + 1)}, "extra_info": {"index": i},
        }
        for i in range(8)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data": {"train_files": [str(path)], "val_files": [str(path)], "max_prompt_length": 8}}
    with pytest.raises(ValueError, match="warm_start.steps: needs worked solutions.*mine"):
        run(tmp_path / "warm", **data)
    rows = run(tmp_path / "cold", **data, **{"warm_start.steps": 0})
    assert "val-core/mine/acc/mean@2" in rows[0]
    path.write_text(json.dumps({"data_source": "mine"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: 1 malformed rows:\n  line 1: reward_model is missing"):
        run(tmp_path / "malformed", **data)


def test_weights_that_are_nan_stop_the_run_with_the_step(tmp_path):
    run(tmp_path, steps=1)
    from safetensors.torch import load_file, save_file

    from entcov.rl.record.checkpoint import save_checkpoint

    checkpoint = load_latest(tmp_path / "checkpoints")
    weights = load_file(checkpoint.file("model") / "model.safetensors")
    weights = {k: torch.full_like(v, torch.nan) for k, v in weights.items()}

    def poisoned(folder: Path) -> None:
        folder.mkdir()
        for file in checkpoint.file("model").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    save_checkpoint(tmp_path / "checkpoints", 1, {"model": poisoned}, checkpoint.state, keep=1)
    with pytest.raises(RuntimeError, match="step 2: .*log-probabilit.*finite"):
        run(tmp_path, steps=2)
    assert [row["step"] for row in timeless(tmp_path)] == [0, 1]


def test_a_damaged_checkpoint_is_named_and_not_passed_over(tmp_path):
    run(tmp_path, steps=2)
    weights = tmp_path / "checkpoints" / "step_2" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match=r"model\.safetensors.*Step 1 is intact"):
        run(tmp_path, steps=3)
    straight = run(tmp_path / "straight", steps=3)
    assert run(tmp_path, resume=str(tmp_path / "checkpoints" / "step_1"), steps=3) == straight


def test_evaluation_of_a_finished_run(tmp_path):
    settings = {
        "eval.entropy": True, "eval.top_k": 3, "eval.prompts": 8, "rollout.temperature": 0.7,
        "loss": {"kl_coef": 0.1, "kl_estimator": "k2"}, "kl_in_reward": {"coef": 0.1, "estimator": "k3"},
    }  # fmt: skip
    rows = run(tmp_path, **settings, steps=2)
    for file in (tmp_path / "reference").iterdir():  # an evaluation compares nothing with the reference policy
        file.unlink()
    config = parse_config(recipe(tmp_path, **settings))
    step, metrics, results = evaluate_run(config)
    key = "val-core/entcov/carry_arithmetic/acc/mean@2"
    assert step == 2 and metrics[key] == rows[-1][key] == results[0].mean and results[0].prompts == 8
    held_out = "val-aux/entcov/carry_arithmetic/entropy/mean"
    assert [held_out in row for row in rows] == [True, False, True]
    assert metrics[held_out] == rows[-1][held_out] == results[0].entropy and 0 < metrics[held_out] < math.log(53)
    config.eval.samples, config.eval.temperature = 1, 0.0
    assert evaluate_run(config, checkpoint=str(tmp_path / "checkpoints" / "step_1"))[0] == 1
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluate_run(parse_config(recipe(tmp_path / "empty")))


def test_training_never_sees_a_held_out_question(tmp_path):
    stream = PromptStream.from_config(parse_config(recipe(tmp_path)).data, char_tokenizer(), seed=0)
    held_out = {p.example.prompt[0]["content"] for p in stream.held_out(64)}
    assert not held_out & {p.example.prompt[0]["content"] for p in stream.take(0, 2000)}


def test_another_engine_is_named_with_its_command(tmp_path):
    config = parse_config(recipe(tmp_path / "run", **{"actor.backend": "megatron"}))
    with pytest.raises(ConfigError, match=r"actor\.backend: megatron .* torchrun .* -m megatron_integration train"):
        train(config, display=False)
    assert not (tmp_path / "run").exists()
