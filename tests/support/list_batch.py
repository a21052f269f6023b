"""The training batch one Python number at a time: what entcov/rl/batch.py must equal bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entcov.rl.batch import IGNORE_INDEX
from entcov.rl.types import Rollout


def packed(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Every column of a fresh batch, [N] each; `response_position` counts where a response token is predicted."""
    columns: dict[str, list] = {}
    for s, rollout in enumerate(rollouts):
        prompt, response = list(rollout.prompt.tokens), rollout.tokens.tolist()
        n, unlearned = len(prompt) + len(response), len(prompt) - 1
        own = {
            "tokens": prompt + response,
            "position": [*range(n)],
            "sequence": [s] * n,
            "target": [IGNORE_INDEX] * unlearned + response + [IGNORE_INDEX],
            "loss_mask": [False] * unlearned + [True] * len(response) + [False],
            "token_id": [s * 2**24 + i for i in range(n)],
            "sequence_length": [len(response)] * n,
            "rollout_logprob": [0.0] * unlearned + rollout.logprob.tolist() + [0.0],
            "response_position": [i - unlearned for i in range(n)],
        }
        for name, values in own.items():
            columns.setdefault(name, []).extend(values)
    return {name: torch.tensor(values) for name, values in columns.items()}


def positions(sequences: Sequence[int], lengths: Sequence[int]) -> Tensor:
    entries = [i for s in sequences for i in range(sum(lengths[:s]), sum(lengths[: s + 1]))]
    return torch.tensor(entries, dtype=torch.int64)


def means(values: Tensor, columns: dict[str, Tensor], lengths: Sequence[int]) -> Tensor:
    """[S] float64."""
    each, masks = (x.split(tuple(lengths)) for x in (values.double(), columns["loss_mask"]))
    return torch.stack([own[mask].mean() for own, mask in zip(each, masks, strict=True)])


def drop(columns: dict[str, Tensor], dropped: Tensor, lengths: Sequence[int]) -> None:
    """Takes loss tokens out of the columns, in place; `dropped`: of each loss token in order."""
    left = columns["loss_mask"].nonzero()[:, 0][~dropped].tolist()
    mask = torch.zeros_like(columns["loss_mask"])
    mask[left] = True
    columns["loss_mask"] = mask
    columns["target"] = torch.tensor(
        [t if kept else IGNORE_INDEX for t, kept in zip(columns["target"].tolist(), mask.tolist(), strict=True)]
    )
    counts = [int(own.sum()) for own in mask.split(tuple(lengths))]
    columns["sequence_length"] = torch.tensor([counts[s] for s in columns["sequence"].tolist()])


def said(rollout: Rollout) -> dict:
    """Everything that a rollout says, to compare by ==."""
    return vars(rollout) | {"tokens": rollout.tokens.tolist(), "logprob": rollout.logprob.tolist()}
