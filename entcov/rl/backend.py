"""The transformers backend: one process that trains a transformers model; and the reference policy of a run."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from entcov.controls import Control
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.actor import needs_reference
from entcov.rl.config import ActorConfig, Config, PrimeConfig, RolloutConfig
from entcov.rl.hf.actor import TransformersActor, TransformersRewardModel
from entcov.rl.hf.model import build_model, save_model
from entcov.rl.hf.model_config import check_context
from entcov.rl.hf.sampler import InProcessSampler
from entcov.rl.interfaces import Sampler, Start
from entcov.rl.preflight import check_recipe, resolve_device
from entcov.rl.record.checkpoint import load_plain, save_checkpoint
from entcov.rl.record.sealed import CheckpointError, damage, replace_sealed
from entcov.rl.rewards.rules import RewardFunction

T = TypeVar("T")
REFERENCE = "the reference policy"
REWARD_MODEL = "reward_model"  # in a checkpoint


class TransformersBackend:
    """An `entcov.rl.interfaces.Backend` of one process, on the device of that name."""

    name = "transformers"
    is_rank0 = True
    world_size = 1

    def __init__(self, device: str = "auto"):
        self.device = device

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        return make()

    def max_over_ranks(self, value: int) -> int:
        return value

    def check(self, config: Config) -> None:
        check_recipe(config)

    def build_actor(
        self, config: ActorConfig, loss: PolicyLossConfig, controls: Sequence[Control], temperature: float, start: Start
    ) -> TransformersActor:
        policy, _ = build_model(start.stored_model, seed=start.seed, device=resolve_device(self.device))
        fresh = start.checkpoint is None
        if fresh and start.warm_start is not None:
            start.warm_start(policy)
        needed = start.reference or needs_reference(loss, controls)
        reference = reference_policy(policy, start.run_dir, fresh=fresh) if needed else None
        return TransformersActor(policy, config, loss, controls, temperature=temperature, reference=reference)

    def build_reward_model(
        self, config: PrimeConfig, start: Start, actor: TransformersActor
    ) -> TransformersRewardModel:
        policy, fresh = actor.model, start.checkpoint is None
        if config.path is not None:
            reference = self._other_model(config.path, start).requires_grad_(False).eval()
        elif actor.reference is not None:
            reference = actor.reference
        else:
            reference = reference_policy(policy, start.run_dir, fresh=fresh)
        if fresh:
            model = copy.deepcopy(reference).requires_grad_(True).train()
        else:
            model = self._other_model(str(start.checkpoint.file(REWARD_MODEL)), start)
        return TransformersRewardModel(model, actor.config, config, reference=reference)

    def _other_model(self, path: str, start: Start) -> nn.Module:
        """The model in a folder, with the policy's tokenizer, precision and attention."""
        tokenizer = start.stored_model.tokenizer or start.stored_model.path
        settings = dataclasses.replace(start.model, path=path, config=None, tokenizer=tokenizer)
        return build_model(settings, seed=start.seed, device=resolve_device(self.device))[0]

    def build_sampler(
        self, config: RolloutConfig, max_prompt_length: int, start: Start, actor: TransformersActor,
        tokenizer: PreTrainedTokenizerBase, reward_fn: RewardFunction,
    ) -> Sampler:  # fmt: skip
        model = actor.model
        check_context(model.config, max_prompt_length, config.max_response_length)
        if config.sampler == "vllm":
            from entcov.rl.vllm.sampler import build_vllm_sampler

            return build_vllm_sampler(config, max_prompt_length, model.config, model.compute_dtype, tokenizer)
        return InProcessSampler(model, tokenizer, batch_size=config.batch_size)

    def save(
        self, directory: Path, step: int, actor: TransformersActor, reward_model: TransformersRewardModel | None,
        tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], keep: int,
    ) -> None:  # fmt: skip
        writers = {"model": lambda path: save_model(actor.model, tokenizer, path)}
        if reward_model is not None:
            writers[REWARD_MODEL] = lambda path: save_model(reward_model.model, tokenizer, path)
        save_checkpoint(directory, step, writers, state, keep)

    def close(self) -> None: ...


def reference_policy(policy: nn.Module, run_dir: Path, *, fresh: bool) -> nn.Module:
    """A frozen copy of the policy that a fresh run begins with, kept in the run's folder for when it is resumed."""
    stored = run_dir / "reference"
    reference = copy.deepcopy(policy)
    if fresh:
        weights = reference.state_dict()
        replace_sealed(stored, {"weights.pt": lambda path: torch.save(weights, path)}, REFERENCE)
    else:
        check_reference(stored)
        reference.load_state_dict(load_plain(stored / "weights.pt", map_location="cpu"))
    return reference.requires_grad_(False).eval()


def check_reference(stored: Path) -> None:
    """Raises CheckpointError unless the folder holds what a fresh run has stored there."""
    if problem := damage(stored, REFERENCE):
        raise CheckpointError(f"{problem}; without it a run that compares with the reference cannot go on")
