"""What a benchmark is: prompts that all runs of a study share, and a starting policy for each seed."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from entcov.report.run_matrix import Job, run_matrix
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.studies.base import How, StudyError


class Benchmark(ABC):
    """Made once in a folder, which every study of the same benchmark shares. Subclasses are frozen dataclasses whose
    fields are keys of a plan's `prompts`; entcov/studies/plan.py names them."""

    folder_name: ClassVar[str]
    sets: ClassVar[tuple[str, ...]]  # that a plan's `prompts.set` chooses from, the default first
    train: int  # training prompts of a set, at most

    @property
    def own_seeds(self) -> tuple[int, ...]:
        """Of policies that the prompts depend on, so that no reported run may have them."""
        return ()

    @abstractmethod
    def prepare(self, folder: Path, seeds: Sequence[int], how: How) -> None:
        """Makes the starting policy of each seed, and the prompts, where they are not yet in `folder`.

        Raises:
            StudyError: a starting policy could not be trained.
            ValueError: the folder holds a benchmark of other settings, or the settings cannot be met.
        """

    @abstractmethod
    def files(self, folder: Path, name: str, count: int | None = None) -> dict[str, Path]:
        """train, seen and held_out of the set `name`, in verl's row format; of the training prompts, `count` alone."""

    def model(self, folder: Path, seed: int) -> Path:
        """The starting policy of a seed, in transformers' format."""
        return self._start(folder, seed) / "checkpoints" / "step_0" / "model"

    def _start(self, folder: Path, seed: int) -> Path:
        return folder / "starts" / f"seed_{seed}"

    def _claim(self, folder: Path, recipe: Path) -> None:
        """Keeps the settings, those of the starting policies' `recipe` among them, in `folder`."""
        make_folder(folder)
        settings = json.dumps(vars(self) | {"recipe": recipe.read_text()})
        stored = folder / "settings.json"
        if stored.exists() and stored.read_text() != settings:
            raise ValueError(f"{folder}: holds a benchmark of other settings; remove it, or give another --out")
        atomic_write(stored, settings.encode())

    def _train_starts(self, folder: Path, recipe: Path, seeds: Sequence[int], how: How) -> None:
        program = (sys.executable, "-m", "entcov", "train", str(recipe))
        starts = [
            Job(f"start {seed}", (*program, *self._keys(folder, seed), "steps=0"), self._start(folder, seed))
            for seed in dict.fromkeys(seeds)
        ]
        failures = run_matrix(starts, how.jobs, display=how.display)
        if failures:
            raise StudyError(f"{failures[0].label} failed ({failures[0].reason}):\n{failures[0].tail}")

    @abstractmethod
    def _keys(self, folder: Path, seed: int) -> list[str]:
        """Overrides of the recipe that train the starting policy of a seed, but for `steps=0`."""
