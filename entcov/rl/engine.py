"""What a run stands on: the parts that an engine builds for it, and how the engine's processes act as one.

`TorchEngine` is one process with a transformers model. An engine of several processes has the same methods; every
process then runs the same code (entcov/rl/run.py), and the leader alone writes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from entcov.controls import Control
from entcov.rl.config import Config
from entcov.rl.data.stream import PromptStream
from entcov.rl.hf.actor import TorchActor
from entcov.rl.hf.model import build_model, save_model
from entcov.rl.hf.model_config import check_context
from entcov.rl.hf.sampler import build_sampler
from entcov.rl.hf.warm_start import warm_started
from entcov.rl.preflight import check_recipe, resolve_device
from entcov.rl.record.checkpoint import Checkpoint, load_plain, save_checkpoint
from entcov.rl.record.sealed import CheckpointError, damage, replace_sealed
from entcov.rl.rewards.rules import RewardFunction, load_reward

T = TypeVar("T")
REFERENCE = "the reference policy"
OnWarmStart = Callable[[int, float], None]  # told (steps done, loss in nats)


@dataclass
class Parts:
    """What the loop drives."""

    actor: Any
    sampler: Any
    stream: PromptStream
    controls: list[Control]
    score: RewardFunction
    writers: dict[str, Callable[[Path], None]]  # entries of a checkpoint besides the loop's own state


class TorchEngine:
    """One process. Its methods are what `entcov.rl.run.train` asks of any engine.

    name: the value of `actor.engine` that it serves.
    leads: whether this process logs, displays and writes. Exactly one process of an engine leads.
    processes: how many there are.
    """

    name = "torch"
    leads = True
    processes = 1

    def agree(self, make: Callable[[], T]) -> T:
        """`make()` as the leader has it, on every process. Collective."""
        return make()

    def greatest(self, value: int) -> int:
        """The greatest of all processes' values, on every process. Collective."""
        return value
    def check(self, config: Config) -> None:
        """Raises for a recipe that cannot be run, before anything is written. Collective."""
        check_recipe(config)

    def build(self, config: Config, checkpoint: Checkpoint | None, run_dir: Path, on_warm_start: OnWarmStart) -> Parts:
        """The parts of a fresh run, warm-started, or with the weights of `checkpoint`. Collective."""
        device = resolve_device(config.device)
        model, tokenizer = policy(config, checkpoint, device)
        check_context(config, model.config)
        stream = PromptStream.from_config(config.data, tokenizer, seed=config.seed)
        controls = config.build_controls()
        if checkpoint is None and config.warm_start.steps:
            warm_started(model, tokenizer, stream, config, on_step=on_warm_start)
        reference = _reference(config, model, run_dir, device, fresh=checkpoint is None)
        actor = TorchActor(
            model, config.actor, config.loss, controls, temperature=config.rollout.temperature, reference=reference
        )
        sampler = build_sampler(config, model, tokenizer)
        writers = {"model": lambda path: save_model(model, tokenizer, path)}
        return Parts(actor, sampler, stream, controls, load_reward(config.data.reward), writers)

    def save(self, directory: Path, step: int, parts: Parts, state: dict[str, Any], keep: int) -> None:
        """Stores a checkpoint, as `save_checkpoint`. Collective; `state` is the leader's."""
        save_checkpoint(directory, step, parts.writers, state, keep)


def policy(config: Config, checkpoint: Checkpoint | None, device: torch.device):
    """The policy with the recipe's weights, or the checkpoint's, and its tokenizer."""
    source = config.model
    if checkpoint is not None:
        path = str(checkpoint.path / "model")
        source = dataclasses.replace(source, path=path, config=None, tokenizer=path)
    return build_model(source, seed=config.seed, device=device)


def _reference(config: Config, model: nn.Module, run_dir: Path, device: torch.device, fresh: bool) -> nn.Module | None:
    """A frozen copy of the policy as reinforcement found it; kept on disk so that a resumed run uses the same one."""
    if config.loss.kl_coef == 0:
        return None
    stored = run_dir / "reference"
    reference = copy.deepcopy(model)
    if fresh:
        weights = reference.state_dict()
        replace_sealed(stored, {"weights.pt": lambda path: torch.save(weights, path)}, REFERENCE)
    else:
        if problem := damage(stored, REFERENCE):
            raise CheckpointError(f"{problem}; without it a run with loss.kl_coef={config.loss.kl_coef} cannot go on")
        reference.load_state_dict(load_plain(stored / "weights.pt", map_location=device))
    return reference.requires_grad_(False).eval()
