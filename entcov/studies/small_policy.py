"""A small policy of this project and one scored rollout of it, for studies that need real tokens and no training."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from entcov.objective.advantages import GRPO
from entcov.rl.backend import TransformersBackend
from entcov.rl.batch import Batch, pack
from entcov.rl.hf.model import forward
from entcov.rl.load_config import parse_config
from entcov.rl.run import build

# Two layers, 46 thousand weights, on one-digit addition worked out in several styles.
RECIPE = {
    "steps": 1,
    "threads": 1,
    "model": {
        "tokenizer": "char",
        "config": {
            "model_type": "qwen3", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    },
    "data": {
        "task": "carry_arithmetic",
        "settings": {"max_digits": 1, "held_out_fraction": 0.3},
        "max_prompt_length": 16,
    },
    "warm_start": {"batch_size": 64, "lr": 5e-3, "warmup_steps": 10},
    "rollout": {"group_size": 8, "max_response_length": 40, "batch_size": 256},
    "logging": {"tensorboard": False},
}  # fmt: skip


def small_policy(seed: int, *, warm_start: int, prompts: int) -> tuple[nn.Module, Batch]:
    """The model after `warm_start` supervised steps, and its scored responses, 8 to a prompt, with GRPO's advantages.

    Raises:
        ValueError: no group has two different rewards, so that all advantages are 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = RECIPE | {"run_dir": folder, "seed": seed}
        recipe["warm_start"] = RECIPE["warm_start"] | {"steps": warm_start}
        loop = build(parse_config(recipe), TransformersBackend("cpu"), None)
    settings = loop.config.rollout
    first = warm_start * RECIPE["warm_start"]["batch_size"]
    rollouts = loop.sampler.generate(
        loop.stream.take(first, prompts), group_size=settings.group_size, temperature=1.0, seed=seed,
        max_response_length=settings.max_response_length,
    )  # fmt: skip
    for rollout in rollouts:
        rollout.reward = float(loop.reward_fn(rollout.prompt.example, rollout.text))
    batch = pack(rollouts)
    batch.assign_scores(loop.actor.compute_logprobs(batch), 0)
    batch.assign_advantages(GRPO()(batch.responses).value)
    if not batch.advantage.any():
        raise ValueError(
            f"seed {seed}: no group of responses has two rewards after {warm_start} steps: nothing to learn"
        )
    return loop.actor.model, batch


def response_rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [T, V], hidden states before the head [T, D]) that predict the response tokens, in the batch's order."""
    rows = partial(pad_sequence, batch_first=True)
    parts = batch.tokens, torch.ones_like(batch.tokens), batch.loss_mask
    ids, mask, own = (rows(x.split(batch.lengths)) for x in parts)
    out = forward(model, input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    return out.logits[own], out.hidden_states[-1][own]
