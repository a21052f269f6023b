"""Studies of training runs: the arms and seeds of a plan, with strengths that were chosen on other seeds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from entcov.intervals import student_t
from entcov.report.compare import Comparison, final_values, summarize, tables
from entcov.report.run_matrix import Job, run_matrix
from entcov.rl.record.durable import atomic_write
from entcov.rl.record.metrics import read_metrics
from entcov.studies.base import Findings, How, Study, StudyError, Table
from entcov.studies.figures import Rows, differences, overview, pass_at_k
from entcov.studies.plan import MEASURES, PLANS, Plan, merged, read_tree

_DRAWN = ("held_out", "best", "entropy")  # measures


class TrainingStudy(Study):
    """The runs of a plan. Names, title and question are the plan's."""

    def __init__(self, name: str):
        self.name = name
        tree = read_tree(self.path)
        self.title, self.question = tree["title"], tree["question"]

    @property
    def path(self) -> Path:
        return PLANS / f"{self.name}.yaml"

    def run(self, how: How) -> Findings:
        return evaluate(*self.trained(how))

    def trained(self, how: How) -> tuple[Plan, Rows, dict[str, dict[str, Any]], dict[str, list[float]]]:
        """Makes what is missing. Returns the plan, the metrics of the reported runs, and for each arm with candidates
        the keys of the best one and the measure of each.

        Raises:
            StudyError, ValueError: as `Study.run`.
        """
        plan = Plan.read(self.path, how.smoke)
        if how.arms is not None:
            plan = plan.limited(how.arms)
        bench = how.folder.parent / (plan.prompts.folder_name + ("_smoke" if how.smoke else ""))
        plan.prompts.prepare(bench, (*plan.choosing_seeds, *plan.seeds), how)
        chosen, tried = self._choose(plan, bench, how)
        runs = {(arm, seed): self.run_folder(how.folder, arm, seed) for seed in plan.seeds for arm in plan.arms}
        self._train(
            [self._job(plan, bench, arm, chosen.get(arm, {}), seed, folder) for (arm, seed), folder in runs.items()],
            plan, how,
        )  # fmt: skip
        rows = {arm: {seed: read_metrics(runs[arm, seed]) for seed in plan.seeds} for arm in plan.arms}
        return plan, rows, chosen, tried

    def run_folder(self, folder: Path, arm: str, seed: int) -> Path:
        """Of a reported run of the study in `folder`."""
        return folder / "runs" / arm / f"seed_{seed}"

    def _choose(self, plan: Plan, bench: Path, how: How) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
        """(keys of the best candidate, measure of each candidate) by arm. Only the choosing seeds are looked at."""
        places = {
            (arm, number, seed): how.folder / "choosing" / arm / str(number) / f"seed_{seed}"
            for seed in plan.choosing_seeds
            for arm, own in plan.candidates.items()
            for number in range(len(own))
        }
        self._train(
            [
                self._job(plan, bench, arm, plan.candidates[arm][number], seed, folder)
                for (arm, number, seed), folder in places.items()
            ],
            plan, how,
        )  # fmt: skip
        found = {
            place: final_values(read_metrics(folder), MEASURES)[plan.choose_by] for place, folder in places.items()
        }
        tried = {
            arm: [fmean(found[arm, number, seed] for seed in plan.choosing_seeds) for number in range(len(own))]
            for arm, own in plan.candidates.items()
        }
        chosen = {arm: plan.candidates[arm][values.index(max(values))] for arm, values in tried.items()}
        if chosen:
            atomic_write(how.folder / "chosen.json", (json.dumps({"chosen": chosen, "tried": tried}) + "\n").encode())
        return chosen, tried

    def _job(self, plan: Plan, bench: Path, arm: str, candidate: Mapping[str, Any], seed: int, folder: Path) -> Job:
        files = plan.prompts.files(bench, plan.prompt_set, plan.train_prompts.get(arm))
        keys = {
            "model": {"path": str(plan.prompts.model(bench, seed))},
            "data": {
                "train_files": [str(files["train"])],
                "val_files": [str(files["seen"]), str(files["held_out"])],
            },
            "run_dir": str(folder), "seed": seed, "threads": 1,
        }  # fmt: skip
        recipe = folder / "recipe.yaml"
        text = yaml.safe_dump(merged(plan.recipe, plan.arms[arm], candidate, keys), sort_keys=False)
        folder.mkdir(parents=True, exist_ok=True)
        if not recipe.exists() or recipe.read_text() != text:
            atomic_write(recipe, text.encode())
        label = f"{arm} seed {seed}" + (f" {json.dumps(dict(candidate))}" if "choosing" in folder.parts else "")
        return Job(label, (sys.executable, "-m", "entcov", "train", str(recipe)), folder)

    def _train(self, jobs: Sequence[Job], plan: Plan, how: How) -> None:
        failures = run_matrix(jobs, how.jobs, total_steps=plan.recipe["steps"], display=how.display)
        if failures:
            text = "\n\n".join(f"{f.label} failed ({f.reason}), end of {f.log}:\n{f.tail}" for f in failures)
            raise StudyError(text)


def evaluate(
    plan: Plan,
    rows: Rows,
    chosen: Mapping[str, Mapping[str, Any]],
    tried: Mapping[str, Sequence[float]],
) -> Findings:
    """The findings of finished runs: `rows[arm][seed]` are a run's metrics."""
    comparison = summarize(rows, plan.baselines, command="", measures=MEASURES)
    found = [Table(*table) for table in tables(comparison, plan.measures)]
    if chosen:
        header = ["arm", *(f"candidate {n + 1}" for n in range(len(next(iter(tried.values()))))), "chosen"]
        cells = [[arm, *(f"{value:.3f}" for value in values), _shown(chosen[arm])] for arm, values in tried.items()]
        title = f"Strengths, chosen by {plan.choose_by} on the seeds {_listed(plan.choosing_seeds)}"
        found.append(Table(title, header, cells))
    return Findings(
        statements=statements(plan, comparison),
        tables=found,
        figures={
            "differences": differences(comparison, [m for m in plan.measures if m.name in _DRAWN]),
            "pass_at_k": pass_at_k(rows, comparison),
            "overview": overview(rows, comparison),
        },
        values={"comparison": asdict(comparison), "chosen": dict(chosen), "tried": dict(tried)},
    )


def statements(plan: Plan, comparison: Comparison) -> list[str]:
    """What the intervals say, arm by arm, and what the plan can resolve."""
    said, compared = [], 0
    if plan.resolves:
        name, deviation = plan.resolves["measure"], plan.resolves["standard_deviation"]
        half = student_t(len(plan.seeds) - 1) * deviation / math.sqrt(len(plan.seeds)) if len(plan.seeds) > 1 else None
        said.append(
            f"Written down before the runs: a difference of {plan.resolves['effect']} in "
            f"{_title(name)} is to be resolved. Differences between two arms with the same seed had a standard "
            f"deviation of about {deviation}"
            + ("." if half is None else f"; {len(plan.seeds)} seeds then resolve {half:.3f}.")
        )
    for arm, baseline in plan.baselines.items():
        parts = []
        for name in ("held_out", "best", "pass_at_k", "reward", "entropy"):
            difference = comparison.differences[arm][name]
            if not difference.by_seed or difference.excludes_zero is None:
                continue
            verdict = ("higher" if difference.mean > 0 else "lower") if difference.excludes_zero else "not told apart"
            parts.append(f"{_title(name)} {verdict} ({difference.mean:+.3f} ± {difference.half_width:.3f})")
        if parts:
            compared += len(parts)
            said.append(f"{arm} against {baseline}: {'; '.join(parts)}.")
    if compared:
        said.append(
            f"These are {compared} intervals of 95 %, not corrected for their number: about {compared / 20:.0f} of "
            "them would leave out 0 where nothing differs."
        )
    return said


def _title(name: str) -> str:
    return next(measure.title for measure in MEASURES if measure.name == name)


def _shown(keys: Mapping[str, Any], above: str = "") -> str:
    """Nested keys as a.b=value, parted by spaces."""
    parts = []
    for key, value in keys.items():
        name = f"{above}{key}"
        parts.append(_shown(value, f"{name}.") if isinstance(value, Mapping) else f"{name}={value}")
    return " ".join(parts)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
