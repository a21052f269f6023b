"""A recipe's text: YAML, presets and `key=value` overrides, as a plain mapping. entcov/rl/config.py has the keys."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entcov import arguments as check
from entcov.controls.published import preset

MOST_LEVELS = 20  # of nesting. A recipe has five; libyaml calls itself for each, and 100,000 would end the process
_KEY = re.compile(r"[^\s.\[\]=]+(\.[^\s.\[\]=]+)*")


class ConfigError(ValueError):
    """A recipe that cannot be run; every line of the message names a key, the rule and the value."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the recipe's `key` before the message of an error that is raised inside."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The recipe at `path` with `a.b=value` overrides applied in order; nothing is resolved and no key is checked.

    `preset: NAME` in the file stands for the keys of a published setting (entcov/controls/published.py) that the file
    does not have itself. The override `preset=NAME` sets all keys of that setting; later overrides may change them.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, no mapping, nested too deep, a malformed override or an unknown
            preset.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe: {path} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"recipe {path}: must be UTF-8 text, got the byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror})") from None
    with _told(f"recipe {path}"):
        _check_levels(text)
        tree = OmegaConf.load(io.StringIO(text))
    if not isinstance(tree, DictConfig):
        plain = OmegaConf.to_container(tree)
        raise ConfigError(f"recipe {path}: must be a mapping of keys, got {check.shown(plain)}")
    if "preset" in tree:
        with _told(f"recipe {path}"):
            name = OmegaConf.to_container(tree, resolve=False)["preset"]  # unresolved: its value may be a secret
            del tree["preset"]
            tree = OmegaConf.merge(preset(name), tree)
    for item in overrides:
        _override(tree, item)
    return tree


def resolved(tree: DictConfig, origin: str) -> dict[str, Any]:
    """The recipe as plain containers, every `${...}` replaced by its value.

    Raises:
        ConfigError: one has none, or a key that must be given (`???`) is not.
    """
    with _told(f"recipe {origin}"):
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)


def interpolations(raw: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of keys, the text there) for each value that is interpolated, or is a list with such a value."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from interpolations(value, (*above, key))
        elif any("${" in text for text in texts(value)):
            yield (*above, key), value


def value_at(tree: Any, path: tuple[str, ...]) -> Any:
    """What a plain tree holds under a path of keys; None where there is no such key."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def texts(value: Any) -> Iterator[str]:
    """The strings that a plain value consists of, without keys and empty ones."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def _override(tree: DictConfig, item: str) -> None:
    where = f"override {check.shown(item)}"
    key, separator, text = item.partition("=")
    if not separator or not _KEY.fullmatch(key):
        raise ConfigError(f"{where}: must have the form key=value, with a key such as actor.lr")
    if key.count(".") >= MOST_LEVELS:
        raise ConfigError(f"{where}: a key has at most {MOST_LEVELS} levels, got {key.count('.') + 1}")
    with _told(where):
        _check_levels(text)
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
        if key == "preset":
            tree.merge_with(preset(value))
        else:
            OmegaConf.update(tree, key, value, merge=True)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What YAML and OmegaConf raise becomes one line that begins with `where`."""
    try:
        yield
    except (yaml.YAMLError, _TooDeepError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_said(error)}") from None
    except (OmegaConfBaseException, RecursionError, ValueError, OSError) as error:
        key = getattr(error, "full_key", None)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{check.one_line(first, 600)}") from None


class _TooDeepError(Exception):
    pass


def _check_levels(text: str) -> None:
    """Raises where values nest deeper than MOST_LEVELS. The events are a flat stream, read up to that place."""
    levels = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            levels += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            levels -= 1
        if levels > MOST_LEVELS:
            raise _TooDeepError(f"at most {MOST_LEVELS} levels of nesting, more at line {event.start_mark.line + 1}")


def _said(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return check.one_line(error)
    return f"{check.one_line(error.problem)}, line {mark.line + 1}, column {mark.column + 1}"
