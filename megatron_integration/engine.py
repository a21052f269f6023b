"""The engine of `python -m megatron_integration train`: what `entcov.rl.run.train` stands on, over many processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from entcov.rl.config import Config, ConfigError
from entcov.rl.data.stream import PromptStream
from entcov.rl.data.tokenizer import load_tokenizer
from entcov.rl.engine import REFERENCE, OnWarmStart, Parts, TorchEngine
from entcov.rl.hf import model as hf
from entcov.rl.hf.model_config import check_context
from entcov.rl.hf.sampler import build_sampler
from entcov.rl.hf.warm_start import warm_started
from entcov.rl.preflight import check_recipe
from entcov.rl.record.checkpoint import Checkpoint, save_checkpoint
from entcov.rl.record.sealed import CheckpointError, damage, replace_sealed
from entcov.rl.rewards.rules import load_reward
from megatron_integration.actor import MegatronActor
from megatron_integration.layout import agree, destroy_layout, make_layout, start_processes
from megatron_integration.model import (
    build_model,
    load_hf_weights,
    local_folder,
    make_bridge,
    refuse_unsupported,
    save_hf,
)
from megatron_integration.rollouts import CopySampler, Engines, SharedRollouts, engines_of
from megatron_integration.sharded import load_sharded, save_sharded

T = TypeVar("T")
INITIAL_MODEL = "initial_model"  # in the run directory: what reinforcement starts from, unless that is model.path


class MegatronEngine(TorchEngine):
    """One process of a torchrun job. Making it is collective, and so is every method.

    The run directory must be on a file system that all nodes share: every rank reads and writes checkpoints there.
    """

    name = "megatron"

    def __init__(self, config: Config):
        self.layout = make_layout(config.megatron, start_processes(config.device), seed=config.seed)
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.leads = self.rank == 0
        self._vllm_inside = config.rollout.engine == "vllm" and config.rollout.vllm.mode == "colocated"

    def agree(self, make: Callable[[], T]) -> T:
        """`make()` of rank 0 on every rank. If it fails there, the others raise PeerError."""
        return agree(self.layout, make)

    def greatest(self, value: int) -> int:
        everyones = torch.tensor(value)
        dist.all_reduce(everyones, op=dist.ReduceOp.MAX, group=self.layout.control)
        return int(everyones)
    def check(self, config: Config) -> None:
        settings = self.agree(lambda: check_recipe(config))
        refuse_unsupported(settings, config.megatron)

    def build(self, config: Config, checkpoint: Checkpoint | None, run_dir: Path, on_warm_start: OnWarmStart) -> Parts:
        if not (run_dir / "config.yaml").exists():
            raise ConfigError(f"run_dir: must be on a file system that all nodes share, rank {self.rank} finds no run "
                              f"in {run_dir}")  # fmt: skip
        initial = None  # a run that goes on needs it to compare with alone
        if checkpoint is None or config.loss.kl_coef > 0:
            fresh = checkpoint is None
            initial = local_folder(self.agree(lambda: _initial_model(config, run_dir, on_warm_start, fresh=fresh)))
        folder = initial if checkpoint is None else str(checkpoint.path / "model")
        tokenizer = load_tokenizer(folder if config.model.path is None else config.model.tokenizer or folder)
        dtype = getattr(torch, config.model.compute_dtype)
        bridge = make_bridge(folder, config.megatron, self.layout, dtype=dtype)
        if len(tokenizer) > bridge.hf_config.vocab_size:
            raise ValueError(
                f"model: its vocabulary must hold the tokenizer's {len(tokenizer)} tokens, got "
                f"{bridge.hf_config.vocab_size}"
            )
        check_context(config, bridge.hf_config)
        model = build_model(bridge, self.layout)
        if checkpoint is None:
            load_hf_weights(bridge, model, folder, self.layout)
        reference = None
        if config.loss.kl_coef > 0:
            reference = build_model(bridge, self.layout).requires_grad_(False).eval()
            load_hf_weights(bridge, reference, initial, self.layout)
        controls = config.build_controls()
        actor = MegatronActor(
            model, bridge, self.layout, config.actor, config.megatron, config.loss, controls,
            temperature=config.rollout.temperature, reference=reference,
        )  # fmt: skip
        if checkpoint is not None:
            load_sharded(actor, checkpoint.file("megatron"))
        score = load_reward(config.data.reward)
        engines = engines_of(self.layout, config.rollout)
        sampler = self._sampler(config, folder, tokenizer, engines)
        writers = {
            "model": lambda path: save_hf(
                bridge, actor.model, self.layout, tokenizer, path, source=folder, write=self.leads
            ),
            "megatron": lambda path: save_sharded(actor, path),
        }
        stream = PromptStream.from_config(config.data, tokenizer, seed=config.seed)
        shared = SharedRollouts(sampler, engines, self.layout, score)
        return Parts(actor, shared, stream, controls, score, writers)

    def save(self, directory: Path, step: int, parts: Parts, state: dict[str, Any], keep: int) -> None:
        """Every rank writes its part into rank 0's temporary folder; rank 0 checks, renames and moves the pointer.

        A rank that dies leaves the temporary folder behind, and `latest` at the checkpoint before.
        """
        if self.leads:
            writers = {name: self._leading(write) for name, write in parts.writers.items()}
            save_checkpoint(directory, step, writers, state, keep)
        else:
            for write in parts.writers.values():
                path: list[Any] = [None]
                dist.broadcast_object_list(path, src=0, group=self.layout.control)
                write(path[0])
                dist.barrier(group=self.layout.control)
        dist.barrier(group=self.layout.control)  # nobody trains on before the checkpoint is the latest

    def close(self) -> None:
        """Takes the process groups down, at the end of a job that went well.

        Where vLLM runs in these processes it holds groups of its own, and takes all of them down as the process ends.
        """
        if not self._vllm_inside:
            destroy_layout(self.layout)
            dist.destroy_process_group()

    def _leading(self, write: Callable[[Path], None]) -> Callable[[Path], None]:
        def lead(path: Path) -> None:
            dist.broadcast_object_list([path], src=0, group=self.layout.control)
            write(path)
            dist.barrier(group=self.layout.control)

        return lead

    def _sampler(self, config: Config, folder: str, tokenizer, engines: Engines):
        """This rank's sampler, whose weights `sync` brings before the first rollout; None where it needs none."""
        source = dataclasses.replace(config.model, path=folder, config=None, tokenizer=folder)
        if config.rollout.engine == "in_process":
            if engines.own is None:
                return None
            model, _ = hf.build_model(source, seed=config.seed, device=self.layout.device)
            return CopySampler(model, tokenizer, batch_size=config.rollout.batch_size)
        with torch.device("meta"):  # vLLM wants its configuration and class alone
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return build_sampler(config, model, tokenizer)


def _initial_model(config: Config, run_dir: Path, on_warm_start: OnWarmStart, *, fresh: bool) -> str:
    """The folder or hub name of the weights that reinforcement starts from. One process; made by a fresh run.

    The warm start and random weights are made by transformers in this process: they are for models that fit in it.
    """
    if config.model.path is not None and not config.warm_start.steps:
        return config.model.path
    stored = run_dir / INITIAL_MODEL
    if fresh:
        device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
        model, tokenizer = hf.build_model(config.model, seed=config.seed, device=device)
        if config.warm_start.steps:
            stream = PromptStream.from_config(config.data, tokenizer, seed=config.seed)
            warm_started(model, tokenizer, stream, config, on_step=on_warm_start)
        replace_sealed(stored, {"model": lambda path: hf.save_model(model, tokenizer, path)}, REFERENCE)
    elif problem := damage(stored, REFERENCE):
        raise CheckpointError(f"{problem}; without it a run with loss.kl_coef={config.loss.kl_coef} cannot go on")
    return str(stored / "model")
