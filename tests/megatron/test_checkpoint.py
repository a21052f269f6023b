"""Megatron checkpoints: resumed bit for bit, resharded, refused where they do not fit, and exported to Hugging Face."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from megatron_integration import checkpoint  # noqa: E402
from tests.support.fused_adam import FusedAdam  # noqa: E402
from tests.support.megatron_processes import run_cases  # noqa: E402

TP, PP, PLAIN = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"distributed_optimizer": False}
CASES = [
    {"task": "agreement", "megatron": TP},
    {"task": "rollouts", "model": "qwen3", "megatron": {}},
    {"task": "rollouts", "model": "qwen3", "megatron": {}, "nodes": 2},
    {"task": "resharding", "model": "qwen3", "megatron": TP, "to": [PP, {}]},
    {"task": "resharding", "model": "qwen2", "megatron": TP | PLAIN, "to": [PP | PLAIN, PLAIN]},
    {"task": "resharding", "model": "qwen2", "megatron": PP, "to": [TP | {"sequence_parallel": True}]},
    {"task": "resharding", "model": "qwen3", "megatron": {"overlap": True}, "to": [TP]},
    {"task": "resharding", "model": "qwen2", "megatron": TP, "to": [], "dtype": "bfloat16"},
    {"task": "resharding", "model": "qwen3", "megatron": TP | PLAIN, "to": [], "dtype": "bfloat16"},
    {"task": "wrong_load", "model": "qwen3", "megatron": {}},
    # What Transformer Engine's Adam keeps, which a GPU has.
    {"task": "resharding", "model": "qwen3", "megatron": TP, "to": [PP], "fused_adam": True},
    {"task": "resharding", "model": "qwen2", "megatron": PP | PLAIN, "to": [], "fused_adam": True},
    {"task": "resharding", "model": "qwen2", "megatron": TP, "to": [], "dtype": "bfloat16", "fused_adam": True},
    {"task": "resharding", "model": "qwen3", "megatron": PLAIN, "to": [], "dtype": "bfloat16", "fused_adam": True},
    {"task": "wrong_load", "model": "qwen3", "megatron": {}, "fused_adam": True},
    {"task": "export", "model": "qwen3", "megatron": TP, "shard_bytes": 5 << 30, "many_files": False},
    {"task": "export", "model": "qwen2", "megatron": PP, "shard_bytes": 1, "many_files": True},
    {"task": "export", "model": "llama", "megatron": PP, "shard_bytes": 5 << 30, "many_files": False},
]


def test_checkpoints_and_exports(policies):
    folder, _ = policies
    cases = [{"dtype": "float32"} | case | {"number": number} for number, case in enumerate(CASES)]
    problems = run_cases(2, folder, cases)
    assert not problems, "\n\n".join(f"{case}: {problem}" for case, problem in problems.items())


def test_steps_are_found_where_transformer_engines_adam_keeps_them(tmp_path):
    """One a group; a rank may hold no parameter of a group, or none at all."""

    def check(groups: list, version: int, change=lambda optimizer: None) -> None:
        optimizer = FusedAdam([{"params": params} for params in groups])
        for param in (p for group in groups for p in group):
            param.grad = torch.ones_like(param)
        optimizer.step()
        change(optimizer)
        actor = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer), weight_version=version)
        checkpoint._check_steps(actor, tmp_path)

    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    check([weights[:2], weights[2:]], version=1)
    check([weights, []], version=1, change=lambda optimizer: optimizer.param_groups[1].pop("step"))
    check([[]], version=1, change=lambda optimizer: optimizer.param_groups[0].pop("step"))
    with pytest.raises(RuntimeError, match=r"must have its own step count of 2, found \[1.0\]"):
        check([weights, []], version=2)
    with pytest.raises(RuntimeError, match="the optimizer's steps could not be read after loading"):
        check([weights], version=1, change=lambda optimizer: optimizer.param_groups[0].pop("step"))
