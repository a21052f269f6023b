"""Short sums, then long ones: a file of prompts that a run reads in order, and starting policies that know all styles.

The starting policies learn from worked solutions of both lengths, in the styles of carry_arithmetic in equal parts. A
run of `data.order: file` trains on every prompt once: first on the short ones, then on the long ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from entcov import arguments as check
from entcov.rl.data.stream import load_rows, write_rows
from entcov.rl.tasks.base import make_task
from entcov.rl.types import Example
from entcov.studies.base import How
from entcov.studies.benchmark import Benchmark

START = Path(__file__).parent / "plans" / "start_curriculum.yaml"  # the recipe of the starting policies
TASK = "carry_arithmetic"
SHORT, LONG = "short", "long/held_out"  # data sources of the evaluations: entcov/TASK/...
_WORKED, _TRAIN = 1, 2  # seeds of the sequences of sums


@dataclass(frozen=True)
class Curriculum(Benchmark):
    """How the sums are drawn.

    Args:
        short, long: settings of carry_arithmetic, such as {min_digits: 3, max_digits: 3}.
        short_prompts, long_prompts: sums of each phase.
        held_out: sums of each length for evaluation.
        worked: sums with worked solutions, by turns short and long, that the starting policies learn from.
        warm_start: supervised steps of the starting policies.
    """

    folder_name: ClassVar[str] = "curriculum"
    sets: ClassVar[tuple[str, ...]] = ("curriculum",)
    short: Mapping[str, Any]
    long: Mapping[str, Any]
    short_prompts: int
    long_prompts: int
    held_out: int = 256
    worked: int = 32768
    warm_start: int = 1500

    def __post_init__(self) -> None:
        for name in ("short_prompts", "long_prompts", "held_out", "worked", "warm_start"):
            check.integer(name, getattr(self, name), 1)

    @property
    def train(self) -> int:
        return self.short_prompts + self.long_prompts

    def prepare(self, folder: Path, seeds: Sequence[int], how: How) -> None:
        self._claim(folder, START)
        files = self.files(folder, self.sets[0])
        if not all(path.exists() for path in (self._worked(folder), *files.values())):
            worked = zip(
                self._sums("short", _WORKED, self.worked), self._sums("long", _WORKED, self.worked), strict=True
            )
            write_rows([one for pair in worked for one in pair][: self.worked], self._worked(folder))
            short = self._sums("short", _TRAIN, self.short_prompts)
            write_rows(short + self._sums("long", _TRAIN, self.long_prompts), files["train"])
            for kind, length, source in (("seen", "short", SHORT), ("held_out", "long", LONG)):
                own = self._sums(length, _TRAIN, self.held_out, "held_out")
                write_rows([replace(one, data_source=f"entcov/{TASK}/{source}") for one in own], files[kind])
        self._train_starts(folder, START, seeds, how)

    def files(self, folder: Path, name: str, count: int | None = None) -> dict[str, Path]:
        """train is both phases, or their last `count` prompts; seen is held-out short sums, held_out long ones."""
        files = {kind: folder / f"{name}_{kind}.parquet" for kind in ("held_out", "seen", "train")}
        if count is not None:
            whole, files["train"] = files["train"], folder / f"{name}_train_{count}.parquet"
            if not files["train"].exists():
                write_rows(load_rows(whole)[-count:], files["train"])
        return files

    def _worked(self, folder: Path) -> Path:
        return folder / "worked.parquet"

    def _sums(self, length: str, seed: int, count: int, split: str = "train") -> list[Example]:
        task = make_task(TASK, seed=seed, **getattr(self, length))
        return [task.example(split, index) for index in range(count)]

    def _keys(self, folder: Path, seed: int) -> list[str]:
        return [
            f"data.train_files=[{self._worked(folder)}]", f"warm_start.steps={self.warm_start}", f"seed={seed}",
            f"run_dir={self._start(folder, seed)}", "threads=1",
        ]  # fmt: skip
