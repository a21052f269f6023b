"""Whole runs with vLLM in the trainer's process. Run by rl/vllm/test_engine.py in a process of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from entcov.rl.load_config import parse_config
from entcov.rl.record.metrics import read_metrics
from entcov.rl.run import evaluate_run, train
from tests.support.tiny_run import recipe, timeless

KEY = "val-core/entcov/carry_arithmetic/acc/mean@2"


def config(run_dir: Path, **overrides):
    own = {
        "rollout.sampler": "vllm",
        "rollout.vllm": {"max_num_seqs": 32},
        "data.reward": "tests.support.vllm_run_cases:even",
    }
    tree = recipe(run_dir, **own, **overrides)
    tree["model"]["config"]["head_dim"] = 32  # vLLM's CPU attention has no smaller heads
    return parse_config(tree)


def even(example, response: str) -> float:
    """A reward that a hardly trained policy gets for some of its responses and not for others."""
    return float(len(response) % 2 == 0)


def run(run_dir: Path, **overrides) -> list[dict[str, float]]:
    train(config(run_dir, **overrides), display=False)
    return timeless(run_dir)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_agrees_with_its_sampler_at_every_step_and_resumes_bit_for_bit(tmp_path, staleness):
    options = {"rollout.max_staleness": staleness, "loss": {"tis_cap": 2.0}, "control": ["clip_cov"]}
    options["controls"] = {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}}
    straight = run(tmp_path / "straight", steps=4, **options)
    run(tmp_path / "resumed", steps=2, **options)
    assert run(tmp_path / "resumed", steps=4, **options) == straight
    steps = straight[1:]
    assert [row["training/staleness"] for row in steps] == [0] + [staleness] * 3
    # The bound. At staleness 1 the policy has moved on since, and the first step alone is of the same weights.
    agreeing = steps if staleness == 0 else steps[:1]
    assert all(row["training/mismatch_max"] <= 1e-4 for row in agreeing)
    if staleness:
        assert all(row["training/mismatch"] > 1e-4 for row in steps[1:])
    assert all(math.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0 for row in steps)
    assert all(row["timing_s/weight_sync"] > 0 for row in read_metrics(tmp_path / "straight")[1:])
    if staleness == 0:  # the evaluation of a finished run starts an engine of its own
        step, metrics, _ = evaluate_run(config(tmp_path / "straight", **options))
        assert step == 4 and metrics[KEY] == straight[-1][KEY]


def test_truncated_importance_sampling_weighs_by_the_samplers_probabilities(tmp_path):
    """At bfloat16 trainer and sampler differ, and the correction is of the size of that difference."""
    rows = []
    for tis_cap in (None, 2.0):
        options = {"model.compute_dtype": "bfloat16", "steps": 1, "loss": {"tis_cap": tis_cap}, "eval.prompts": 0}
        rows.append(run(tmp_path / str(tis_cap), **options)[-1])
    off, on = rows
    for key in ("training/mismatch", "critic/score/mean", "response_length/mean"):  # the same rollouts, another loss
        assert on[key] == off[key]
    assert 1e-4 < off["training/mismatch"] < 0.1
    assert 0 < abs(on["actor/grad_norm"] / off["actor/grad_norm"] - 1) < 20 * off["training/mismatch"]
