"""The plan's figures against Megatron-Core modules that are really built: large ones on the meta device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov.plan import GPUS, Settings, memory  # noqa: E402
from entcov.plan_model import PUBLISHED, ModelShape, shape_of  # noqa: E402

LAYOUTS = [
    ("Qwen/Qwen2.5-7B", 2, 1),
    ("Qwen/Qwen2.5-7B", 4, 2),
    ("Qwen/Qwen2.5-32B", 8, 1),
    ("Qwen/Qwen2.5-32B", 8, 4),
    ("Qwen/Qwen2.5-Math-1.5B", 2, 1),
    ("Qwen/Qwen2.5-Math-1.5B", 1, 2),  # tied embeddings on two stages: two copies
    ("Qwen/Qwen3-8B-Base", 8, 2),
    ("meta-llama/Llama-3.1-8B", 4, 1),
]
SMALL = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
OPTIMIZERS = [
    {"dtype": "bfloat16", "data_parallel": 4, "tensor_parallel": 2, "distributed_optimizer": True},
    {"dtype": "bfloat16", "data_parallel": 4, "tensor_parallel": 2, "distributed_optimizer": False},
    {"dtype": "float32", "data_parallel": 4, "tensor_parallel": 1, "distributed_optimizer": True},
]


@pytest.fixture(scope="module")
def built():
    jobs = [
        {
            "weigh": "meta", "config": {key: value for key, value in PUBLISHED[name].items() if value is not None},
            "megatron": {"tensor_parallel": tp, "pipeline_parallel": pp}, "stage": stage, "dtype": "bfloat16",
        }
        for name, tp, pp in LAYOUTS
        for stage in range(pp)
    ]  # fmt: skip
    for case in OPTIMIZERS:
        megatron = {key: case[key] for key in ("tensor_parallel", "distributed_optimizer")}
        jobs.append({"weigh": "optimizer", "config": SMALL, "megatron": megatron, "stage": 0} | case)
    done = subprocess.run(
        [sys.executable, "-m", "tests.built_models", json.dumps(jobs)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_parameters_of_every_rank_of_the_large_models(built):
    expected = [
        shape_of(name, None).parameters_on_rank(tp, pp, stage) for name, tp, pp in LAYOUTS for stage in range(pp)
    ]
    assert [result["parameters"] for result in built[: len(expected)]] == expected


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_bytes_of_weights_gradients_and_optimizer_state(built, case):
    """Within the padding of Megatron-Core's buffers, to 64 values a parameter and 128 bytes a rank: 2 %."""
    result, job = built[len(built) - len(OPTIMIZERS) + case], OPTIMIZERS[case]
    s = Settings(
        shape=ModelShape.from_config(SMALL), gpu=GPUS["h100"], gpus=job["data_parallel"] * job["tensor_parallel"],
        bf16=job["dtype"] == "bfloat16", tensor_parallel=job["tensor_parallel"],
        distributed_optimizer=job["distributed_optimizer"],
    )  # fmt: skip
    planned = memory(s, 0)
    assert result["parameters"] == planned.parameters and result["weights"] == planned.weights
    assert result["gradients"] == pytest.approx(planned.gradients, rel=0.02)
    assert result["optimizer"] == pytest.approx(planned.optimizer, rel=0.02)
