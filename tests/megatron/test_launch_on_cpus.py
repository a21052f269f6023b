"""The launch scripts, really started on CPUs: two ranks train and evaluate a tiny model in place of the large one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov.rl.load_config import load_config  # noqa: E402
from entcov.rl.record.metrics import read_metrics  # noqa: E402
from entcov.rl.run import evaluate_run  # noqa: E402
from tests.support.tiny_run import recipe  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def leaves(tree: dict, prefix: str = "") -> list[str]:
    """The tree as the command line's words."""
    words = []
    for key, value in tree.items():
        words += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={json.dumps(value)}"]
    return words


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def script(name: str, *arguments: str) -> str:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GPUS_PER_NODE": "2", "TP": "2",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(
        [str(ROOT / "megatron_integration" / "launch" / name), *arguments],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_scripts_train_and_evaluate_and_one_process_agrees(tmp_path):
    """A reference policy too: evaluation has no use for it, and one process could not find it."""
    run = tmp_path / "run"
    tiny = recipe(run, **{"model.config.num_key_value_heads": 2, "steps": 1, "loss.kl_coef": 0.01})
    changes = [
        "model.path=null", "model.compute_dtype=float32", "device=cpu", "rollout.sampler=in_process",
        "data.train_files=[]", "data.val_files=[]", "controls.clip_cov.clip_cov_ratio=0.2",
        "rollout.on_shortfall=accept",  # a warm start of twenty steps is right too seldom
    ]  # fmt: skip
    script("train_qwen2.5_7b.sh", "clip_cov", *changes, *leaves(tiny))
    config = load_config(run / "config.yaml")
    assert config.megatron.tensor_parallel == 2 and config.megatron.sequence_parallel and config.actor.packing
    assert "actor/cov_clipfrac" in read_metrics(run)[-1]

    own = ["data.val_files=[]", "eval.prompts=16"]  # the run's task has held-out prompts, and no files beside them
    shown = script("eval.sh", str(run), "eval.temperature=0.0", "eval.samples=1", *own)
    row = next(line.split() for line in shown.splitlines() if line.startswith("entcov/carry_arithmetic"))
    assert row[1:4] == ["16", "1", "0"] and shown.count("data source") == 1  # the first rank alone prints
    files = [run / "eval" / f"step_1.{suffix}" for suffix in ("json", "jsonl")]
    metrics, responses = json.loads(files[0].read_text())["metrics"], files[1].read_text()

    config.eval.prompts, config.eval.samples, config.eval.temperature = 16, 1, 0.0
    step, alone, _ = evaluate_run(config)
    assert step == 1 and alone == pytest.approx(metrics, rel=1e-6)  # greedy, float32: the same tokens
    assert files[1].read_text() == responses
