"""The smallest recipe that goes through every part of the trainer, shared by the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from entcov.rl.record.metrics import read_metrics
from entcov.rl.types import Example, Prompt

RECIPE: dict[str, Any] = {
    "steps": 3,
    "threads": 1,
    "model": {
        "tokenizer": "char",
        "config": {
            "model_type": "qwen3",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    },
    "data": {
        "task": "carry_arithmetic",
        "settings": {"max_digits": 1, "styles": ["direct"], "held_out_fraction": 0.3},
        "max_prompt_length": 16,
    },
    "warm_start": {"steps": 20, "batch_size": 32, "lr": 1e-2, "warmup_steps": 2},
    "rollout": {"prompts_per_step": 6, "group_size": 4, "max_response_length": 8},
    "actor": {"lr": 1e-3, "updates_per_rollout": 3, "micro_batch_tokens": 256, "warmup_steps": 2},
    "eval": {"every": 2, "prompts": 8, "samples": 2},
    "checkpoint": {"every": 1, "keep": 2},
    "logging": {"tensorboard": False},
}


def recipe(run_dir: Path | str, **overrides: Any) -> dict[str, Any]:
    """RECIPE in `run_dir` with dotted keys replaced, as in recipe(path, **{"actor.lr": 1.0})."""
    tree = _copy(RECIPE) | {"run_dir": str(run_dir)}
    for key, value in overrides.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def timeless(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of a run without those that hold times."""
    rows = read_metrics(run_dir)
    return [{k: v for k, v in row.items() if not k.startswith(("timing", "perf/throughput"))} for row in rows]


def token_files(run_dir: Path) -> dict[str, bytes]:
    """The files of the record of responses, by name."""
    folder = run_dir / "tokens"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prompts(n: int) -> list[Prompt]:
    """Random prompts of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    tokens = [torch.randint(4, 40, (k,), generator=generator).tolist() for k in lengths]
    return [Prompt(i, Example("test", (), ""), tuple(t)) for i, t in enumerate(tokens)]


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
