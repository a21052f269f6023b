"""The transformers backend: one process that trains a transformers model; and the reference policy of a run."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from entcov.controls import Control
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.actor import needs_reference
from entcov.rl.config import ActorConfig, Config, RolloutConfig
from entcov.rl.hf.actor import TransformersActor
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
        self, directory: Path, step: int, actor: TransformersActor, tokenizer: PreTrainedTokenizerBase,
        state: dict[str, Any], keep: int,
    ) -> None:  # fmt: skip
        writers = {"model": lambda path: save_model(actor.model, tokenizer, path)}
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
