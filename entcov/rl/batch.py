"""The training batch: sequences packed end to end, one entry per token, and its division into micro-batches.

Columns are flat arrays. What tokens, lengths and the loss mask decide is no column: it is made where it is read, of the
entries that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entcov.objective.responses import Responses
from entcov.objective.tokens import Tokens
from entcov.rl.types import Rollout

IGNORE_INDEX = -100
_POSITIONS_PER_SEQUENCE = 1 << 24  # token_id = sequence * 2^24 + position: unique below 16.7M tokens a sequence


@dataclass
class Batch:
    """S sequences (prompt + response) with N tokens in all. Position i of the packed axis predicts token i + 1.

    Every tensor is [N]. Where `loss_mask` is False (prompt tokens but the last, and each sequence's last token)
    `target` is `IGNORE_INDEX` and the floats are 0.
    """

    tokens: Tensor  # int32
    lengths: tuple[int, ...]  # S sequence lengths, sum N
    loss_mask: Tensor  # bool, True where the next token is a response token
    advantage: Tensor
    rollout_logprob: Tensor
    responses: Responses  # S of them: what is known of whole responses
    temperatures: tuple[float | None, ...]  # S of them: that each was sampled at; None: the recipe's
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    token_reward: Tensor | None = None  # of a reward model
    entropy: Tensor | None = None  # this and the next three of the policy that scored, as `old_logprob`
    clamped_entropy: Tensor | None = None
    entropy_drift: Tensor | None = None
    collision: Tensor | None = None
    selected: dict[str, Tensor] = field(default_factory=dict)  # by control: tokens that it chose for all updates
    logprob_version: int | None = None  # the actor's weight_version that `old_logprob` comes from

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def sequence(self) -> Tensor:
        """[N] int64: the number in this batch of each token's sequence."""
        lengths, total = self._lengths, len(self.tokens)  # the sum is given, so that a GPU's host does not wait for it
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)

    @property
    def position(self) -> Tensor:
        """[N] int64: starts again at 0 in each sequence."""
        position = torch.arange(len(self.tokens), device=self.tokens.device)
        position -= self._starts.repeat_interleave(self._lengths, output_size=len(position))
        return position

    @property
    def target(self) -> Tensor:
        """[N] int64: the next token."""
        return torch.where(self.loss_mask, self.tokens.roll(-1), IGNORE_INDEX).long()

    @property
    def token_id(self) -> Tensor:
        """[N] int64: the same token has the same id in every split of the rollout batch."""
        return self.responses.number[self.sequence] * _POSITIONS_PER_SEQUENCE + self.position

    @property
    def sequence_length(self) -> Tensor:
        """[N] int64: loss tokens in this token's sequence."""
        return self._loss_tokens_of_each[self.sequence]

    @cached_property
    def _bounds(self) -> np.ndarray:
        """[S + 1] int64, on the host: sequence s has the entries from bounds[s] to bounds[s + 1]."""
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    @property
    def _lengths(self) -> Tensor:
        return torch.from_numpy(np.diff(self._bounds)).to(self.tokens.device)

    @property
    def _starts(self) -> Tensor:
        return torch.from_numpy(self._bounds[:-1]).to(self.tokens.device)

    @property
    def _loss_tokens_of_each(self) -> Tensor:
        """[S] int64."""
        before = torch.nn.functional.pad(self.loss_mask.cumsum(0), (1, 0))
        return before[torch.from_numpy(self._bounds).to(before.device)].diff()

    @property
    def temperature(self) -> float | None:
        """The one temperature of all sequences, as `micro_batches` groups them; None: the recipe's.

        Raises:
            ValueError: they differ.
        """
        found = set(self.temperatures)
        if len(found) != 1:
            raise ValueError(f"temperatures: all sequences of a micro-batch must have one, got {self.temperatures}")
        return found.pop()

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def positions(self, sequences: Sequence[int]) -> Tensor:
        """[n] int64: where the tokens of these sequences are on the packed axis, in the order of `sequences`."""
        chosen = np.asarray(sequences, dtype=np.int64)
        starts, ends = self._bounds[chosen], self._bounds[chosen + 1]
        lengths = ends - starts
        shift = starts - (lengths.cumsum() - lengths)  # from the place among the chosen to that among all
        index = np.arange(lengths.sum())
        index += np.repeat(shift, lengths)
        return torch.from_numpy(index).to(self.tokens.device)

    def loss_tokens_by_sequence(self) -> np.ndarray:
        """[S] int64, on the host."""
        return np.add.reduceat(self.loss_mask.cpu().numpy(), self._bounds[:-1], dtype=np.int64)

    def response_means(self, values: Tensor) -> Tensor:
        """[S] float64 on the CPU: the mean of `values` [N] over the tokens of each response."""
        mask = self.loss_mask.cpu().numpy()
        own = torch.from_numpy(values.cpu().numpy()[mask]).split(self.loss_tokens_by_sequence().tolist())
        return torch.stack([part.double().mean() for part in own])

    def subset(self, sequences: Sequence[int]) -> Batch:
        """The sequences with these indices, in this order."""
        rows = torch.tensor(sequences, dtype=torch.int64, device=self.tokens.device)
        chosen = {name: tuple(getattr(self, name)[s] for s in sequences) for name in ("lengths", "temperatures")}
        runs = self._runs(sequences)
        return self._map(
            lambda value: torch.cat([value[a:b] for a, b in runs] or [value[:0]]),
            **chosen,
            responses=self.responses.at(rows),
        )

    def _runs(self, sequences: Sequence[int]) -> list[tuple[int, int]]:
        """[first, end) on the packed axis of the pieces that make up these sequences: neighbours are one piece."""
        chosen = np.asarray(sequences, dtype=np.int64)
        breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
        pieces = [piece[[0, -1]] for piece in np.split(chosen, breaks)] if len(chosen) else []
        return [(int(self._bounds[first]), int(self._bounds[last + 1])) for first, last in pieces]

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda value: value.to(device), responses=self.responses.to(device))

    def _map(self, change: Callable[[Tensor], Tensor], **others: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        others |= {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, selected={name: change(mask) for name, mask in self.selected.items()}, **others)

    def assign_scores(self, stats: Mapping[str, Tensor], version: int) -> None:
        """Sets what an actor's `compute_logprobs` returned, and the weight_version that it had."""
        self.old_logprob, self.ref_logprob = stats["logprob"], stats.get("ref_logprob")
        self.entropy, self.entropy_drift = stats["entropy"], stats["entropy_drift"]
        self.clamped_entropy, self.collision = stats.get("clamped_entropy"), stats.get("collision")
        self.logprob_version = version

    def assign_advantages(self, advantage: Tensor) -> None:
        """Sets the advantages of the loss tokens: [S], one of each response, or one of each loss token in order."""
        if advantage.shape == (self.num_sequences,):
            self.advantage = torch.where(self.loss_mask, advantage.to(self.advantage)[self.sequence], 0.0)
        else:
            self.advantage = torch.zeros_like(self.advantage)
            self.advantage[self.loss_mask] = advantage.to(self.advantage)

    def drop(self, dropped: Tensor) -> None:
        """Takes loss tokens out of the loss; `dropped` [n] bool, one entry of each loss token in order."""
        self.loss_mask = self.loss_mask.clone()
        self.loss_mask[self.loss_mask.clone()] = ~dropped
        self.advantage = torch.where(self.loss_mask, self.advantage, 0.0)

    def loss_tokens(self, at: Tensor, logprob: Tensor, **statistics: Tensor | None) -> Tokens:
        """The loss's view of the entries `at` (mask or indices); `logprob` and `statistics` hold these entries."""

        def taken(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[at]

        at = at.nonzero()[:, 0] if at.dtype is torch.bool else at  # once for all columns
        sequence, responses = self.sequence[at], self.responses
        position = at - self._starts[sequence]
        unlearned = self._lengths - responses.length - 1  # positions whose next token is still the prompt's
        return Tokens(
            logprob=logprob,
            old_logprob=self.old_logprob[at],
            advantage=self.advantage[at],
            loss_mask=self.loss_mask[at],
            ref_logprob=taken(self.ref_logprob),
            rollout_logprob=self.rollout_logprob[at],
            sequence_length=self._loss_tokens_of_each[sequence],
            token_id=responses.number[sequence] * _POSITIONS_PER_SEQUENCE + position,
            sequence=responses.number[sequence],
            position=position - unlearned[sequence],
            reward=responses.score[sequence],
            group=responses.group[sequence],
            lag=responses.lag[sequence],
            token_reward=taken(self.token_reward),
            **statistics,
        )


def pack(rollouts: Sequence[Rollout]) -> Batch:
    """Lays the rollouts end to end, with the sampler's log-probabilities on the response tokens; advantages are 0."""
    if not rollouts:
        raise ValueError("rollouts: there must be at least one to train on, got 0")
    prompts = {id(r.prompt): np.array(r.prompt.tokens, dtype=np.int32) for r in rollouts}  # once for a group
    for s, rollout in enumerate(rollouts):
        sizes = len(rollout.prompt.tokens), len(rollout.tokens), len(rollout.logprob)
        if not sizes[0] or not sizes[1] or sizes[1] != sizes[2]:
            raise ValueError(
                f"rollouts[{s}]: prompt and response must not be empty and every response token needs its logprob, got "
                f"{sizes[0]} prompt tokens, {sizes[1]} response tokens, {sizes[2]} logprobs"
            )
    # Of each sequence: entries whose next token is still the prompt's, those of the response, and the last one.
    parts = np.array([(len(r.prompt.tokens) - 1, len(r.tokens), 1) for r in rollouts])
    zeros = np.zeros(max(1, parts[:, 0].max()), dtype=np.float32)
    tokens = np.concatenate([part for r in rollouts for part in (prompts[id(r.prompt)], r.tokens)])
    mask = np.repeat(np.tile([False, True, False], len(rollouts)), parts.ravel())
    unlearned = parts[:, 0].tolist()
    logprob = [part for r, n in zip(rollouts, unlearned, strict=True) for part in (zeros[:n], r.logprob, zeros[:1])]
    return Batch(
        tokens=torch.from_numpy(tokens),
        lengths=tuple(parts.sum(1).tolist()),
        loss_mask=torch.from_numpy(mask),
        advantage=torch.zeros(len(tokens)),
        rollout_logprob=torch.from_numpy(np.concatenate(logprob)),
        responses=_table(rollouts),
        temperatures=tuple(rollout.temperature for rollout in rollouts),
    )


def _table(rollouts: Sequence[Rollout]) -> Responses:
    """A rollout that was not scored has reward 0."""
    score = [0.0 if r.reward is None else r.reward for r in rollouts]
    shaped = [own if r.shaped_reward is None else r.shaped_reward for own, r in zip(score, rollouts, strict=True)]
    components = _components(rollouts)
    return Responses(
        reward=torch.tensor(shaped, dtype=torch.float32),
        score=torch.tensor(score, dtype=torch.float32),
        group=torch.tensor([r.prompt.uid for r in rollouts]),
        length=torch.tensor([len(r.tokens) for r in rollouts]),
        number=torch.arange(len(rollouts)),
        lag=torch.tensor([r.lag for r in rollouts]),
        baseline=_column([r.baseline for r in rollouts]),
        components=components,
    )


def _column(values: list[float | None]) -> Tensor | None:
    """[S] float32; None unless all are there."""
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float32)


def _components(rollouts: Sequence[Rollout]) -> dict[str, Tensor] | None:
    """The reward's components by name. Responses with other names, or without, beside some with them are an error."""
    names = set(rollouts[0].components or ())
    for s, rollout in enumerate(rollouts):
        if set(rollout.components or ()) != names:
            raise ValueError(
                f"rollouts[{s}]: the reward function must return the same components for every response, got "
                f"{sorted(rollout.components or ())} and for the first one {sorted(names)}"
            )
    return {name: _column([r.components[name] for r in rollouts]) for name in sorted(names)} or None


def micro_batches(
    lengths: Sequence[int], max_tokens: int, padded: bool, temperatures: Sequence[float | None] = ()
) -> list[list[int]]:
    """Sequence indices grouped so that no group costs more than `max_tokens`, and each has one temperature.

    A group's cost is its number of tokens, or with `padded` its size times its longest sequence. Sequences are taken
    longest first, so that padded groups hold similar lengths; a sequence longer than `max_tokens` is an error.
    `temperatures`: of each sequence; none given: they are equal.
    """
    if len(kinds := dict.fromkeys(temperatures)) > 1:
        return [
            [own[i] for i in group]
            for own in ([s for s in range(len(lengths)) if temperatures[s] == kind] for kind in kinds)
            for group in micro_batches([lengths[s] for s in own], max_tokens, padded)
        ]
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
    if not keys:
        return []
    count = min(count, len(keys))
    bounds = [round(i * len(keys) / count) for i in range(count + 1)]
    return [[s for g in keys[a:b] for s in members[g]] for a, b in zip(bounds, bounds[1:], strict=False)]
