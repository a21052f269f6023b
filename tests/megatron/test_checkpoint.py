"""Megatron checkpoints: resumed bit for bit, resharded, refused where they do not fit, and exported to Hugging Face."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from tests.support.megatron_processes import run_cases  # noqa: E402

TP, PP, PLAIN = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"distributed_optimizer": False}
CASES = [
    {"task": "agreement", "megatron": TP},
    {"task": "rollouts", "model": "qwen3", "megatron": {}},
    {"task": "resharding", "model": "qwen3", "megatron": TP, "to": [PP, {}]},
    {"task": "resharding", "model": "qwen2", "megatron": TP | PLAIN, "to": [PP | PLAIN, PLAIN]},
    {"task": "resharding", "model": "qwen2", "megatron": PP, "to": [TP | {"sequence_parallel": True}]},
    {"task": "resharding", "model": "qwen3", "megatron": {"overlap": True}, "to": [TP]},
    {"task": "resharding", "model": "qwen2", "megatron": TP, "to": [], "dtype": "bfloat16"},
    {"task": "resharding", "model": "qwen3", "megatron": TP | PLAIN, "to": [], "dtype": "bfloat16"},
    {"task": "wrong_load", "model": "qwen3", "megatron": {}},
    {"task": "export", "model": "qwen3", "megatron": TP, "shard_bytes": 5 << 30, "many_files": False},
    {"task": "export", "model": "qwen2", "megatron": PP, "shard_bytes": 1, "many_files": True},
    {"task": "export", "model": "llama", "megatron": PP, "shard_bytes": 5 << 30, "many_files": False},
]


def test_checkpoints_and_exports(policies):
    folder, _ = policies
    cases = [{"dtype": "float32"} | case | {"number": number} for number, case in enumerate(CASES)]
    problems = run_cases(2, folder, cases)
    assert not problems, "\n\n".join(f"{case}: {problem}" for case, problem in problems.items())
