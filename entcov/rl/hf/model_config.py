"""The transformers configuration of the policy, with every key of `model.config` checked, and its tokenizer.

transformers accepts an unknown key and uses the default of the one that was meant; a bad value ends in a traceback from
its first use. Here both become one line that names the key.
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entcov import arguments as check
from entcov.rl.config import ModelConfig
from entcov.rl.data.tokenizer import load_tokenizer
from entcov.rl.recipe import ConfigError

# Keys that every configuration may hold without declaring them. Most attention layers read head_dim if there is one.
_GENERIC = {"head_dim", "name_or_path", "_name_or_path", "num_labels", "output_attentions", "per_layer_config"}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
# Keys that another key of the recipe sets.
_ELSEWHERE = {
    "attn_implementation": "model.attn_implementation", "_attn_implementation": "model.attn_implementation",
    "dtype": "model.compute_dtype", "torch_dtype": "model.compute_dtype",
}  # fmt: skip
_SMALL = 50_000_000  # weights; a model of so many is built in a second
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def model_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        return load_tokenizer(config.tokenizer or config.path)
    except ValueError as error:
        key = "model.path" if config.tokenizer is None else "model.tokenizer"
        raise ConfigError(f"{key}: {check.one_line(error, 300)}") from error


def model_settings(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration that the policy is built from. No dropout: what is trained must be what was sampled and scored.

    Raises:
        ConfigError: transformers knows no such model, or a key of `model.config` is unknown to it, is set elsewhere
            (the tokenizer's special tokens, precision, attention, dropout), or has a value that no model can be built
            and run with.
    """
    if config.path is None:
        settings = _from_keys(config, tokenizer)
    else:
        try:
            settings = AutoConfig.from_pretrained(config.path)
        except Exception as error:  # of any type, for a damaged or foreign config.json
            raise ConfigError(
                f"model.path: transformers cannot read the configuration of {config.path!r} ({_said(error)})"
            ) from error
        if type(settings) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(
                f"model.path: must hold a causal language model, got a {settings.model_type} in {config.path!r}"
            )
    if len(tokenizer) > settings.get_text_config().vocab_size:
        key = "model.path" if config.path is not None else "model.config.vocab_size"
        raise ConfigError(
            f"{key}: the model's vocabulary must hold the tokenizer's {len(tokenizer)} tokens, got "
            f"{settings.get_text_config().vocab_size}"
        )
    for name, value in settings.to_dict().items():
        if _is_dropout(name) and isinstance(value, float):
            setattr(settings, name, 0.0)
    return settings


def check_context(settings: PretrainedConfig, prompt: int, response: int) -> None:
    """Raises ConfigError where a prompt and a response may together be longer than the model has positions."""
    limit = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < prompt + response:  # some without a limit say -1
        raise ConfigError(
            "data.max_prompt_length + rollout.max_response_length: must not exceed the model's max_position_embeddings "
            f"= {limit}, got {prompt} + {response} = {prompt + response}"
        )


def _from_keys(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    arguments = dict(config.config)
    kind = arguments.pop("model_type", None)
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rule = "given (for example qwen3)" if kind is None else "a causal language model of transformers"
        known = check.suggestion(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"model.config.model_type: must be {rule}, got {check.shown(kind)}{known}")
    _check_settled(arguments, tokenizer)
    _check_sizes(kind, arguments)
    given = dict(arguments)
    arguments.setdefault("vocab_size", len(tokenizer))
    arguments |= {name: getattr(tokenizer, name) for name in _TOKENS}
    error = _failure(kind, arguments, config.attn_implementation)
    if error is not None:
        raise ConfigError(_blamed(kind, arguments, given, config.attn_implementation, error)) from error
    with _rope_warnings() as said:
        settings = AutoConfig.for_model(kind, **arguments)
    if said:
        raise ConfigError(
            f"model.config.rope_parameters: {check.one_line(said[0])}, got {check.shown(given.get('rope_parameters'))}"
        )
    _check_known(settings, given, "model.config")
    return settings


def _check_settled(arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    for key, value in arguments.items():
        if key in _ELSEWHERE:
            raise ConfigError(
                f"model.config.{key}: must be left out, {_ELSEWHERE[key]} sets it; got {check.shown(value)}"
            )
        if key in _TOKENS and value != getattr(tokenizer, key):
            raise ConfigError(
                f"model.config.{key}: must be the tokenizer's {getattr(tokenizer, key)}, or left out; got "
                f"{check.shown(value)}"
            )
        if _is_dropout(key) and value:
            raise ConfigError(
                f"model.config.{key}: must be 0 or left out, since the policy that is trained must be the one that was "
                f"sampled; got {check.shown(value)}"
            )


def _check_sizes(kind: str, arguments: Mapping[str, Any]) -> None:
    own = CONFIG_MAPPING[kind].attribute_map
    sizes = {*_SIZES, *(own[name] for name in _SIZES if name in own)}
    for key, value in arguments.items():
        if key in sizes and isinstance(value, int | float) and value < 1:
            raise ConfigError(f"model.config.{key}: must be at least 1, got {value}")


def _check_known(settings: PretrainedConfig, given: Mapping[str, Any], prefix: str) -> None:
    """Raises for a key that the configuration's class does not know. One that it took under an older name it knows."""
    cls = type(settings)
    known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map) | _GENERIC
    for_generation = GenerationConfig().to_dict()  # dropped by transformers: generation is set by the recipe's rollout
    for key, value in given.items():
        nested = getattr(settings, key, None) if key in cls.sub_configs else None
        if isinstance(nested, PretrainedConfig) and isinstance(value, dict):
            _check_known(nested, {k: v for k, v in value.items() if k != "model_type"}, f"{prefix}.{key}")
        elif key not in known and not hasattr(cls, key) and (key in vars(settings) or key in for_generation):
            raise ConfigError(
                f"{prefix}.{key}: unknown key of a {settings.model_type} model, got {check.shown(value)}"
                + check.suggestion(key, known)
            )


def _failure(kind: str, arguments: Mapping[str, Any], attention: str) -> Exception | None:
    """What goes wrong when such a model is built and reads two tokens; None: nothing, or nothing that is certain.

    The model is built and run on the meta device, without memory for weights. Some layers cannot run there,
    whatever the sizes: a small model is then run on the CPU, and a larger one counts as right.
    """
    try:
        model = _model(kind, arguments, attention, "meta")
        if attention != "eager":  # some kernels run on GPUs alone, and whether the sizes fit shows with any
            model = _model(kind, arguments, "eager", "meta")
    except Exception as error:  # any library's
        return None if "meta" in str(error) else error
    try:
        _read(model)
    except Exception:
        if sum(weight.numel() for weight in model.parameters()) > _SMALL:
            return None
        try:
            _read(_model(kind, arguments, "eager", "cpu"))
        except Exception as error:
            return error
    return None


def _model(kind: str, arguments: Mapping[str, Any], attention: str, device: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device(device), _quiet():
        settings = AutoConfig.for_model(kind, **arguments)
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=attention).eval()


@torch.no_grad()
def _read(model: nn.Module) -> None:
    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    with torch.random.fork_rng(devices=[]), torch.device(model.device), _quiet():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _blamed(kind: str, arguments: Mapping[str, Any], given: Mapping[str, Any], attention: str, error: Exception) -> str:
    """The message about `error`. It names the first key of the recipe without which the model can be built."""
    if attention != "eager" and _failure(kind, arguments, "eager") is None:
        return f"model.attn_implementation: a {kind} model cannot have it ({_said(error)}), got {attention!r}"
    for key, value in given.items():
        others = {name: other for name, other in arguments.items() if name != key}
        if _failure(kind, others, attention) is None:
            return f"model.config.{key}: no {kind} model can have it ({_said(error)}), got {check.shown(value)}"
    return f"model.config: no {kind} model can be built of it ({_said(error)})"


def _said(error: Exception) -> str:
    """The library's own words, shortened."""
    while isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    name = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
    return check.one_line(f"{name}{error}", 200)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), _rope_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _rope_warnings() -> Iterator[list[str]]:
    """Collects transformers' warnings about rope_parameters instead of printing them."""
    said: list[str] = []
    logger = logging.getLogger("transformers.modeling_rope_utils")

    def take(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "keys in `rope_parameters`" in text or "field must" in text:
            said.append(text)
        return False

    logger.addFilter(take)
    try:
        yield said
    finally:
        logger.removeFilter(take)


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name
