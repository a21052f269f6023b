"""How often each prompt is solved: pass@k without bias, and the record of every evaluation in RUN/solve_counts.

RUN/solve_counts/step_N.json: {source: {"samples": n, "histogram": [prompts solved 0 times, ..., n times], "solved":
[times that the first prompt was solved, ...], "distinct": answers to a prompt, "reliability": bins of the
calibration}}. The histogram is of all prompts, `solved` of the first 1,024 of each source, the same ones at every step:
at most 6 KB a source and evaluation where n is below 1,000.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entcov import arguments as check
from entcov.diagnostics import Calibration
from entcov.rl.answers import Answers
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.rl.types import RIGHT, Rollout

SOLVE_COUNTS = "solve_counts"
MOST_PROMPTS = 1024  # of a source, whose counts are kept one by one


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the probability that k of n samples, c of them right, hold a right one.

    Unbiased for the probability that k fresh samples do. Computed as 1 - prod (1 - k / i), i = n - c + 1 ... n, which
    neither overflows nor cancels as the binomials do. Source: Chen et al. 2021, arXiv 2107.03374, eq. 1.

    Raises:
        ValueError: not 0 <= solved <= samples, or not 1 <= k <= samples.
    """
    check.integer("samples", samples, 1)
    check.number("solved", solved, 0, samples)
    check.number("k", k, 1, samples)
    if samples - solved < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - solved + 1, samples + 1))


@dataclass(frozen=True)
class SolveCounts:
    """Of one data source: histogram[c] prompts were solved by c of `samples` responses; `solved` prompt by prompt.

    answers: what the responses answer; None: not known, as of one response to each prompt.
    """

    samples: int
    histogram: tuple[int, ...]
    solved: tuple[int, ...]
    answers: Answers | None = None

    @classmethod
    def of(cls, samples: int, solved: Sequence[int], answers: Answers | None = None) -> SolveCounts:
        """From the counts of all prompts."""
        histogram = [0] * (samples + 1)
        for count in solved:
            histogram[count] += 1
        return cls(samples, tuple(histogram), tuple(solved[:MOST_PROMPTS]), answers)

    @classmethod
    def by_source(cls, rollouts: Sequence[Rollout]) -> dict[str, SolveCounts]:
        """Of scored rollouts; a response is right if its reward is at least 1."""
        right: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
        members: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            source = rollout.prompt.example.data_source
            right[source][rollout.prompt.uid].append(rollout.reward >= RIGHT)
            members[source].append(rollout)
        found = {}
        for source, groups in sorted(right.items()):
            samples = len(next(iter(groups.values())))
            answers = Answers.of(members[source]) if samples > 1 else None
            found[source] = cls.of(samples, [sum(groups[uid]) for uid in sorted(groups)], answers)
        return found

    def pass_at(self, k: int) -> float:
        """pass@k, mean over all prompts."""
        each = (count * pass_at_k(self.samples, c, k) for c, count in enumerate(self.histogram))
        return math.fsum(each) / sum(self.histogram)

    def curve(self) -> dict[int, float]:
        """k -> pass@k for k = 1, 2, 4, ... and the number of samples."""
        ks = {1 << power for power in range(self.samples.bit_length())} | {self.samples}
        return {k: self.pass_at(k) for k in sorted(ks)}

    def state_dict(self) -> dict[str, Any]:
        own = {"samples": self.samples, "histogram": list(self.histogram), "solved": list(self.solved)}
        if self.answers is not None:
            own["distinct"], sure = self.answers.distinct, self.answers.calibration
            own["reliability"] = None if sure is None else [list(row) for row in sure.bins]
        return own

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SolveCounts:
        answers = None
        if "distinct" in state:  # earlier versions had none
            bins = state["reliability"]
            answers = Answers(state["distinct"], None if bins is None else Calibration(tuple(map(tuple, bins))))
        return cls(state["samples"], tuple(state["histogram"]), tuple(state["solved"]), answers)


def write_solve_counts(run_dir: Path, step: int, rollouts: Sequence[Rollout]) -> None:
    """Keeps the counts of an evaluation in the run's folder; an earlier file of the step is replaced."""
    folder = run_dir / SOLVE_COUNTS
    make_folder(folder)
    found = {source: counts.state_dict() for source, counts in SolveCounts.by_source(rollouts).items()}
    atomic_write(folder / f"step_{step}.json", (json.dumps(found) + "\n").encode())


def read_solve_counts(run_dir: str | Path) -> dict[int, dict[str, SolveCounts]]:
    """step -> source -> counts, by rising step; empty for a run without any.

    Raises:
        ValueError: a file that does not hold such counts; the message names it.
    """
    found = {}
    for path in (Path(run_dir) / SOLVE_COUNTS).glob("step_*.json"):
        if (match := re.fullmatch(r"step_(\d+)\.json", path.name)) is None:
            continue
        try:
            state = json.loads(path.read_bytes())
            found[int(match[1])] = {source: SolveCounts.from_state(own) for source, own in state.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: holds no solve counts ({error!r})") from None
    return dict(sorted(found.items()))
