"""The training batch: sequences packed end to end, one entry per token, and its division into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from entcov.rl.types import Rollout

IGNORE_INDEX = -100
_POSITIONS_PER_SEQUENCE = 1 << 24  # token_id = sequence * 2^24 + position: unique below 16.7M tokens a sequence


@dataclass
class Batch:
    """S sequences (prompt + response) with N tokens in all. Position i of the packed axis predicts token i + 1.

    Every tensor is [N]. Where `loss_mask` is False (prompt tokens but the last, and each sequence's last token)
    `target` is `IGNORE_INDEX` and the floats are 0.
    """

    tokens: Tensor  # int64
    position: Tensor  # int64, starts again at 0 in each sequence
    lengths: tuple[int, ...]  # S sequence lengths, sum N
    target: Tensor  # int64, the next token
    loss_mask: Tensor  # bool, True where `target` is a response token
    token_id: Tensor  # int64, the same token has the same id in every split of the rollout batch
    sequence_length: Tensor  # int64, response tokens in this token's sequence
    advantage: Tensor
    rollout_logprob: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    logprob_version: int | None = None  # the actor's weight_version that `old_logprob` comes from

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def positions(self, sequences: Sequence[int]) -> Tensor:
        """[n] int64: where the tokens of these sequences are on the packed axis, in the order of `sequences`."""
        starts = list(accumulate(self.lengths, initial=0))
        pieces = [torch.arange(starts[s], starts[s + 1]) for s in sequences]
        return torch.cat([torch.empty(0, dtype=torch.int64), *pieces]).to(self.tokens.device)

    def response_means(self, values: Tensor) -> Tensor:
        """[S] float64 on the CPU: the mean of `values` [N] over the tokens of each response."""
        each, masks = (x.split(self.lengths) for x in (values.cpu().double(), self.loss_mask.cpu()))
        return torch.stack([own[mask].mean() for own, mask in zip(each, masks, strict=True)])

    def subset(self, sequences: Sequence[int]) -> Batch:
        """The sequences with these indices, in this order."""
        index = self.positions(sequences)
        return replace(
            self,
            lengths=tuple(self.lengths[s] for s in sequences),
            **{name: value[index] for name, value in self._tensors().items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def pack(rollouts: Sequence[Rollout]) -> Batch:
    """Lays the rollouts end to end, with their advantages and sampler log-probabilities on the response tokens."""
    if not rollouts:
        raise ValueError("rollouts: there must be at least one to train on, got 0")
    columns: dict[str, list] = {k: [] for k in ("tokens", "position", "target", "token_id", "length", "adv", "logprob")}
    lengths = []
    for s, rollout in enumerate(rollouts):
        prompt, response = list(rollout.prompt.tokens), rollout.tokens
        if not prompt or not response or len(response) != len(rollout.logprob):
            raise ValueError(
                f"rollouts[{s}]: prompt and response must not be empty and every response token needs its logprob, got "
                f"{len(prompt)} prompt tokens, {len(response)} response tokens, {len(rollout.logprob)} logprobs"
            )
        n = len(prompt) + len(response)
        unlearned = len(prompt) - 1  # positions whose next token is still the prompt's
        columns["tokens"] += prompt + response
        columns["position"] += range(n)
        columns["target"] += [IGNORE_INDEX] * unlearned + response + [IGNORE_INDEX]
        columns["token_id"] += range(s * _POSITIONS_PER_SEQUENCE, s * _POSITIONS_PER_SEQUENCE + n)
        columns["length"] += [len(response)] * n
        columns["adv"] += [0.0] * unlearned + [rollout.advantage] * len(response) + [0.0]
        columns["logprob"] += [0.0] * unlearned + rollout.logprob + [0.0]
        lengths.append(n)
    target = torch.tensor(columns["target"])
    return Batch(
        tokens=torch.tensor(columns["tokens"]),
        position=torch.tensor(columns["position"]),
        lengths=tuple(lengths),
        target=target,
        loss_mask=target != IGNORE_INDEX,
        token_id=torch.tensor(columns["token_id"]),
        sequence_length=torch.tensor(columns["length"]),
        advantage=torch.tensor(columns["adv"], dtype=torch.float32),
        rollout_logprob=torch.tensor(columns["logprob"], dtype=torch.float32),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int, padded: bool) -> list[list[int]]:
    """Sequence indices grouped so that no group costs more than `max_tokens`.

    A group's cost is its number of tokens, or with `padded` its size times its longest sequence. Sequences are taken
    longest first, so that padded groups hold similar lengths; a sequence longer than `max_tokens` is an error.
    """
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    if order and lengths[order[0]] > max_tokens:
        raise ValueError(
            f"actor.micro_batch_tokens: must hold the longest sequence, got {max_tokens} for a sequence of "
            f"{lengths[order[0]]} tokens"
        )
    groups: list[list[int]] = []
    used = 0
    for s in order:
        cost = lengths[groups[-1][0]] if padded and groups else lengths[s]
        if groups and used + cost <= max_tokens:
            groups[-1].append(s)
            used += cost
        else:
            groups.append([s])
            used = lengths[s]
    return groups


def mini_batches(groups: Sequence[int], count: int) -> list[list[int]]:
    """Divides sequences into `count` mini-batches of whole prompt groups, as even as whole groups allow.

    `groups[s]` is the prompt of sequence s. Groups stay together, so that advantages stay centred in a mini-batch.
    """
    members: dict[int, list[int]] = {}
    for s, g in enumerate(groups):
        members.setdefault(g, []).append(s)
    keys = list(members)
    count = min(count, len(keys))
    bounds = [round(i * len(keys) / count) for i in range(count + 1)]
    return [[s for g in keys[a:b] for s in members[g]] for a, b in zip(bounds, bounds[1:], strict=False)]
