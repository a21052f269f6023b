"""`torchrun -m megatron_integration eval`: what the one-process command says of the same checkpoint, from two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov.rl.config import parse_config  # noqa: E402
from entcov.rl.run import evaluate_run  # noqa: E402
from tests.tiny_run import recipe  # noqa: E402


def test_two_ranks_evaluate_as_one_process_does(tmp_path):
    run = tmp_path / "run"
    tree = recipe(
        run,
        **{"model.config.num_key_value_heads": 2, "steps": 1, "megatron": {"tensor_parallel": 2}, "loss.kl_coef": 0.01},
    )
    (tmp_path / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))

    def torchrun(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
             "megatron_integration", *arguments],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    torchrun("train", str(tmp_path / "recipe.yaml"), "--no-display")
    protocol = ["eval.samples=1", "eval.temperature=0.0", "eval.prompts=16"]
    shown = torchrun("eval", str(run), *protocol)
    row = next(line.split() for line in shown.splitlines() if line.startswith("entcov/carry_arithmetic"))
    assert row[1:4] == ["16", "1", "0"] and shown.count("data source") == 1  # the first rank alone prints
    files = [run / "eval" / f"step_1.{suffix}" for suffix in ("json", "jsonl")]
    metrics, responses = json.loads(files[0].read_text())["metrics"], files[1].read_text()

    config = parse_config(tree | {"eval": {"prompts": 16, "samples": 1, "temperature": 0.0}})
    step, alone, _ = evaluate_run(config)
    assert step == 1 and alone == metrics  # greedy, float32: the same tokens
    assert files[1].read_text() == responses
