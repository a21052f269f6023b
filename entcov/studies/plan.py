"""The plan of a study of training runs: a YAML file in entcov/studies/plans, written before the runs.

base: name of another file there, whose keys these ones complete or replace.
title, question: of the page.
prompts: `kind`: hard or curriculum; the arguments of `HardPrompts` or `Curriculum`; and `set`, for hard: residual or
    sparse.
recipe: keys of all runs.
arms: label -> keys of that arm. Under `candidates` it may have a list of keys to choose from, and under
    `train_prompts` to how many training prompts it is limited: the first ones, of a curriculum the last.
baselines: label -> label of the arm that it is compared with, seed by seed.
choose: {seeds, by}: the runs that choose, and the measure that is to be largest there.
seeds: those that are reported.
resolves: {measure, standard_deviation, effect}: of a difference between two arms with the same seed, and the effect
    that the study is to tell from 0.
show: the measures of the tables, default all of MEASURES but those of one study alone.
smoke: keys of the plan that the smoke version replaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from entcov.report.compare import Measure
from entcov.studies.benchmark import Benchmark
from entcov.studies.curriculum import Curriculum
from entcov.studies.hard_prompts import HardPrompts

PLANS = Path(__file__).parent / "plans"
_KEYS = (
    "base", "title", "question", "prompts", "recipe", "arms", "baselines", "choose", "seeds", "resolves", "show",
    "smoke",
)  # fmt: skip
_KINDS: dict[str, type[Benchmark]] = {"hard": HardPrompts, "curriculum": Curriculum}
_HELD_OUT = r"val-core/.+/held_out/acc"
MEASURES = (
    Measure("reward", "train pass@1, last tenth", 3, r"critic/score/mean"),
    Measure("held_out", "held-out pass@1", 3, rf"{_HELD_OUT}/mean@\d+", last_only=True),
    Measure("best", "held-out pass@16", 3, rf"{_HELD_OUT}/best@\d+/mean", last_only=True),
    # The mean of the curve over log k, which neither the sharpest policy nor the flattest one makes largest.
    Measure("pass_at_k", "held-out pass@k, mean over k = 1, 2, 4, ... 16", 3, rf"{_HELD_OUT}/pass@\d+", last_only=True),
    Measure("seen_best", "training prompts, pass@16", 3, r"val-core/.+/seen/acc/best@\d+/mean", last_only=True),
    Measure("entropy", "final entropy, nats", 3, r"actor/entropy"),
    Measure("zero_variance", "groups without variance", 2, r"training/zero_variance_groups"),
    Measure("clipped", "tokens that the clip stops", 4, r"actor/pg_clipfrac"),
)
_SHOWN = tuple(measure.name for measure in MEASURES if measure.name != "clipped")


@dataclass(frozen=True)
class Plan:
    """See the module's text. `arms` holds the keys of each arm, `candidates` those to choose from."""

    title: str
    question: str
    prompts: Benchmark
    prompt_set: str
    recipe: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    candidates: dict[str, list[dict[str, Any]]]
    baselines: dict[str, str]
    choosing_seeds: tuple[int, ...]
    choose_by: str
    seeds: tuple[int, ...]
    resolves: dict[str, Any]
    measures: tuple[Measure, ...]
    train_prompts: dict[str, int] = field(default_factory=dict)  # of arms that are limited

    @classmethod
    def read(cls, path: Path, smoke: bool) -> Plan:
        """Raises ValueError for a plan that breaks a rule; the message names the key."""
        tree = read_tree(path)
        if unknown := sorted(set(tree) - set(_KEYS)):
            raise ValueError(f"{path}: keys must be among {', '.join(_KEYS)}, got {', '.join(unknown)}")
        if smoke:
            tree = merged(tree, tree.get("smoke", {}))
        prompts = dict(tree["prompts"])
        kind = prompts.pop("kind", "hard")
        if kind not in _KINDS:
            raise ValueError(f"{path}: prompts.kind: must be one of {', '.join(_KINDS)}, got {kind!r}")
        prompt_set = prompts.pop("set", _KINDS[kind].sets[0])
        arms = {label: dict(keys or {}) for label, keys in tree["arms"].items()}
        candidates = {label: keys.pop("candidates") for label, keys in arms.items() if "candidates" in keys}
        train_prompts = {label: keys.pop("train_prompts") for label, keys in arms.items() if "train_prompts" in keys}
        choose = tree.get("choose", {"seeds": [], "by": MEASURES[0].name})
        known, show = {measure.name: measure for measure in MEASURES}, tree.get("show", _SHOWN)
        for key, names in (("show", show), ("choose.by", [choose["by"]])):
            if wrong := [name for name in names if name not in known]:
                raise ValueError(f"{path}: {key}: must be among {', '.join(known)}, got {', '.join(wrong)}")
        plan = cls(
            tree["title"], tree["question"], _KINDS[kind](**prompts), prompt_set, tree["recipe"], arms, candidates,
            dict(tree.get("baselines", {})), tuple(choose["seeds"]), choose["by"], tuple(tree["seeds"]),
            dict(tree.get("resolves", {})), tuple(known[name] for name in show), train_prompts,
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
        if self.prompt_set not in self.prompts.sets:
            raise ValueError(
                f"{path}: prompts.set: must be one of {', '.join(self.prompts.sets)}, got {self.prompt_set!r}"
            )
        if both := sorted({*self.choosing_seeds, *self.prompts.own_seeds} & set(self.seeds)):
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
        if numbers := [name for name in (*self.arms, *self.baselines.values()) if not isinstance(name, str)]:
            raise ValueError(f"{path}: arms: must have text as labels, got {numbers} (YAML reads 1_0.2 as a number)")
        for label, baseline in self.baselines.items():
            if label not in self.arms or baseline not in self.arms:
                raise ValueError(f"{path}: baselines: must name arms {sorted(self.arms)}, got {label}: {baseline}")
        for label, count in self.train_prompts.items():
            if not 1 <= count <= self.prompts.train:
                raise ValueError(
                    f"{path}: arms.{label}.train_prompts: must be in [1, {self.prompts.train}] (prompts.train), "
                    f"got {count}"
                )


def read_tree(path: Path) -> dict[str, Any]:
    """The keys of a plan, over those of its base."""
    tree = yaml.safe_load(path.read_text())
    return merged(read_tree(PLANS / f"{tree['base']}.yaml"), tree) if "base" in tree else tree


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, later ones over earlier ones; lists and values are replaced."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = out.get(key)
            out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out
