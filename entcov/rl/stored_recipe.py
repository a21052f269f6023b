"""The recipe in a run's folder: stores RUN/config.yaml, compares it with that of a resumed run, reads it for `eval`.

config.yaml holds no secret: an interpolation such as ${oc.env:HF_TOKEN} is stored as it is written. Where its value
decides what is computed, config.digests.json holds a salted scrypt hash of the value, and resuming with another value
is an error. The file may come from somebody else: unless it is trusted, `load_run` refuses one that imports modules,
reads the environment or names a server.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from entcov import arguments as check
from entcov.rl.config import Config
from entcov.rl.load_config import as_written, resolve_config, save_config
from entcov.rl.recipe import ConfigError, interpolations, read_recipe, texts, value_at
from entcov.rl.record.durable import atomic_write

_CONFIG, _DIGESTS = "config.yaml", "config.digests.json"
# Keys that may change when a run is resumed: they decide how long it is and what is recorded, not what is computed.
_FREE_KEYS = (
    "run_dir", "steps", "checkpoint.", "logging.", "token_record.", "eval.", "warm_start.cache_dir", "megatron.",
    "rollout.vllm.",
)  # fmt: skip
# Keys that an evaluation depends on: its prompts, how responses are sampled and scored, and the hardware.
_KEYS_OF_AN_EVALUATION = (
    "eval.", "data.", "rollout.", "megatron.", "device", "threads", "model.compute_dtype", "model.attn_implementation",
    "actor.micro_batch_tokens",
)  # fmt: skip


def check_same_recipe(run_dir: Path, config: Config) -> None:
    """Raises ConfigError, whose message lists the keys that differ, where the folder's recipe is another one."""
    if not (run_dir / _CONFIG).exists():
        return
    if lines := _differences(run_dir, config):
        raise ConfigError(
            f"run_dir: {run_dir} holds a run of another recipe; choose another folder or restore these keys:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def store_recipe(run_dir: Path, config: Config) -> None:
    _store_digests(run_dir, config)
    save_config(config, run_dir / _CONFIG)


def load_run(run: str | Path, overrides: Sequence[str], *, trusted: bool) -> Config:
    """The recipe in a run's folder, to evaluate its policy with overrides.

    Args:
        trusted: whether config.yaml may import modules, read environment variables and choose a server. What an
            override says may do so in any case.

    Raises:
        ConfigError: `run` holds no run; an override is of a key that an evaluation does not depend on (those of
            the policy and its training cannot change); or the recipe needs trust and has none.
    """
    path = Path(run) / _CONFIG
    if not path.is_file():
        raise ConfigError(f"run: must be the folder of a run, with its {_CONFIG}, got {run}")
    for item in overrides:
        key = item.partition("=")[0]
        if not key.startswith(_KEYS_OF_AN_EVALUATION):
            raise ConfigError(
                f"{check.one_line(key, 80)}: has no effect on an evaluation; of the recipe's keys it depends on "
                f"{', '.join(one.rstrip('.') for one in _KEYS_OF_AN_EVALUATION)}"
            )
    tree = read_recipe(path, [*overrides, f"run_dir={run}"])
    if trusted:
        return resolve_config(tree, str(path))
    given = [item.partition("=")[0] for item in overrides]
    # Only a resolver reads the environment, and its call has a colon. Without a colon, ${a.b} is another key.
    wants = []
    for keys, said in interpolations(OmegaConf.to_container(tree, resolve=False)):
        if not any("${" in text and ":" in text for text in texts(said)):
            continue
        if keys[0] == "logging" and len(keys) > 1:  # tokens of loggers are here, and an evaluation does not log
            functools.reduce(lambda node, key: node[key], keys[:-1], tree)[keys[-1]] = None
        else:
            wants.append((".".join(keys), said, "reads more than other keys"))
    _refuse(path, wants, given)
    config = resolve_config(tree, str(path))
    model, data, vllm = config.model, config.data, config.rollout.vllm
    wants = [
        ("data.task", data.task, "imports a module") if data.task is not None and ":" in data.task else None,
        ("data.reward", data.reward, "imports a module") if data.reward is not None else None,
        ("model.attn_implementation", model.attn_implementation, "runs a kernel from the Hugging Face hub")
        if "/" in model.attn_implementation
        else None,
    ]
    if config.rollout.sampler == "vllm":
        wants += [
            ("rollout.vllm.url", vllm.url, "sends prompts, weights and a token") if vllm.url is not None else None,
            ("rollout.vllm.engine_args", vllm.engine_args, "may import modules") if vllm.engine_args else None,
        ]
    _refuse(path, [want for want in wants if want is not None], given)
    return config


def _refuse(path: Path, wants: list[tuple[str, Any, str]], given: list[str]) -> None:
    """Raises for what the file wants, unless a key that was given on the command line wants it."""
    lines = [
        f"  {key}: {value!r} {what}"
        for key, value, what in wants
        if not any(f"{key}.".startswith(f"{own}.") for own in given)
    ]
    if lines:
        raise ConfigError(
            f"{path} wants what a stranger's file should not have. If you know where it comes from, --trust-run lets "
            "it; or give these keys yourself, as key=value:\n" + "\n".join(lines)
        )


def _differences(run_dir: Path, config: Config) -> list[str]:
    """One line for each key that decides what is computed and has another value than in the folder."""
    path = run_dir / _CONFIG
    stored = resolve_config(read_recipe(path), str(path))
    before, now, shown = dataclasses.asdict(stored), dataclasses.asdict(config), _leaves(as_written(config))
    digests = _Digests.of(run_dir)
    for path, (said, _) in stored.interpolated.items():
        value = value_at(now, path)
        value_at(before, path[:-1])[path[-1]] = value if digests.match(path, value) else said
    before, now = _leaves(before), _leaves(now)
    lines = []
    for key in before | now:
        if before.get(key) == now.get(key) or key.startswith(_FREE_KEYS):
            continue
        was, is_ = before.get(key), shown.get(key)
        lines.append(f"{key}: was {was!r}, is {is_!r}" + (", which has another value now" if was == is_ else ""))
    return lines


def _store_digests(run_dir: Path, config: Config) -> None:
    paths = [path for path in config.interpolated if not ".".join(path).startswith(_FREE_KEYS)]
    if paths:
        digests, tree = _Digests(secrets.token_hex(16), {}), dataclasses.asdict(config)
        for path in paths:
            digests.values[".".join(path)] = digests.digest(value_at(tree, path))
        text = json.dumps(dataclasses.asdict(digests), indent=1) + "\n"
        atomic_write(run_dir / _DIGESTS, text.encode(), mode=0o600)
    else:
        (run_dir / _DIGESTS).unlink(missing_ok=True)


@dataclasses.dataclass
class _Digests:
    salt: str
    values: dict[str, str]  # by dotted key

    @classmethod
    def of(cls, run_dir: Path) -> _Digests:
        path = run_dir / _DIGESTS
        if not path.exists():
            return cls("", {})
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is damaged: it must hold salt and values") from None

    def match(self, path: tuple[str, ...], value: Any) -> bool:
        stored = self.values.get(".".join(path))
        return stored is not None and secrets.compare_digest(stored, self.digest(value))

    def digest(self, value: Any) -> str:
        """Slow, so that it takes long to find a value by guessing."""
        text = json.dumps(value, sort_keys=True).encode()
        return hashlib.scrypt(text, salt=self.salt.encode(), n=1 << 14, r=8, p=1, dklen=32).hex()


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree's values under dotted keys."""
    found = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
