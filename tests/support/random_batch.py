"""A tiny model's configuration, and a batch of random responses of given lengths."""

from __future__ import annotations

import torch

from entcov.rl.batch import Batch, pack
from entcov.rl.types import Rollout
from tests.support.tiny_run import RECIPE, prompts

QWEN = RECIPE["model"]["config"]


def batch_of(lengths, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    made = []
    for prompt, n in zip(prompts(len(lengths)), lengths, strict=True):
        tokens = torch.randint(4, 15, (n,), generator=g).tolist()
        made.append(Rollout(prompt, 0, tokens, [-1.0] * n, finished=True, weight_version=0))
    return pack(made)
