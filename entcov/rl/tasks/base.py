"""What a task is, and the base of the built-in generators.

A task turns `(split, index)` into an `Example` and a response into a reward; both are pure functions, so a run's data
position is one integer. The registry maps the names that recipes use to task classes.
"""

import dataclasses
import hashlib
import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from entcov import arguments as check
from entcov.rl.types import Example

SPLITS = ("train", "held_out")
MARK = "#"  # what follows the last mark is the answer
ALPHABET = "\n #()*+,-./0123456789:=?abcdefghijklmnopqrstuvwxyz"  # the characters of every built-in prompt and solution

_MAX_DRAWS = 10_000  # rejection sampling gives up after this many; a checked setting needs about 1 / held_out_fraction
_PROBE_DRAWS = 2_000
_MIN_DISTINCT = 10


@runtime_checkable
class Task(Protocol):
    """What the trainer needs of a task. `score` is static: rewards find it by the example's `data_source` alone."""

    name: ClassVar[str]

    def example(self, split: str, index: int) -> Example:
        """The example at `index` of `split` ("train" or "held_out"): a pure function of task, split, index >= 0."""
        ...

    @staticmethod
    def score(example: Example, response: str) -> float:
        """Reward of `response`, 0.0 or 1.0. Never raises on any response."""
        ...


TASKS: dict[str, type] = {}
_TaskClass = TypeVar("_TaskClass", bound=type)


def register(cls: _TaskClass) -> _TaskClass:
    """Class decorator: makes the task known under `cls.name`, to `make_task` and (as "entcov/NAME") to the rewards."""
    if cls.name in TASKS and TASKS[cls.name] is not cls:
        raise ValueError(f"task name {cls.name!r} is already taken by {TASKS[cls.name].__qualname__}")
    TASKS[cls.name] = cls
    return cls


def make_task(name: str, **settings: Any) -> Task:
    """Builds a task by its registered name, or by "module:Class" for a task of your own.

    Raises:
        ValueError: unknown name (the message lists the known ones) or a setting out of range.
        TypeError: a setting that the task does not have.
    """
    cls = import_object(name, "task") if ":" in name else TASKS.get(name)
    if cls is None:
        raise ValueError(
            f"unknown task {check.shown(name)}; known: {', '.join(sorted(TASKS))}, or 'module:Class' for your own"
            + check.suggestion(name, TASKS)
        )
    known = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else None
    unknown = [key for key in settings if known is not None and key not in known]
    if unknown:
        raise TypeError(
            f"task {name!r} has no setting {unknown[0]!r}; it has: {', '.join(known)}"
            + check.suggestion(unknown[0], known)
        )
    return cls(**settings)


def import_object(spec: str, what: str) -> Any:
    """The object that "module:attribute" names; `what` says in the error what was being looked for."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{what} must be given as 'module:attribute', got {spec!r}")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module exists, one of its own imports does not: that traceback is the useful one
        raise ValueError(f"{what} {spec!r}: there is no module {error.name!r}") from None
    except AttributeError:
        raise ValueError(f"{what} {spec!r}: module {module_name!r} has no {attribute!r}") from None


def answer_after_mark(text: str) -> str | None:
    """What follows the last "#", without surrounding white space; None where there is no mark."""
    _, mark, tail = text.rpartition(MARK)
    return tail.strip() if mark else None


def score_after_mark(example: Example, response: str) -> float:
    """1.0 where the text after the response's last "#" is exactly the ground truth, else 0.0."""
    return 1.0 if answer_after_mark(response) == example.ground_truth else 0.0


def question_split(task: str, key: str, held_out_fraction: float) -> str:
    """The split a question belongs to: a hash of (task, question) alone, so no seed and no index can move it."""
    return "held_out" if _hash(f"split|{task}|{key}") < held_out_fraction * 2**64 else "train"


def check_split_index(split: str, index: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"index must be an integer >= 0, got {index!r}")


def check_int(task: object, name: str, low: int, high: int) -> None:
    """Raises unless setting `name` of `task` is an integer in [low, high]."""
    value = getattr(task, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{task.name}: {name} must be an integer in [{low}, {high}], got {value!r}")


def check_choices(task: object, name: str, known: Sequence[str]) -> None:
    """Raises unless setting `name` of `task` is a non-empty selection of `known` without repeats; makes it a tuple."""
    value = getattr(task, name)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{task.name}: {name} must be a list of at least one of {', '.join(known)}, got {value!r}")
    for entry in value:
        if entry not in known:
            raise ValueError(f"{task.name}: {name} must be among {', '.join(known)}, got {entry!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"{task.name}: {name} must not repeat an entry, got {list(value)!r}")
    object.__setattr__(task, name, tuple(value))


def check_fraction(task: object, name: str) -> None:
    value = getattr(task, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ValueError(f"{task.name}: {name} is a fraction, 0 < {name} < 1, got {value!r}")


def join_steps(rng: random.Random, steps: Sequence[str], answer: str) -> str:
    """Steps parted by freely drawn separators, then the mark and the answer.

    Each separator is drawn separately and changes no answer: this entropy has no effect on the reward.
    """
    text = "".join(step + rng.choice(" ,\n") for step in steps[:-1]) + (steps[-1] if steps else "")
    return text + MARK + answer


Q = TypeVar("Q")


@dataclass(frozen=True, kw_only=True)
class GeneratedTask(ABC, Generic[Q]):
    """Base of the built-in generators: a subclass draws questions, this class gives them splits and indices.

    Train and held-out examples never share a question, for any seeds and any indices: a hash of the question decides
    its split, and `example` draws again until the split fits.

    Args:
        seed: different seeds give different sequences of questions over the same two splits.
        held_out_fraction: part of the question space, 0 < fraction < 1, that belongs to the held-out split.
    """

    name: ClassVar[str]
    ability: ClassVar[str] = "math"
    seed: int = 0
    held_out_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_int(self, "seed", 0, 2**63 - 1)
        check_fraction(self, "held_out_fraction")
        self._check_space()

    @abstractmethod
    def draw(self, rng: random.Random) -> Q:
        """A random question."""

    @abstractmethod
    def key(self, question: Q) -> str:
        """Equal for questions that count as the same one (3+5 and 5+3)."""

    @abstractmethod
    def prompt(self, question: Q) -> str:
        """The question as the model reads it, in ALPHABET."""

    @abstractmethod
    def answer(self, question: Q) -> str:
        """The ground truth that `score` compares with."""

    @abstractmethod
    def solve(self, question: Q, rng: random.Random) -> str:
        """One of the right responses, drawn at random."""

    @staticmethod
    def score(example: Example, response: str) -> float:
        return score_after_mark(example, response)

    def example(self, split: str, index: int) -> Example:
        check_split_index(split, index)
        rng = random.Random(_hash(f"{self.name}|{self.seed}|{split}|{index}"))
        question = self._draw_until(rng, lambda key: self._split(key) == split)
        return Example(
            data_source=f"entcov/{self.name}",
            prompt=({"role": "user", "content": self.prompt(question)},),
            ground_truth=self.answer(question),
            ability=self.ability,
            extra_info={"split": split, "index": index, "seed": self.seed},
            solution=self.solve(question, rng),
        )

    def _split(self, key: str) -> str:
        return question_split(self.name, key, self.held_out_fraction)

    def _draw_until(self, rng: random.Random, accept: Callable[[str], bool]) -> Q:
        for _ in range(_MAX_DRAWS):
            question = self.draw(rng)
            if accept(self.key(question)):
                return question
        raise RuntimeError(f"{self.name}: no question for this split in {_MAX_DRAWS} draws, settings {self}")

    def _check_space(self) -> None:
        """Fails early where a split would be empty or nearly so, by drawing from the setting's question space."""
        rng = random.Random(0)
        seen: dict[str, set[str]] = {split: set() for split in SPLITS}
        for draw in range(_PROBE_DRAWS):
            key = self.key(self.draw(rng))
            seen[self._split(key)].add(key)
            if draw % 50 == 49 and all(len(keys) >= _MIN_DISTINCT for keys in seen.values()):
                return
        for split, keys in seen.items():
            if len(keys) < _MIN_DISTINCT:
                raise ValueError(
                    f"{self.name}: these settings leave the {split} split {len(keys)} distinct questions, "
                    f"it needs at least {_MIN_DISTINCT}; widen the ranges or change held_out_fraction: {self}"
                )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
