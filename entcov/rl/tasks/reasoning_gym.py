"""Any dataset of the reasoning-gym package as a task: over a hundred procedural generators with their own scorers."""

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from entcov.rl.sandbox import IsolationError, SandboxPool
from entcov.rl.tasks.base import SPLITS, check_fraction, check_int, check_split_index, question_split, register
from entcov.rl.types import Example

_OPEN, _CLOSE = "<answer>", "</answer>"
_INSTRUCTION = f"\n\nGive your final answer between {_OPEN} and {_CLOSE}."
_NO_ANSWER = "(none recorded: reasoning-gym's scorer decides)"
_REFUSED = {
    "codeio": "its snippets draw unseeded numbers, so the same index is another question every time",
    "game_of_life_halting": "its scorer gives every answer the full score",
    "puzzle24": "its scorer takes any four numbers that make 24, not only those of the question",
}
# Their scorers pass the answer to `eval`, or to sympy's parse_expr, which calls it. `sandbox/guard.py` restricts it.
EVALUATED = frozenset(
    {
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
        *("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
    }
)
_TIME_LIMIT = 5.0  # seconds for one response

_BLOCK = 64  # consecutive indices that share one dataset object: some are slow to build
_DRAWS = 128  # questions an index may go through until one belongs to its split


@register
@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """A reasoning-gym dataset. Reward: 1.0 where its scorer gives the last <answer>...</answer> the full score.

    The splits draw from disjoint ranges of reasoning-gym's seeds, and a hash of the question gives every question to
    one split, as for the built-in tasks: no held-out question is ever trained on. Examples carry a `solution` where
    the dataset records an answer. Questions are made in a child process with a fixed hash seed (without it some
    generators differ from process to process), and each answer is scored in a confined child of that one, with a time
    limit. Scoring makes the question again from `extra_info`, so exported rows need nothing but the reasoning-gym
    version that wrote them.

    Args:
        dataset: a registered name ("chain_sum"), or "composite".
        settings: the dataset's own arguments, JSON values, without seed and size.
        seed: different seeds give different sequences of questions.
        held_out_fraction: part of the questions that belongs to the held-out split. Larger than the built-in tasks',
            because a held-out example takes 1 / fraction draws, and some datasets are slow.

    Raises:
        ImportError: reasoning-gym is not installed.
        IsolationError: a dataset whose scorer evaluates the answer, where the system lacks what confines it.
        ValueError: unknown dataset, refused settings, or too few distinct questions for two splits.
    """

    name: ClassVar[str] = "reasoning_gym"
    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    held_out_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_int(self, "seed", 0, 2**63 - 1)
        check_fraction(self, "held_out_fraction")
        known = _installed()["names"]
        if self.dataset not in known:
            raise ValueError(f"reasoning_gym: unknown dataset {self.dataset!r}; known: {', '.join(known)}")
        for key in ("seed", "size"):
            if key in self.settings:
                raise ValueError(f"reasoning_gym: settings must not hold {key!r}, got {self.settings[key]!r}")
        _check_dataset(self.dataset, json.dumps(self.settings))
        for split in SPLITS:
            self.example(split, 0)

    def example(self, split: str, index: int) -> Example:
        check_split_index(split, index)
        block, offset = divmod(index, _BLOCK)
        for draw in range(_DRAWS):
            where = self._where(split, block, draw * _BLOCK + offset)
            try:
                entry = _pool().ask(item=where)
            except ValueError as error:
                raise ValueError(f"reasoning_gym: {self.dataset} with settings {self.settings}: {error}") from None
            if entry is None:
                raise RuntimeError(f"reasoning_gym: {self.dataset} did not survive making {split} example {index}")
            if question_split(self._source, entry["question"], self.held_out_fraction) == split:
                return self._example(entry, {"split": split, "index": index, **where})
        raise ValueError(
            f"reasoning_gym: {self.dataset} with settings {self.settings} gave no {split} question in {_DRAWS} draws; "
            f"it has too few distinct questions for two splits with held_out_fraction = {self.held_out_fraction}"
        )

    @property
    def _source(self) -> str:
        return f"reasoning_gym/{self.dataset}"

    def _where(self, split: str, block: int, item: int) -> dict[str, Any]:
        """What names one question: a block of indices has a dataset (its seed), and each draw in it an item."""
        digest = hashlib.blake2b(f"{self._source}|{self.seed}|{split}|{block}".encode(), digest_size=8).digest()
        # Items are drawn from seed + item: train stays below 2**31, held-out above, and none reaches numpy's 2**32.
        low = 2**31 if split == "held_out" else 0
        size = _BLOCK * _DRAWS
        return {
            "dataset": self.dataset,
            "settings": json.dumps(self.settings, sort_keys=True),
            "seed": low + int.from_bytes(digest, "big") % (2**31 - size),
            "size": size,
            "item": item,
        }

    def _example(self, entry: dict[str, Any], where: dict[str, Any]) -> Example:
        answer = entry["answer"] if isinstance(entry["answer"], str) and entry["answer"].strip() else None
        if answer is not None and "Integral(" in answer:
            answer = None  # of intermediate_integration, where sympy found no antiderivative: it is the question again
        return Example(
            data_source=self._source,
            prompt=({"role": "user", "content": entry["question"] + _INSTRUCTION},),
            ground_truth=_NO_ANSWER if answer is None else answer,
            ability="reasoning",
            extra_info={**where, "version": _installed()["version"]},
            solution=None if answer is None else f"{_OPEN}{answer}{_CLOSE}",
        )

    @staticmethod
    def score(example: Example, response: str) -> float:
        answer = answer_in_tags(response)
        if answer is None:
            return 0.0
        info = example.extra_info
        keys = ("dataset", "settings", "seed", "size", "item")
        missing = [key for key in keys if key not in info]
        if missing:
            raise ValueError(f"{example.data_source}: extra_info must hold {', '.join(keys)}; missing: {missing}")
        _check_dataset(info["dataset"], info["settings"])
        try:
            return _pool().score(
                item={key: info[key] for key in keys},
                question=example.prompt[-1]["content"].removesuffix(_INSTRUCTION),
                answer=answer,
            )
        except ValueError as error:
            raise ValueError(
                f"{example.data_source}: item {info['item']} of seed {info['seed']} cannot be made again: {error} "
                f"(written by reasoning-gym {info.get('version')}, installed is {_installed()['version']})"
            ) from None


def answer_in_tags(response: str) -> str | None:
    """What the last <answer>...</answer> holds, without surrounding white space; None where there is none."""
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, max(end, 0))
    return None if start < 0 else response[start + len(_OPEN) : end].strip()


@functools.lru_cache(maxsize=64)
def _check_dataset(name: str, settings: str) -> None:
    """Refuses a dataset, or a composite with one, whose scores mean nothing, or whose scorer is not confined here."""
    members = _members(name, json.loads(settings))
    for member in sorted(members & _REFUSED.keys()):
        raise ValueError(f"reasoning_gym: {member} is refused: {_REFUSED[member]}")
    for member in sorted(members & EVALUATED):
        if lacking := _pool().lacking():
            raise IsolationError(f"reasoning_gym: {member} evaluates the answer and", lacking)


def _members(name: str, settings: dict[str, Any]) -> set[str]:
    """The datasets that a dataset with these settings draws from; settings of the wrong form are found elsewhere."""
    specs = settings.get("datasets", []) if name == "composite" else []
    return {name}.union(*(_members(spec["name"], spec.get("config") or {}) for spec in specs if "name" in spec))


@functools.cache
def _pool() -> SandboxPool:
    return SandboxPool("reasoning_gym", limit=_TIME_LIMIT, extra="tasks")


@functools.cache
def _installed() -> dict[str, Any]:
    """reasoning-gym's registered names and its version."""
    return _pool().ask(names=True)
