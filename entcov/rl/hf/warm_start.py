"""Supervised steps on worked solutions before reinforcement."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch import nn

from entcov.rl.batch import Batch, micro_batches, pack
from entcov.rl.config import ActorConfig, Config, WarmStartConfig
from entcov.rl.data.stream import PromptStream
from entcov.rl.data.tokenizer import encode
from entcov.rl.hf.model import adamw, batch_token_stats
from entcov.rl.record.durable import clear_leftovers, locked, make_folder
from entcov.rl.record.sealed import CheckpointError, damage, replace_sealed
from entcov.rl.types import Prompt, Rollout

_WEIGHTS = "model.safetensors"


def warm_started(
    model: nn.Module, *, stream: PromptStream, config: Config, on_step: Callable[[int, float], None]
) -> None:
    """`warm_start` as the recipe says, or its result from `warm_start.cache_dir` where the same one was made before.

    The cache's key covers every key of the recipe that the result depends on, which is why it takes the whole recipe.
    """
    settings = config.warm_start
    if settings.cache_dir is None:
        warm_start(model, stream, settings, config.actor, on_step=on_step)
        return
    shared = ("betas", "weight_decay", "max_grad_norm", "micro_batch_tokens", "packing")
    actor = {key: getattr(config.actor, key) for key in shared}
    depends_on = [
        dataclasses.asdict(config.model), dataclasses.asdict(config.data), actor, config.seed, config.threads,
        {k: v for k, v in dataclasses.asdict(settings).items() if k != "cache_dir"},
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    stored = Path(settings.cache_dir) / key
    if not stored.exists():
        warm_start(model, stream, settings, config.actor, on_step=on_step)
        make_folder(stored.parent)
        with locked(stored.parent, wait=True):  # runs that make the same one at the same time
            clear_leftovers(stored.parent)
            if not stored.exists():
                replace_sealed(stored, {_WEIGHTS: lambda path: save_model(model, str(path))}, "a warm start")
        return
    if problem := damage(stored, "the warm start"):
        raise CheckpointError(f"{problem}; remove the folder, and it is made again")
    load_model(model, stored / _WEIGHTS)


def warm_start(
    model: nn.Module,
    stream: PromptStream,
    config: WarmStartConfig,
    actor: ActorConfig,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Maximum likelihood of `Example.solution` on the stream's first `steps * batch_size` prompts, in place.

    AdamW, linear warm-up then cosine decay to 0, token-mean loss in nats. Deterministic: the same model, stream and
    settings give the same weights.

    Args:
        on_step: called with (steps done, loss).

    Raises:
        ValueError: an example without a solution.
    """
    optimizer = adamw(model, actor, lr=config.lr)
    for step in range(config.steps):
        rate = min(1.0, (step + 1) / max(1, config.warmup_steps)) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate
        prompts = stream.take(step * config.batch_size, config.batch_size)
        batch = pack([_solved(prompt, stream.tokenizer) for prompt in prompts]).to(model.device)
        optimizer.zero_grad(set_to_none=True)
        groups = micro_batches(batch.lengths, actor.micro_batch_tokens, padded=not actor.packing)
        total = sum(_backward(model, batch.subset(group), batch, actor) for group in groups)
        nn.utils.clip_grad_norm_(model.parameters(), actor.max_grad_norm)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, total)


def _backward(model: nn.Module, micro: Batch, batch: Batch, actor: ActorConfig) -> float:
    stats = batch_token_stats(model, micro, packing=actor.packing)
    loss = -stats.logprob.sum() / batch.num_loss_tokens
    loss.backward()
    return loss.item()


def check_solved(prompt: Prompt) -> None:
    """Raises ValueError for a prompt without a worked solution."""
    if prompt.example.solution is None:
        raise ValueError(
            f"warm_start.steps: needs worked solutions, but prompt {prompt.uid} ({prompt.example.data_source}) has "
            "none; set warm_start.steps=0 or add a solution column"
        )


def _solved(prompt: Prompt, tokenizer) -> Rollout:
    """The worked solution as a rollout."""
    check_solved(prompt)
    ids = encode(tokenizer, prompt.example.solution) + [tokenizer.eos_token_id]
    return Rollout(prompt, sample=0, tokens=ids, logprob=[0.0] * len(ids), finished=True, weight_version=0)
