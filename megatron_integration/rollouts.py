"""Rollouts of a job of several processes: each replica generates and scores a share, and every rank gets them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from entcov.rl.loop import derived_seed
from entcov.rl.rewards import RewardFunction
from entcov.rl.sampler import InProcessSampler
from entcov.rl.scoring import Scorer
from entcov.rl.types import Prompt, Rollout
from megatron_integration.layout import Layout

NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


class SharedRollouts:
    """A sampler for every rank of the job, around the samplers that the replicas' engine ranks have.

    The prompts of a call are divided over the replicas in order. Rewards are computed where a response was generated,
    while others are being generated, so that no two ranks can disagree about one. The rollouts that come back are the
    same on every rank, rewards included.

    Args:
        sampler: this rank's, on the first rank of each replica; None on the others.
        score: the reward function.
    """

    def __init__(self, sampler: Any | None, layout: Layout, score: RewardFunction):
        if (sampler is None) == layout.replica_leader:
            raise ValueError("sampler: must be given on the first rank of each replica and on no other rank")
        self.sampler, self.layout, self.score = sampler, layout, score
        leaders: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(leaders, layout.replica if layout.replica_leader else None, group=layout.control)
        self._leader_of = {replica: rank for rank, replica in enumerate(leaders) if replica is not None}

    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Gives the engine ranks' samplers the weights. Collective: a rank without a sampler helps to gather them."""
        weights = named_weights()
        if self.sampler is not None:
            self.sampler.sync(weight_version, lambda: weights)
        for _ in weights:  # also what a sampler left over: the other ranks are in the same collective
            pass

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        temperature: float,
        max_response_length: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        on_done: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As the samplers' `generate`. Collective. With one replica the draws are those of a single process.

        Responses come back scored, and `on_done` is not called: it announces responses to be scored.
        """
        replicas = self.layout.replicas
        bounds = [round(r * len(prompts) / replicas) for r in range(replicas + 1)]
        mine: list[Rollout] = []
        first, end = bounds[self.layout.replica : self.layout.replica + 2]
        if self.sampler is not None and end > first:
            with Scorer(self.score) as scorer:
                mine = self.sampler.generate(
                    prompts[first:end],
                    group_size=group_size,
                    temperature=temperature,
                    max_response_length=max_response_length,
                    seed=seed if replicas == 1 else derived_seed(seed, self.layout.replica),
                    progress=progress,
                    on_done=scorer.take,
                )
                scorer.finish(mine)
        everything: list[Rollout] = []
        for replica in range(replicas):  # one at a time: a rank holds the payload of one replica
            payload = [_pack(mine) if self.sampler is not None and replica == self.layout.replica else None]
            dist.broadcast_object_list(payload, src=self._leader_of[replica], group=self.layout.control)
            own = prompts[bounds[replica] : bounds[replica + 1]]
            everything += _unpack(payload[0], [prompt for prompt in own for _ in range(group_size)])
        return everything


class CopySampler(InProcessSampler):
    """The in-process sampler on a model of its own, which takes the trainer's weights by name at each `sync`."""

    def __init__(self, model: nn.Module, tokenizer, *, batch_size: int):
        super().__init__(model.requires_grad_(False), tokenizer, batch_size=batch_size)

    @torch.no_grad()
    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Copies the weights.

        Raises:
            RuntimeError: a weight that the model does not have, has in another shape, or did not get.
        """
        own = self.model.state_dict()
        by_storage = {weight.data_ptr(): name for name, weight in own.items()}  # tied weights are one
        waiting = set(by_storage.values())
        for name, weight in named_weights():
            if name not in own or own[name].shape != weight.shape:
                shape = tuple(own[name].shape) if name in own else "no such weight"
                raise RuntimeError(f"weight sync: {name} comes as {tuple(weight.shape)}, the sampler has {shape}")
            own[name].copy_(weight)
            waiting.discard(by_storage[own[name].data_ptr()])
        if waiting:
            raise RuntimeError(f"weight sync: the sampler did not get {', '.join(sorted(waiting))}")
        super().sync(weight_version, named_weights)


def _pack(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The rollouts' own data as arrays, without their prompts, which every rank has."""
    return {
        "tokens": np.array([token for r in rollouts for token in r.tokens], dtype=np.int32),
        "logprob": np.array([value for r in rollouts for value in r.logprob], dtype=np.float64),
        "length": [len(r.tokens) for r in rollouts],
        "sample": [r.sample for r in rollouts],
        "finished": [r.finished for r in rollouts],
        "weight_version": [r.weight_version for r in rollouts],
        "text": [r.text for r in rollouts],
        "reward": [r.reward for r in rollouts],
    }


def _unpack(packed: dict[str, Any], prompts: Sequence[Prompt]) -> list[Rollout]:
    out, start = [], 0
    tokens, logprob = packed["tokens"].tolist(), packed["logprob"].tolist()
    for i, (prompt, length) in enumerate(zip(prompts, packed["length"], strict=True)):
        own = {name: packed[name][i] for name in ("sample", "finished", "weight_version", "text", "reward")}
        end = start + length
        out.append(Rollout(prompt, tokens=tokens[start:end], logprob=logprob[start:end], **own))
        start = end
    return out
