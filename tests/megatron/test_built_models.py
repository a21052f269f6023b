"""Without GPUs and weights: every rank's modules of the scripts' layouts are built, and the plan's figures are theirs.

One process builds everything: large models on the meta device, small ones whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov.plan.memory import GPUS, Settings, memory  # noqa: E402
from entcov.plan.model_shapes import PUBLISHED, ModelShape, shape_of  # noqa: E402
from entcov.plan.traffic import passes, traffic  # noqa: E402
from tests.support.launch_scripts import METHODS, ROOT, dry_run, smoke_variables  # noqa: E402

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
CUDA_CONFIGS = [
    {"megatron": {}, "apex": False},
    {"megatron": {}, "apex": True},
    {"megatron": {"transformer_impl": "local"}, "apex": True},
]
SCRIPTS = {
    # Every method once, on the two models in turn, and layouts beside the default.
    ("train_qwen2.5_7b.sh", "grpo"): {"MODEL_PATH": "Qwen/Qwen3-8B-Base"},
    ("train_qwen2.5_32b.sh", "clip_higher"): {"PP": "4"},
    ("train_qwen2.5_32b.sh", "clip_cov"): {},
    ("train_qwen2.5_7b.sh", "kl_cov"): {"TP": "4"},
    ("train_qwen2.5_32b.sh", "aent_math"): {"TP": "4", "PP": "2", "CP": "2"},
    ("train_qwen2.5_7b.sh", "aent_openr1"): {"TP": "1"},
    ("train_aent_1.5b.sh", "math"): {"TP": "2"},
    ("train_aent_1.5b.sh", "openr1"): {},
    ("train_qwen2.5_32b.sh", "kl_cov"): {"SMOKE_LAYERS": "2"},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Results of CUDA_CONFIGS, LAYOUTS (a list for each), OPTIMIZERS and SCRIPTS."""
    jobs = [
        {
            "weigh": "meta", "config": {key: value for key, value in PUBLISHED[name].items() if value is not None},
            "megatron": {"tensor_parallel": tp, "pipeline_parallel": pp}, "stage": stage, "dtype": "bfloat16",
        }
        for name, tp, pp in LAYOUTS
        for stage in range(pp)
    ]  # fmt: skip
    layouts = len(jobs)
    for case in OPTIMIZERS:
        megatron = {key: case[key] for key in ("tensor_parallel", "distributed_optimizer")}
        jobs.append({"weigh": "optimizer", "config": SMALL, "megatron": megatron, "stage": 0} | case)
    for (script, method), environment in SCRIPTS.items():
        if "SMOKE_LAYERS" in environment:
            environment = smoke_variables(tmp_path_factory.mktemp("model"), "Qwen/Qwen2.5-32B")
        command = dry_run(script, method, **environment)
        recipe = command.index("train") + 1
        jobs.append({"weigh": "recipe", "recipe": str(ROOT / command[recipe]), "overrides": command[recipe + 1 :]})
    cuda = [{"weigh": "cuda", "config": SMALL} | case for case in CUDA_CONFIGS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.built_models", json.dumps(cuda + jobs)],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    configs, results = results[: len(cuda)], results[len(cuda) :]
    return (
        configs,
        results[:layouts],
        results[layouts : -len(SCRIPTS)],
        dict(zip(SCRIPTS, results[-len(SCRIPTS) :], strict=True)),
    )


def test_the_configuration_of_a_gpu_has_the_fusions_that_the_plan_counts_on(built):
    """Layers of Transformer Engine have them, gradient accumulation's where its kernel is there; local layers none."""
    names = ("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion")
    fused, with_apex, local = ([config[name] for name in names] for config in built[0])
    assert (fused, with_apex, local) == ([True, True, True, False], [True] * 4, [False] * 4)


def test_parameters_of_every_rank_of_the_large_models(built):
    expected = [
        shape_of(name, None).parameters_on_rank(tp, pp, stage) for name, tp, pp in LAYOUTS for stage in range(pp)
    ]
    assert [result["parameters"] for result in built[1]] == expected


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_bytes_of_weights_gradients_and_optimizer_state(built, case):
    """Within the padding of Megatron-Core's buffers, to 64 values a parameter and 128 bytes a rank: 2 %."""
    result, job = built[2][case], OPTIMIZERS[case]
    s = Settings(
        shape=ModelShape.from_config(SMALL), gpu=GPUS["h100"], gpus=job["data_parallel"] * job["tensor_parallel"],
        bf16=job["dtype"] == "bfloat16", tensor_parallel=job["tensor_parallel"],
        distributed_optimizer=job["distributed_optimizer"],
    )  # fmt: skip
    planned = memory(s, 0)
    assert result["parameters"] == planned.parameters and result["weights"] == planned.weights
    assert result["gradients"] == pytest.approx(planned.gradients, rel=0.02)
    assert result["optimizer"] == pytest.approx(planned.optimizer, rel=0.02)


def test_tensor_parallel_collectives_are_those_that_two_ranks_make():
    """One micro-batch, scored and trained on: counted by a dispatch mode under gloo."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.support.counted_traffic"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    for found in counted:
        s = Settings(
            shape=ModelShape("tiny", 3, 32, 48, 4, 2, 8, 128, False, True, False), gpu=GPUS["h100"], gpus=2,
            tensor_parallel=2, bf16=False, micro_batch_tokens=24, prompts_per_step=2, group_size=1, mean_prompt=4,
            mean_response=8, updates=1, **found["case"],
        )  # fmt: skip
        assert passes(s).scoring == passes(s).forward == 1
        both = Counter(found["score"]) + Counter(found["update"])
        planned = {t.name.removeprefix("activations, "): t.count for t in traffic(s) if "activations" in t.name}
        assert planned == both, found["case"]
    assert len(counted) == 3


@pytest.mark.parametrize("job", SCRIPTS, ids="-".join)
def test_every_module_of_a_script_s_job_builds(built, job):
    (script, method), environment = job, SCRIPTS[job]
    name = {"math": "Qwen/Qwen2.5-Math-1.5B", "openr1": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}.get(
        method, "Qwen/Qwen2.5-7B" if "7b" in script else "Qwen/Qwen2.5-32B"
    )
    shape = shape_of(environment.get("MODEL_PATH", name), None)
    if "SMOKE_LAYERS" in environment:
        shape = type(shape)(**vars(shape) | {"num_hidden_layers": 2})
    tp = int(environment.get("TP", {"7b": 2, "32": 8}.get(script[14:16], 1)))
    pp = int(environment.get("PP", 1))
    result = built[3][job]
    assert result["parameters"] == [shape.parameters_on_rank(tp, pp, stage) for stage in range(pp)]
    assert len(result["trained"]) == pp and min(result["trained"]) > 5
    control = METHODS[f"aent_{method}" if script.startswith("train_aent") else method][1]
    assert result["controls"] == ([control] if control else [])


def test_every_method_and_script_takes_part():
    assert {method for script, method in SCRIPTS if script.startswith("train_qwen")} == set(METHODS)
