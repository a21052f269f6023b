"""Rollouts over several processes: each sampler generates and scores a share, and every rank gets all of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entcov.rl.collect import ARRAYS, derived_seed, pack_rollouts, temperature_of_each, unpack_rollouts
from entcov.rl.config import RolloutConfig
from entcov.rl.hf.sampler import InProcessSampler
from entcov.rl.interfaces import NamedWeights, Sampler
from entcov.rl.rewards.rules import RewardFunction
from entcov.rl.rewards.scorer import Scorer
from entcov.rl.types import Prompt, Rollout
from megatron_integration.process_groups import ProcessGroups

T = TypeVar("T")


@dataclass(frozen=True)
class SamplerRanks:
    """Which ranks generate. The ranks of a tuple share one sampler; the first of them reports its responses."""

    members: tuple[tuple[int, ...], ...]  # of each sampler, its ranks
    draws_by_prompt: bool  # a response's draws depend on the seed, its prompt and sample, not on its place in the call

    @property
    def own(self) -> int | None:
        """The number of the sampler that this rank belongs to."""
        rank = dist.get_rank()
        return next((i for i, ranks in enumerate(self.members) if rank in ranks), None)


def sampler_ranks(groups: ProcessGroups, rollout: RolloutConfig) -> SamplerRanks:
    """in_process: the first rank of each replica has a sampler. vllm colocated: every tensor_parallel consecutive ranks
    share one. vllm server: rank 0 asks the server. Collective."""
    if rollout.sampler == "vllm":
        if rollout.vllm.mode == "server":
            return SamplerRanks(((0,),), draws_by_prompt=True)
        size, world = rollout.vllm.tensor_parallel, dist.get_world_size()
        members = tuple(tuple(range(first, first + size)) for first in range(0, world, size))
        return SamplerRanks(members, draws_by_prompt=True)
    leaders: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(leaders, groups.replica if groups.replica_leader else None, group=groups.control)
    ranks = sorted((replica, rank) for rank, replica in enumerate(leaders) if replica is not None)
    return SamplerRanks(tuple((rank,) for _, rank in ranks), draws_by_prompt=False)


class SharedRollouts:
    """The `entcov.rl.interfaces.Sampler` of every rank, around the samplers that some of them have.

    The prompts of a call are divided over the samplers in order. The rank that generated a response computes
    its reward, so that ranks cannot disagree about it. All rollouts are returned on every rank, with rewards; their
    tokens and log-probabilities are in memory once a node. It may be called beside the updates, in another thread.

    Args:
        sampler: this rank's; None on a rank that belongs to no sampler and takes no part in weight syncs.
    """

    def __init__(self, sampler: Sampler | None, ranks: SamplerRanks, groups: ProcessGroups, reward_fn: RewardFunction):
        self.sampler, self.ranks, self.groups, self.reward_fn = sampler, ranks, groups, reward_fn

    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Gives the samplers the weights. Collective: a rank without a sampler helps to gather them."""
        if self.sampler is not None:
            self.sampler.sync(weight_version, named_weights)
        else:
            for _ in named_weights():
                pass

    def sleep(self, *, sync_follows: bool) -> None:
        if self.sampler is not None:
            self.sampler.sleep(sync_follows=sync_follows)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        temperature: float | Sequence[float],
        max_response_length: int,
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_done: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As `Sampler.generate`, with rewards. With one sampler, and with vLLM, the draws are a single process's."""
        count, own = len(self.ranks.members), self.ranks.own
        bounds = self._bounds(len(prompts))
        temperatures = temperature_of_each(temperature, len(prompts))
        own_rollouts: list[Rollout] = []
        if own is not None and bounds[own + 1] > bounds[own]:
            reports = self.ranks.members[own][0] == dist.get_rank()
            with Scorer(self.reward_fn) as scorer:
                own_rollouts = self.sampler.generate(
                    prompts[bounds[own] : bounds[own + 1]],
                    group_size=group_size,
                    temperature=temperatures[bounds[own] : bounds[own + 1]],
                    max_response_length=max_response_length,
                    top_p=top_p,
                    top_k=top_k,
                    seed=seed if count == 1 or self.ranks.draws_by_prompt else derived_seed(seed, own),
                    progress=progress,
                    on_done=scorer.take if reports else None,
                )
                if reports:
                    scorer.finish(own_rollouts)
        packed = pack_rollouts(own_rollouts)
        arrays = {name: packed.pop(name) for name in ARRAYS}
        shares = list(self._everywhere(lambda: packed))
        whole = {name: [value for share in shares for value in share[name]] for name in packed}
        sizes = [sum(length for _, _, length, *_ in share["each"]) for share in shares]
        gathered = {name: self._to_leaders(own, sizes) for name, own in arrays.items()}
        whole |= self.groups.sampling_node.once(lambda: gathered)
        return unpack_rollouts(whole, {prompt.uid: prompt for prompt in prompts})

    def _to_leaders(self, own: Tensor, sizes: list[int]) -> Tensor | None:
        """[sum of sizes] on the nodes' leaders: the arrays `own` [sizes[i]] of the first ranks of all samplers."""
        rank, group = dist.get_rank(), self.groups.sampling
        leads = rank in self.groups.node_leaders
        whole = own.new_empty(sum(sizes)) if leads else None
        parts = whole.split(sizes) if leads else [None] * len(sizes)
        for (source, *_), part in zip(self.ranks.members, parts, strict=True):
            if rank == source:
                for leader in set(self.groups.node_leaders) - {rank}:
                    dist.send(own, leader, group)
                if leads:
                    part.copy_(own)
            elif leads:
                dist.recv(part, source, group)
        return whole

    def prompt_logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """As `Sampler.prompt_logprobs`: each sampler does a share."""
        own, bounds = self.ranks.own, self._bounds(len(prompts))
        share = [] if own is None else prompts[bounds[own] : bounds[own + 1]]
        found = self.sampler.prompt_logprobs(share) if share else []
        return [row for rows in self._everywhere(lambda: found) for row in rows]

    def _bounds(self, count: int) -> list[int]:
        """Sampler i takes the prompts from bounds[i] to bounds[i + 1]."""
        samplers = len(self.ranks.members)
        return [round(i * count / samplers) for i in range(samplers + 1)]

    def _everywhere(self, own: Callable[[], T]) -> Iterator[T]:
        """`own()` of the first rank of each sampler, on every rank. One by one: a rank holds one payload at a time."""
        for ranks in self.ranks.members:
            payload = [own() if ranks[0] == dist.get_rank() else None]
            dist.broadcast_object_list(payload, src=ranks[0], group=self.groups.sampling)
            yield payload[0]


class CopySampler(InProcessSampler):
    """The in-process sampler on a copy of the model, which gets the trainer's weights by name at each `sync`."""

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
