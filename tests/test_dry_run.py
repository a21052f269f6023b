"""Every launch script's job without GPUs and weights: its model at full size on the meta device, its actor in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov.plan_model import shape_of  # noqa: E402
from tests.test_launch import METHODS, ROOT, dry_run  # noqa: E402

JOBS = {
    # Every method once, on the two models in turn, and layouts beside the default.
    ("train_qwen2.5_7b.sh", "grpo"): {},
    ("train_qwen2.5_32b.sh", "clip_higher"): {"PP": "4"},
    ("train_qwen2.5_32b.sh", "clip_cov"): {},
    ("train_qwen2.5_7b.sh", "kl_cov"): {"TP": "4"},
    ("train_qwen2.5_32b.sh", "aent_math"): {"TP": "4", "PP": "2", "CP": "2"},
    ("train_qwen2.5_7b.sh", "aent_openr1"): {"TP": "1"},
    ("train_aent_1.5b.sh", "math"): {"TP": "2"},
    ("train_aent_1.5b.sh", "openr1"): {},
    ("train_qwen2.5_32b.sh", "kl_cov"): {"SMOKE_LAYERS": "2", "MODEL_PATH": "/models/qwen2.5_32b"},
}


@pytest.fixture(scope="module")
def built():
    jobs = []
    for (script, method), environment in JOBS.items():
        command = dry_run(script, method, **environment)
        recipe = command.index("train") + 1
        jobs.append({"weigh": "recipe", "recipe": str(ROOT / command[recipe]), "overrides": command[recipe + 1 :]})
    done = subprocess.run(
        [sys.executable, "-m", "tests.built_models", json.dumps(jobs)],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(JOBS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("job", JOBS, ids="-".join)
def test_every_module_of_a_script_s_job_builds(built, job):
    (script, method), environment = job, JOBS[job]
    name = {"math": "Qwen/Qwen2.5-Math-1.5B", "openr1": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}.get(
        method, "Qwen/Qwen2.5-7B" if "7b" in script else "Qwen/Qwen2.5-32B"
    )
    shape = shape_of(name, None)
    if "SMOKE_LAYERS" in environment:
        shape = type(shape)(**vars(shape) | {"num_hidden_layers": 2})
    tp = int(environment.get("TP", {"7b": 2, "32": 8}.get(script[14:16], 1)))
    pp = int(environment.get("PP", 1))
    result = built[job]
    assert result["parameters"] == [shape.parameters_on_rank(tp, pp, stage) for stage in range(pp)]
    assert len(result["trained"]) == pp and min(result["trained"]) > 5
    control = METHODS[f"aent_{method}" if script.startswith("train_aent") else method][1]
    assert result["controls"] == ([control] if control else [])


def test_every_method_and_script_takes_part():
    assert {method for script, method in JOBS if script.startswith("train_qwen")} == set(METHODS)
