"""Checks before a run writes anything that what the recipe names exists and fits together."""

import dataclasses
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from entcov import arguments as check
from entcov.controls import clamp_arguments
from entcov.rl.config import Config
from entcov.rl.data.stream import PromptStream
from entcov.rl.hf.model_config import check_context, model_settings, model_tokenizer
from entcov.rl.hf.warm_start import check_solved
from entcov.rl.recipe import ConfigError, naming
from entcov.rl.rewards.rules import load_reward
from entcov.rl.types import Example


def check_recipe(config: Config) -> PretrainedConfig:
    """Raises for a recipe with which a run would fail; returns the policy's configuration.

    Reads the data once more than the run does. Nothing is written.

    Raises:
        ConfigError, ValueError, TypeError, OSError, ImportError: naming the key or the file, the rule and the value.
    """
    resolve_device(config.device)
    clamp_arguments(config.build_controls())
    if config.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb: wandb is not installed (pip install wandb), got settings for it")
    with naming("data.reward"):
        load_reward(config.data.reward)
    tokenizer = model_tokenizer(config.model)
    settings = model_settings(config.model, tokenizer)
    check_context(settings, config.data.max_prompt_length, config.rollout.max_response_length)
    if config.model.path is not None:
        _check_weights(Path(config.model.path))
    if "token_reward" in config.build_estimator().needs and config.prime.path is not None:
        _check_reward_model(config, settings)
    stream = PromptStream.from_config(config.data, tokenizer, seed=config.seed)
    for prompt in stream.take(0, config.warm_start.batch_size if config.warm_start.steps else 1):
        if config.warm_start.steps:
            check_solved(prompt)
    if config.eval.prompts != 0:
        _check_sources(config, (prompt.example for prompt in stream.held_out(1)))
    return settings


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto": a GPU where torch finds one.

    Raises:
        ConfigError: torch knows no such device, or finds none on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: must be auto, cpu, or a device of torch such as cuda:0, got {name!r}") from None
    if device.type == "cpu":
        return device
    module = getattr(torch, device.type, None)
    count = module.device_count() if hasattr(module, "device_count") and module.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(f"device: torch finds {count} devices of type {device.type} on this machine, got {name!r}")
    return device


def _check_weights(folder: Path) -> None:
    """Raises where a local model has no weights, or an incomplete file of weights."""
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ConfigError(f"model.path: must hold weights (*.safetensors), got {folder} without any")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ConfigError(f"model.path: {file} is not a whole safetensors file ({check.one_line(error)})") from None


def _check_reward_model(config: Config, policy: PretrainedConfig) -> None:
    """Raises where `prime.path` holds no model, or one with another vocabulary than the policy's."""
    tokenizer = config.model.tokenizer or config.model.path
    other = dataclasses.replace(config.model, path=config.prime.path, config=None, tokenizer=tokenizer)
    try:
        found = model_settings(other, model_tokenizer(other))
        _check_weights(Path(other.path))
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "prime.path")) from error
    size, wanted = (settings.get_text_config().vocab_size for settings in (found, policy))
    if size != wanted:
        raise ConfigError(
            f"prime.path: must hold a model with the policy's vocabulary of {wanted} tokens, got {size} in "
            f"{other.path!r}"
        )


def _check_sources(config: Config, held_out: Iterable[Example]) -> None:
    """Raises for a misspelt data source. A name unlike all known ones may belong to files that are not read now."""
    known = {example.data_source for example in held_out}
    for name in sorted(config.eval.sources.keys() - known):
        if near := check.suggestion(name, known - config.eval.sources.keys()):
            raise ConfigError(f"eval.sources.{name}: no held-out prompt has that data_source{near}")
