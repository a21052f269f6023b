"""The hard-prompt benchmark: prompts that a starting policy rarely solves, and starting policies of several seeds.

Where plain GRPO solves nearly all prompts there is nothing for exploration to find. So the prompts are selected: one
policy, that of the seed `ranked_by`, samples each prompt of a pool, and the residual are those that it solves at most
`most` times; the sparse ones it never solved. The prompts are the same for every run; the starting policies, of which
each seed has its own, are trained on other prompts of the same task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from entcov import arguments as check
from entcov.rl.data.rank import rank_by_solve_rate
from entcov.rl.data.stream import load_rows, raw_rows, write_rows
from entcov.rl.load_config import load_config
from entcov.rl.solve_counts import SolveCounts
from entcov.rl.types import Example
from entcov.studies.base import How
from entcov.studies.benchmark import Benchmark

START = Path(__file__).parent / "plans" / "start.yaml"  # the recipe of the starting policies
SETS = ("residual", "sparse")


@dataclass(frozen=True)
class HardPrompts(Benchmark):
    """How prompts are selected.

    Args:
        pool: different prompts that are ranked.
        samples, most: a prompt that is solved at most `most` times of `samples` belongs to the residual.
        train, held_out: prompts of each set for training, and others for evaluation; fewer where a set has fewer.
        seen: training prompts that are evaluated too, as the data source entcov/TASK/train.
        ranked_by: seed of the policy that ranks. It is none of the seeds that are reported.
        warm_start: supervised steps of the starting policies.
    """

    folder_name: ClassVar[str] = "hard_prompts"
    sets: ClassVar[tuple[str, ...]] = SETS
    pool: int
    samples: int = 32
    most: int = 3
    train: int = 4096
    held_out: int = 256
    seen: int = 256
    ranked_by: int = 1000
    warm_start: int = 1500

    def __post_init__(self) -> None:
        for name in ("pool", "samples", "train", "held_out", "seen", "warm_start"):
            check.integer(name, getattr(self, name), 1)
        check.integer("most", self.most, 0)
        check.integer("ranked_by", self.ranked_by, 0)

    @property
    def own_seeds(self) -> tuple[int, ...]:
        return (self.ranked_by,)

    def prepare(self, folder: Path, seeds: Sequence[int], how: How) -> None:
        self._claim(folder, START)
        self._train_starts(folder, START, (self.ranked_by, *seeds), how)
        if all(self.files(folder, name)["train"].exists() for name in SETS):
            return
        config = load_config(START, self._keys(folder, self.ranked_by))
        checkpoint = str(self._start(folder, self.ranked_by) / "checkpoints" / "step_0")
        subset, _ = rank_by_solve_rate(
            config, folder / "ranked", samples=self.samples, most=self.most, prompts=self.pool, checkpoint=checkpoint
        )
        self._write_sets(folder, subset)

    def files(self, folder: Path, name: str, count: int | None = None) -> dict[str, Path]:
        files = {kind: folder / f"{name}_{kind}.parquet" for kind in ("held_out", "seen", "train")}
        if count is not None:
            examples = load_rows(files["train"])[:count]
            for kind, own in (("seen", [_named(one, "seen") for one in examples[: self.seen]]), ("train", examples)):
                files[kind] = folder / f"{name}_{kind}_{count}.parquet"
                if not files[kind].exists():
                    write_rows(own, files[kind])
        return files

    def solve_counts(self, folder: Path) -> SolveCounts:
        """Of all prompts of the pool, by the policy that ranked them."""
        return SolveCounts.from_state(json.loads((folder / "ranked" / "solve_counts.json").read_bytes()))

    def _keys(self, folder: Path, seed: int) -> list[str]:
        return [
            f"warm_start.steps={self.warm_start}", f"seed={seed}", f"run_dir={self._start(folder, seed)}", "threads=1",
        ]  # fmt: skip

    def _write_sets(self, folder: Path, subset: Path) -> None:
        """The first prompts that were ranked are held out, so that sets for fewer training prompts are the first of
        those for more."""
        examples = load_rows(subset)
        solved = [row["solved"] for _, row in raw_rows(subset)]
        for name, chosen in zip(SETS, (range(len(solved)), [i for i, c in enumerate(solved) if c == 0]), strict=True):
            own = [examples[i] for i in chosen]
            if len(own) <= self.held_out:
                raise ValueError(
                    f"pool: {self.pool} prompts have {len(own)} of the {name} set, which must be more than held_out, "
                    f"{self.held_out}"
                )
            train = own[self.held_out : self.held_out + self.train]
            parts = {"held_out": own[: self.held_out], "seen": train[: self.seen], "train": train}
            for kind, path in self.files(folder, name).items():
                rows = parts[kind] if kind == "train" else [_named(example, kind) for example in parts[kind]]
                write_rows(rows, path)


def _named(example: Example, part: str) -> Example:
    """The example with a data source of its own, so that evaluations tell it apart: entcov/TASK/PART."""
    return replace(example, data_source=f"{example.data_source}/{part}")
