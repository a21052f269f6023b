"""A recipe as a checked `Config`, and back: messages name the key, the rule and the value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
from omegaconf import DictConfig, OmegaConf

from entcov import arguments as check
from entcov.rl.config import Config
from entcov.rl.recipe import ConfigError, interpolations, read_recipe, resolved, texts, value_at
from entcov.rl.record.durable import atomic_write

_SHOWN_OFFENDERS = 10


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML recipe, applies `a.b=value` overrides, resolves interpolations, and checks the whole.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, unreadable YAML: one line for each offence. Or an
            override that can have no effect.
    """
    config = resolve_config(read_recipe(recipe, overrides), str(recipe))
    changed = [item.partition("=")[0] for item in overrides]
    for section, choice, wanted, chosen in (
        ("megatron.", "actor.backend", "megatron", config.actor.backend),
        ("rollout.vllm.", "rollout.sampler", "vllm", config.rollout.sampler),
        ("prime.", "advantage", "prime", config.advantage),
    ):
        # A recipe may hold settings of a backend or sampler that it does not use; an override of one is a mistake.
        for key in changed:
            if key.startswith(section) and chosen != wanted and choice not in changed:
                raise ConfigError(f"{key}: has no effect with {choice}={chosen}; it needs {choice}={wanted}")
    return config


def resolve_config(tree: DictConfig, origin: str) -> Config:
    """The recipe with every interpolation resolved, checked. Messages show interpolations, and not their values."""
    raw, data = OmegaConf.to_container(tree, resolve=False), resolved(tree, origin)
    try:
        config = parse_config(data, origin)
    except ConfigError as error:
        message = str(error)
        for path, said in interpolations(raw):
            for text in texts(value_at(data, path)):
                message = _without(message.replace(repr(text), repr(said)), text, str(said))
        raise ConfigError(message) from None
    tree = dataclasses.asdict(config)
    config.interpolated = {path: (said, value_at(tree, path)) for path, said in interpolations(raw)}
    return config


def _without(message: str, value: str, said: str) -> str:
    """The message with `said` in place of `value`, also where it shows only the value's first 8 or more characters."""
    for length in range(len(value), 7, -1):
        message = message.replace(value[:length], said)
    return message


def parse_config(data: dict[str, Any], origin: str = "recipe") -> Config:
    """Checks a plain mapping and makes it a `Config`."""
    try:
        return pydantic.TypeAdapter(Config).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [_explain(e) for e in error.errors(include_url=False)]
    if len(lines) == 1:
        raise ConfigError(f"{origin}: {lines[0]}")
    more = len(lines) - _SHOWN_OFFENDERS
    lines = lines[:_SHOWN_OFFENDERS] + ([f"... and {more} more"] if more > 0 else [])
    raise ConfigError(f"{origin} cannot be run:\n" + "\n".join(f"  {line}" for line in lines))


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{check.one_line(key, 80)}: unknown key{_suggestion(key)}"
    if error["type"] == "missing":
        return f"{key}: must be given"
    message = check.one_line(error["msg"].removeprefix("Value error, "), 600)
    if error["type"] == "value_error":  # from __post_init__: the message says the value itself
        if not key or message.startswith(key):
            return message
        return f"{key}.{message}" if f"{key}.{re.split('[: ]', message)[0]}" in _keys(Config) else f"{key}: {message}"
    return f"{key}: {message}, got {check.shown(error['input'])}"


def _suggestion(key: str) -> str:
    """The nearest key of the same section, else keys of the same name in other sections."""
    section, _, name = key.rpartition(".")
    keys = list(_keys(Config))
    if near := check.suggestion(name, [one.rpartition(".")[2] for one in keys if one.rpartition(".")[0] == section]):
        return near.replace("mean ", f"mean {section}." if section else "mean ")
    same = [one for one in keys if one.rpartition(".")[2] == name]
    return f"; did you mean {' or '.join(same)}?" if same else ""


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a recipe, dotted, sections included."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")


def as_written(config: Config) -> dict[str, Any]:
    """The config as a plain tree with its interpolations unresolved: what may be stored and shown."""
    tree = dataclasses.asdict(config)
    for path, (said, value) in config.interpolated.items():
        if value_at(tree, path) == value:  # else the program has changed the key
            value_at(tree, path[:-1])[path[-1]] = said
    return tree


def save_config(config: Config, path: Path) -> None:
    """Writes the recipe with all its keys, loadable by `load_config`; interpolations stay as they are written."""
    atomic_write(path, OmegaConf.to_yaml(OmegaConf.create(as_written(config))).encode())
