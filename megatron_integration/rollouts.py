"""Rollouts of a job of several processes: each engine generates and scores a share, and every rank gets them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from entcov.rl.config import RolloutConfig
from entcov.rl.hf.sampler import InProcessSampler
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.rollouts import derived_seed
from entcov.rl.types import Prompt, Rollout
from megatron_integration.layout import Layout

NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Engines:
    """Which ranks generate: groups of ranks with one engine each, of which the first rank reports the responses."""

    members: tuple[tuple[int, ...], ...]  # of each engine, its ranks
    draws_by_prompt: bool  # a response's draws depend on the seed, its prompt and sample, not on its place in the call

    @property
    def own(self) -> int | None:
        """The engine that this rank belongs to."""
        rank = dist.get_rank()
        return next((i for i, ranks in enumerate(self.members) if rank in ranks), None)


def engines_of(layout: Layout, rollout: RolloutConfig) -> Engines:
    """in_process: the first rank of each replica has one. vllm colocated: every tensor_parallel ranks in a row share
    one. vllm server: rank 0 asks the server. Collective."""
    if rollout.engine == "vllm":
        if rollout.vllm.mode == "server":
            return Engines(((0,),), draws_by_prompt=True)
        size, world = rollout.vllm.tensor_parallel, dist.get_world_size()
        members = tuple(tuple(range(first, first + size)) for first in range(0, world, size))
        return Engines(members, draws_by_prompt=True)
    leaders: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(leaders, layout.replica if layout.replica_leader else None, group=layout.control)
    ranks = sorted((replica, rank) for rank, replica in enumerate(leaders) if replica is not None)
    return Engines(tuple((rank,) for _, rank in ranks), draws_by_prompt=False)


class SharedRollouts:
    """A sampler for every rank of the job, around the samplers that some of them have.

    The prompts of a call are divided over the engines in order. Rewards are computed where a response was generated,
    while others are being generated, so that no two ranks can disagree about one. The rollouts that come back are the
    same on every rank, rewards included.

    Args:
        sampler: this rank's; None on a rank that belongs to no engine and takes no part in weight syncs.
        score: the reward function.
    """

    def __init__(self, sampler: Any | None, engines: Engines, layout: Layout, score: RewardFunction):
        if sampler is None and engines.own is not None:
            raise ValueError(f"sampler: must be given on ranks of an engine, got None on rank {dist.get_rank()}")
        self.sampler, self.engines, self.layout, self.score = sampler, engines, layout, score

    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Gives the samplers the weights. Collective: a rank without a sampler helps to gather them."""
        if self.sampler is not None:
            self.sampler.sync(weight_version, named_weights)
        else:
            for _ in named_weights():
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
        """As the samplers' `generate`. Collective. With one engine, and with vLLM, the draws are a single process's.

        Responses come back scored, and `on_done` is not called: it announces responses to be scored.
        """
        count, own = len(self.engines.members), self.engines.own
        bounds = [round(i * len(prompts) / count) for i in range(count + 1)]
        mine: list[Rollout] = []
        if own is not None and bounds[own + 1] > bounds[own]:
            reports = self.engines.members[own][0] == dist.get_rank()
            with Scorer(self.score) as scorer:
                mine = self.sampler.generate(
                    prompts[bounds[own] : bounds[own + 1]],
                    group_size=group_size,
                    temperature=temperature,
                    max_response_length=max_response_length,
                    seed=seed if count == 1 or self.engines.draws_by_prompt else derived_seed(seed, own),
                    progress=progress,
                    on_done=scorer.take if reports else None,
                )
                if reports:
                    scorer.finish(mine)
        everything: list[Rollout] = []
        for engine, ranks in enumerate(self.engines.members):  # one at a time: a rank holds one engine's payload
            payload = [_pack(mine) if ranks[0] == dist.get_rank() else None]
            dist.broadcast_object_list(payload, src=ranks[0], group=self.layout.control)
            asked = prompts[bounds[engine] : bounds[engine + 1]]
            everything += _unpack(payload[0], [prompt for prompt in asked for _ in range(group_size)])
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
        "timed_out": [r.timed_out for r in rollouts],
    }


def _unpack(packed: dict[str, Any], prompts: Sequence[Prompt]) -> list[Rollout]:
    out, start = [], 0
    tokens, logprob = packed["tokens"].tolist(), packed["logprob"].tolist()
    for i, (prompt, length) in enumerate(zip(prompts, packed["length"], strict=True)):
        names = ("sample", "finished", "weight_version", "text", "reward", "timed_out")
        own = {name: packed[name][i] for name in names}
        end = start + length
        out.append(Rollout(prompt, tokens=tokens[start:end], logprob=logprob[start:end], **own))
        start = end
    return out
