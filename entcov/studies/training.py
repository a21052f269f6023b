"""Studies of training runs: arms and seeds of a plan, strengths chosen on some seeds and reported on others.

A plan is a YAML file in entcov/studies/plans. It is written before the runs, and says which effect it can resolve:

    title, question: of the page.
    prompts: the hard-prompt benchmark, the arguments of `HardPrompts`, and `set`: residual or sparse.
    recipe: keys of all runs.
    arms: label -> keys of that arm, and under `candidates` a list of keys to choose from.
    baselines: label -> label of the arm that it is compared with, seed by seed.
    choose: {seeds, by}: the runs that choose, and the measure that is to be largest there.
    seeds: those that are reported.
    resolves: {measure, standard_deviation, effect}: of a difference between two arms with the same seed, and what the
        number of seeds can tell from 0.
    smoke: keys of the plan that the smoke version replaces.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from entcov.intervals import student_t
from entcov.report.compare import Comparison, Measure, final_values, summarize, tables
from entcov.report.plots import build_figures
from entcov.report.run_matrix import Job, run_matrix
from entcov.rl.record.durable import atomic_write
from entcov.rl.record.metrics import read_metrics
from entcov.studies.base import Findings, How, Study, StudyError, Table
from entcov.studies.hard_prompts import SETS, HardPrompts

PLANS = Path(__file__).parent / "plans"
_KEYS = (
    "title", "question", "prompts", "recipe", "arms", "baselines", "choose", "seeds", "resolves", "smoke",
)  # fmt: skip
MEASURES = (
    Measure("reward", "train pass@1, last tenth", 3, r"critic/score/mean"),
    Measure("held_out", "held-out pass@1", 3, r"val-core/.+/held_out/acc/mean@\d+", last_only=True),
    Measure("best", "held-out pass@16", 3, r"val-core/.+/held_out/acc/best@\d+/mean", last_only=True),
    # The mean of the curve over log k, which neither the sharpest policy nor the flattest one makes largest.
    Measure(
        "pass_at_k",
        "held-out pass@k, mean over k = 1, 2, 4, ... 16",
        3,
        r"val-core/.+/held_out/acc/pass@\d+",
        last_only=True,
    ),
    Measure("seen_best", "training prompts, pass@16", 3, r"val-core/.+/seen/acc/best@\d+/mean", last_only=True),
    Measure("entropy", "final entropy, nats", 3, r"actor/entropy"),
    Measure("zero_variance", "groups without variance", 2, r"training/zero_variance_groups"),
)


@dataclass(frozen=True)
class Plan:
    """See the module's text. `arms` holds the keys of each arm, `candidates` those to choose from."""

    title: str
    question: str
    prompts: HardPrompts
    prompt_set: str
    recipe: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    candidates: dict[str, list[dict[str, Any]]]
    baselines: dict[str, str]
    choosing_seeds: tuple[int, ...]
    choose_by: str
    seeds: tuple[int, ...]
    resolves: dict[str, Any]

    @classmethod
    def read(cls, path: Path, smoke: bool) -> Plan:
        """Raises ValueError for a plan that breaks a rule; the message names the key."""
        tree = yaml.safe_load(path.read_text())
        if unknown := sorted(set(tree) - set(_KEYS)):
            raise ValueError(f"{path}: keys must be among {', '.join(_KEYS)}, got {', '.join(unknown)}")
        if smoke:
            tree = _merged(tree, tree.get("smoke", {}))
        prompts = dict(tree["prompts"])
        prompt_set = prompts.pop("set", SETS[0])
        arms = {label: dict(keys or {}) for label, keys in tree["arms"].items()}
        candidates = {label: keys.pop("candidates") for label, keys in arms.items() if "candidates" in keys}
        choose = tree.get("choose", {"seeds": [], "by": MEASURES[0].name})
        plan = cls(
            tree["title"], tree["question"], HardPrompts(**prompts), prompt_set, tree["recipe"], arms, candidates,
            dict(tree.get("baselines", {})), tuple(choose["seeds"]), choose["by"], tuple(tree["seeds"]),
            dict(tree.get("resolves", {})),
        )  # fmt: skip
        plan._check(path)
        return plan

    def limited(self, arms: Sequence[str]) -> Plan:
        """The plan of these arms and their baselines alone; their runs are the same ones."""
        if unknown := [arm for arm in arms if arm not in self.arms]:
            raise ValueError(f"--arms: must be among {', '.join(self.arms)}, got {', '.join(unknown)}")
        wanted = set(arms)
        while more := {self.baselines[arm] for arm in wanted if arm in self.baselines} - wanted:
            wanted |= more
        parts = {"arms": self.arms, "candidates": self.candidates, "baselines": self.baselines}
        return replace(self, **{name: {a: v for a, v in own.items() if a in wanted} for name, own in parts.items()})

    def _check(self, path: Path) -> None:
        if self.prompt_set not in SETS:
            raise ValueError(f"{path}: prompts.set: must be one of {', '.join(SETS)}, got {self.prompt_set!r}")
        if both := sorted({*self.choosing_seeds, self.prompts.ranked_by} & set(self.seeds)):
            raise ValueError(
                f"{path}: seeds: must not be those of choose.seeds or prompts.ranked_by, got {both} among them"
            )
        if bool(self.candidates) != bool(self.choosing_seeds):
            raise ValueError(
                f"{path}: choose.seeds: must be given where arms have candidates and only there, got "
                f"{list(self.choosing_seeds)} and candidates of {sorted(self.candidates) or 'no arm'}"
            )
        if len({len(own) for own in self.candidates.values()}) > 1:
            counts = {label: len(own) for label, own in self.candidates.items()}
            raise ValueError(f"{path}: candidates: must be equally many for every arm that has them, got {counts}")
        for label, baseline in self.baselines.items():
            if label not in self.arms or baseline not in self.arms:
                raise ValueError(f"{path}: baselines: must name arms {sorted(self.arms)}, got {label}: {baseline}")
        if self.choose_by not in (names := [measure.name for measure in MEASURES]):
            raise ValueError(f"{path}: choose.by: must be one of {', '.join(names)}, got {self.choose_by!r}")


class TrainingStudy(Study):
    """The runs of a plan. Names, title and question are the plan's."""

    def __init__(self, name: str):
        self.name = name
        tree = yaml.safe_load(self.path.read_text())
        self.title, self.question = tree["title"], tree["question"]

    @property
    def path(self) -> Path:
        return PLANS / f"{self.name}.yaml"

    def run(self, how: How) -> Findings:
        plan = Plan.read(self.path, how.smoke)
        if how.arms is not None:
            plan = plan.limited(how.arms)
        bench = how.folder.parent / ("hard_prompts_smoke" if how.smoke else "hard_prompts")
        plan.prompts.prepare(bench, (*plan.choosing_seeds, *plan.seeds), how)
        chosen, tried = self._choose(plan, bench, how)
        runs = {(arm, seed): how.folder / "runs" / arm / f"seed_{seed}" for seed in plan.seeds for arm in plan.arms}
        self._train(
            [self._job(plan, bench, arm, chosen.get(arm, {}), seed, folder) for (arm, seed), folder in runs.items()],
            plan, how,
        )  # fmt: skip
        rows = {arm: {seed: read_metrics(runs[arm, seed]) for seed in plan.seeds} for arm in plan.arms}
        return evaluate(plan, rows, chosen, tried)

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
        files = plan.prompts.files(bench, plan.prompt_set)
        keys = {
            "model": {"path": str(plan.prompts.model(bench, seed))},
            "data": {
                "train_files": [str(files["train"])],
                "val_files": [str(files["seen"]), str(files["held_out"])],
            },
            "run_dir": str(folder), "seed": seed, "threads": 1,
        }  # fmt: skip
        recipe = folder / "recipe.yaml"
        text = yaml.safe_dump(_merged(plan.recipe, plan.arms[arm], candidate, keys), sort_keys=False)
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
    rows: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]],
    chosen: Mapping[str, Mapping[str, Any]],
    tried: Mapping[str, Sequence[float]],
) -> Findings:
    """The findings of finished runs: `rows[arm][seed]` are a run's metrics."""
    comparison = summarize(rows, plan.baselines, command="", measures=MEASURES)
    found = [Table(*table) for table in tables(comparison, MEASURES)]
    if chosen:
        header = ["arm", *(f"candidate {n + 1}" for n in range(len(next(iter(tried.values()))))), "chosen"]
        cells = [[arm, *(f"{value:.3f}" for value in values), _shown(chosen[arm])] for arm, values in tried.items()]
        title = f"Strengths, chosen by {plan.choose_by} on the seeds {_listed(plan.choosing_seeds)}"
        found.append(Table(title, header, cells))
    by_arm = {arm: list(own.values()) for arm, own in rows.items()}
    return Findings(
        statements=statements(plan, comparison),
        tables=found,
        figures={"overview": build_figures(by_arm)["overview"]},
        values={"comparison": asdict(comparison), "chosen": dict(chosen), "tried": dict(tried)},
    )


def statements(plan: Plan, comparison: Comparison) -> list[str]:
    """What the intervals say, arm by arm, and what the plan can resolve."""
    said = []
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
            said.append(f"{arm} against {baseline}: {'; '.join(parts)}.")
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


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, later ones over earlier ones; lists and values are replaced."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = out.get(key)
            out[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out
