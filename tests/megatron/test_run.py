"""The trainer on Megatron-Core, started as its users start it: the torch path's metrics, and a rank that is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")
psutil = pytest.importorskip("psutil")

from entcov.rl.interfaces import Start  # noqa: E402
from entcov.rl.load_config import parse_config  # noqa: E402
from entcov.rl.record.checkpoint import Checkpoint, CheckpointError, load_latest  # noqa: E402
from entcov.rl.record.metrics import read_metrics  # noqa: E402
from entcov.rl.run import evaluate_run, train  # noqa: E402
from megatron_integration.backend import initial_model  # noqa: E402
from tests.support.processes import LIMIT, run_command  # noqa: E402
from tests.support.tiny_run import recipe, timeless  # noqa: E402

CHANGES = {
    "model.config.num_key_value_heads": 2,  # TP 2 needs two
    "control": ["clip_cov", "aent"],
    "controls": {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}, "aent": {"warmup": 1}},
    "loss": {"kl_coef": 0.01},
    "advantage": "prime",
    # Without its steps and the norm, which would blow rounding up; test_parity.py has the steps.
    "prime": {"update": "none"},
    "advantages": {"prime": {"prime_norm": "none"}},
    "rollout.temperature": 0.9,
    "eval.entropy": True,  # at temperature 1
    "eval.top_k": 3,
}


def start(recipe_file: Path, log: Path, *overrides: str) -> subprocess.Popen:
    """The command of the README, two processes with tensor parallelism."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
        "megatron_integration", "train", str(recipe_file), "megatron.tensor_parallel=2", *overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)


def wait_until(condition, job: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def rank_process(job: subprocess.Popen, rank: int):
    (process,) = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == str(rank)]
    return process


def first_record(run_dir) -> list[dict]:
    """The recorded responses of step 1."""
    record = json.loads((run_dir / "tokens" / "train" / "step_1.json").read_bytes())
    return [response for prompt in record["prompts"] for response in prompt["responses"]]


def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(tmp_path):
    run_dir, recipe_file, log = tmp_path / "megatron", tmp_path / "recipe.yaml", tmp_path / "log"
    recipe_file.write_text(OmegaConf.to_yaml(OmegaConf.create(recipe(run_dir, **CHANGES))))

    job = start(recipe_file, log, "steps=100000")
    try:
        # Step 1 is stored, and a checkpoint is being written: it must not be taken for one.
        wait_until(lambda: (run_dir / "checkpoints" / "step_1").exists(), job, log)
        wait_until(lambda: list((run_dir / "checkpoints").glob(".tmp_step_*/*")), job, log)
        os.kill(rank_process(job, 1).pid, signal.SIGKILL)
        assert job.wait(LIMIT) != 0
    finally:
        job.kill()
    report = log.read_text()
    root_cause = report[report.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root_cause and "SIGKILL" in root_cause, report

    # The same command goes on. SIGTERM, which torchrun passes on, ends it with a checkpoint of both ranks.
    stored = load_latest(run_dir / "checkpoints").step
    job = start(recipe_file, log, "steps=100000", "checkpoint.every=0")
    try:
        wait_until(lambda: read_metrics(run_dir)[-1]["step"] >= stored + 2, job, log)
        job.terminate()
        assert job.wait(LIMIT) != 0
    finally:
        job.kill()
    assert "stopped; the same command goes on from the latest checkpoint" in log.read_text()
    last = load_latest(run_dir / "checkpoints").step
    rows = timeless(run_dir)
    assert [row["step"] for row in rows] == list(range(last + 1)) and last >= stored + 2

    alone = tmp_path / "torch"
    train(parse_config(recipe(alone, **CHANGES, steps=last)), display=False)
    wanted = timeless(alone)
    wanted[-1] = {key: value for key, value in wanted[-1].items() if key in rows[-1]}  # evaluated, for it is the last
    same_metrics(rows, wanted)
    for ours, theirs in zip(*(first_record(folder) for folder in (run_dir, alone)), strict=True):
        assert ours["pieces"] == theirs["pieces"] and ours["chosen"] == theirs["chosen"]
        for column in ("entropy", "logprob", "logprob_after", "advantage", "covariance"):
            assert ours[column] == pytest.approx(theirs[column], rel=0.01, abs=1e-3), column
    assert read_metrics(run_dir)[-1]["actor/kl_loss"] > 0  # against the model that reinforcement began with

    # The checkpoint is a Hugging Face folder too: the torch path evaluates it.
    config = parse_config(recipe(run_dir, **CHANGES, **{"actor.backend": "megatron"}, steps=last))
    step, metrics, _ = evaluate_run(config)
    assert step == last and any(key.startswith("val-core/") for key in metrics)


def test_an_initial_model_that_is_not_what_was_written_is_refused(tmp_path):
    config = parse_config(recipe(tmp_path, **CHANGES, **{"warm_start.steps": 1}))
    resumed = Start(config.model, 0, tmp_path, checkpoint=Checkpoint(tmp_path, 1), warm_start=lambda model: None)
    fresh, cpu = dataclasses.replace(resumed, checkpoint=None), torch.device("cpu")
    folder = Path(initial_model(fresh, cpu))
    assert folder == Path(initial_model(resumed, cpu))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"initial_model is damaged: the content of .* differs"):
        initial_model(resumed, cpu)
    initial_model(fresh, cpu)  # nothing has been done: made again
    assert weights.read_bytes() != bytes(content)


def test_vllm_rollouts_with_tensor_parallelism_give_the_torch_path_with_vllm(tmp_path):
    pytest.importorskip("vllm")
    # vLLM's CPU attention has heads of 32 and more; every rank has an engine and takes half of the prompts.
    changes = CHANGES | {"model.config.head_dim": 32, "rollout.sampler": "vllm", "rollout.vllm": {"max_num_seqs": 8}}
    changes |= {"advantage": "grpo", "steps": 2, "eval": {"prompts": 0}, "checkpoint": {"every": 0}}
    megatron, alone, log = tmp_path / "megatron", tmp_path / "torch", tmp_path / "log"
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(OmegaConf.to_yaml(OmegaConf.create(recipe(megatron, **changes))))
    job = start(recipe_file, log)
    try:
        assert job.wait(LIMIT) == 0, log.read_text()
    finally:
        job.kill()
    # In a process of its own, because vLLM does not leave one as it was.
    command = [sys.executable, "-m", "entcov", "train", str(recipe_file), f"run_dir={alone}", "--no-display"]
    done = run_command(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    same_metrics(timeless(megatron), timeless(alone))


def same_metrics(rows: list[dict], wanted: list[dict]) -> None:
    for got, want in zip(rows, wanted, strict=True):
        assert got.keys() == want.keys()
        noise = {key for key in want if "mismatch" in key}  # rounding itself: near 1e-7 in both, and no more alike
        assert all(got[key] < 1e-5 for key in noise)
        noise |= {key for key in want if key.startswith("reward_model/dpo_acc")}  # its signs
        same = {key: value for key, value in want.items() if key not in noise}
        assert {key: got[key] for key in same} == pytest.approx(same, rel=5e-3, abs=2e-5), got["step"]
