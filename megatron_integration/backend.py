"""The Megatron backend: Megatron-Core in the processes that torchrun started."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core import LLMBridge
from megatron.core.transformer.module import MegatronModule
from transformers import PreTrainedTokenizerBase

from entcov.controls import Control
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.actor import needs_reference
from entcov.rl.backend import REFERENCE, REWARD_MODEL, check_reference
from entcov.rl.config import ActorConfig, Config, MegatronConfig, PrimeConfig, RolloutConfig
from entcov.rl.hf import model as hf
from entcov.rl.hf.model_config import check_context
from entcov.rl.interfaces import Sampler, Start
from entcov.rl.preflight import check_recipe
from entcov.rl.recipe import ConfigError
from entcov.rl.record.checkpoint import save_checkpoint
from entcov.rl.record.sealed import replace_sealed
from entcov.rl.rewards.rules import RewardFunction
from megatron_integration.actor import MegatronActor, MegatronRewardModel
from megatron_integration.bridge import (
    build_model,
    load_hf_weights,
    local_folder,
    make_bridge,
    refuse_unsupported,
    save_hf,
)
from megatron_integration.checkpoint import load_sharded, save_sharded
from megatron_integration.process_groups import make_process_groups, start_processes
from megatron_integration.rollouts import CopySampler, SharedRollouts, sampler_ranks

INITIAL_MODEL = "initial_model"  # in the run directory: the initial weights, unless they are those of model.path


class MegatronBackend:
    """An `entcov.rl.interfaces.Backend`: one process of a torchrun job. Making it is collective.

    The run directory must be on a file system that all nodes share: every rank reads and writes checkpoints there.
    """

    name = "megatron"

    def __init__(self, config: MegatronConfig, *, device: str = "auto", seed: int = 0):
        self.config = config
        self.groups = make_process_groups(config, start_processes(device), seed=seed)
        self.world_size = dist.get_world_size()
        self.is_rank0 = dist.get_rank() == 0
        self.broadcast_from_rank0 = self.groups.broadcast_from_rank0
        self._vllm_in_process = False
        self._initial: str | None = None  # the folder of the weights that reinforcement started from, once asked for

    def max_over_ranks(self, value: int) -> int:
        most = torch.tensor(value)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.control)
        return int(most)

    def check(self, config: Config) -> None:
        refuse_unsupported(self.broadcast_from_rank0(lambda: check_recipe(config)), self.config)

    def build_actor(
        self, config: ActorConfig, loss: PolicyLossConfig, controls: Sequence[Control], temperature: float, start: Start
    ) -> MegatronActor:
        if not (start.run_dir / "config.yaml").exists():
            raise ConfigError(
                f"run_dir: must be on a file system that all nodes share, rank {dist.get_rank()} finds no run in "
                f"{start.run_dir}"
            )
        folder = self._initial_folder(start) if start.checkpoint is None else start.stored_model.path
        bridge = make_bridge(folder, self.config, self.groups, dtype=getattr(torch, start.model.compute_dtype))
        policy, reference = build_model(bridge, self.groups), None
        if start.checkpoint is None:
            load_hf_weights(bridge, policy, folder, self.groups)
        if start.reference or needs_reference(loss, controls):
            reference = self._frozen(bridge, self._initial_folder(start))
        actor = MegatronActor(
            policy, bridge, self.groups, config, self.config, loss, controls,
            temperature=temperature, reference=reference,
        )  # fmt: skip
        if start.checkpoint is not None:
            load_sharded(actor, start.checkpoint.file("megatron"))
        return actor

    def build_reward_model(self, config: PrimeConfig, start: Start, actor: MegatronActor) -> MegatronRewardModel:
        folder = self._initial_folder(start) if config.path is None else local_folder(config.path)
        bridge = make_bridge(folder, self.config, self.groups, dtype=actor.bridge.dtype)
        shared = actor.reference if config.path is None else None
        model = build_model(bridge, self.groups)
        if start.checkpoint is None:
            load_hf_weights(bridge, model, folder, self.groups)
        reward_model = MegatronRewardModel(
            model, bridge, self.groups, actor.config, self.config, config,
            reference=self._frozen(bridge, folder) if shared is None else shared,
        )  # fmt: skip
        if start.checkpoint is not None:
            load_sharded(reward_model, start.checkpoint.file(REWARD_MODEL))
        return reward_model

    def _initial_folder(self, start: Start) -> str:
        """The folder of the weights that reinforcement started from, made in a fresh run. Collective."""
        if self._initial is None:
            self._initial = local_folder(self.broadcast_from_rank0(lambda: initial_model(start, self.groups.device)))
        return self._initial

    def _frozen(self, bridge: LLMBridge, folder: str) -> MegatronModule:
        model = build_model(bridge, self.groups).requires_grad_(False).eval()
        load_hf_weights(bridge, model, folder, self.groups)
        return model

    def build_sampler(
        self, config: RolloutConfig, max_prompt_length: int, start: Start, actor: MegatronActor,
        tokenizer: PreTrainedTokenizerBase, reward_fn: RewardFunction,
    ) -> Sampler:  # fmt: skip
        bridge, ranks, sampler = actor.bridge, sampler_ranks(self.groups, config), None
        check_context(bridge.hf_config, max_prompt_length, config.max_response_length)
        if config.sampler == "vllm":
            from entcov.rl.vllm.sampler import build_vllm_sampler

            self._vllm_in_process = config.vllm.mode == "colocated"
            sampler = build_vllm_sampler(config, max_prompt_length, bridge.hf_config, bridge.dtype, tokenizer)
        elif ranks.own is not None:
            source = start.model.in_folder(bridge.hf_config.name_or_path)
            copy, _ = hf.build_model(source, seed=start.seed, device=self.groups.device)
            sampler = CopySampler(copy, tokenizer, batch_size=config.batch_size)
        return SharedRollouts(sampler, ranks, self.groups, reward_fn)

    def save(
        self, directory: Path, step: int, actor: MegatronActor, reward_model: MegatronRewardModel | None,
        tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], keep: int,
    ) -> None:  # fmt: skip
        """Every rank writes its shard into rank 0's temporary folder; rank 0 checks, renames and moves the pointer.

        A rank that dies leaves the temporary folder behind, and `latest` at the checkpoint before.
        """
        writers = {
            "model": lambda path: save_hf(actor.bridge, actor.model, self.groups, tokenizer, path),
            "megatron": lambda path: save_sharded(actor, path),
        }
        if reward_model is not None:
            writers[REWARD_MODEL] = lambda path: save_sharded(reward_model, path)

        def on_every_rank(write: Callable[[Path], None], path: Path | None = None) -> None:
            shared = [path]
            dist.broadcast_object_list(shared, src=0, group=self.groups.control)
            write(shared[0])
            dist.barrier(group=self.groups.control)

        if self.is_rank0:
            collective = {name: partial(on_every_rank, write) for name, write in writers.items()}
            save_checkpoint(directory, step, collective, state, keep)
        else:
            for write in writers.values():
                on_every_rank(write)
        dist.barrier(group=self.groups.control)  # no rank trains on before `latest` names the checkpoint

    def close(self) -> None:
        """Ends the process groups, unless vLLM runs in these processes: it ends all groups itself."""
        if not self._vllm_in_process:
            self.groups.destroy()
            dist.destroy_process_group()


def initial_model(start: Start, device: torch.device) -> str:
    """The folder or hub name of the weights that reinforcement starts from. Called by one process.

    The warm start and random weights are made by transformers in this process: they are for models that fit in it.
    """
    if start.model.path is not None and start.warm_start is None:
        return start.model.path
    stored = start.run_dir / INITIAL_MODEL
    if start.checkpoint is not None:
        check_reference(stored)
    else:
        policy, tokenizer = hf.build_model(start.model, seed=start.seed, device=device)
        if start.warm_start is not None:
            start.warm_start(policy)
        replace_sealed(stored, {"model": lambda path: hf.save_model(policy, tokenizer, path)}, REFERENCE)
    return str(stored / "model")
