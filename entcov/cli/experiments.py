"""`compare` and `study`: many runs, and what their differences say."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entcov import arguments as check
from entcov.cli.command_line import add_recipe, check_count, check_folder, console

# Keys that compare sets itself, and the option that decides each.
_SET_BY_COMPARE = {
    "control": "--controls", "seed": "--seeds", "threads": "--jobs", "run_dir": "--out",
    "warm_start.cache_dir": "--out",
}  # fmt: skip


def add_compare_and_study(commands: Any) -> None:
    compare = commands.add_parser("compare", help="matched runs of several entropy controls, a table and plots")
    add_recipe(compare)
    compare.add_argument(
        "--controls",
        default="none,clip_cov,kl_cov,aent",
        help="comma-separated; default %(default)s; each is compared with its baseline of strength 0. "
        "kl_cov:ppo_kl_coef=2 is kl_cov with one knob changed",
    )
    compare.add_argument("--seeds", default="0,1,2", help="comma-separated; default %(default)s")
    compare.add_argument("--out", default="runs/compare", help="directory; default %(default)s")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time, one CPU thread each")
    compare.set_defaults(command=_compare)

    study = commands.add_parser("study", help="an experiment of the documents once more: its runs, tables and plots")
    study.add_argument("name", nargs="?", metavar="NAME", help="without one, the studies are listed")
    study.add_argument("--smoke", action="store_true", help="the small version: minutes, and it proves nothing")
    study.add_argument("--out", default="runs/studies", help="what is done is kept in OUT/NAME; default %(default)s")
    study.add_argument("--page", help="folder of the page and its plots; default: OUT/NAME/page")
    study.add_argument("--jobs", type=int, default=1, help="processes at a time, one CPU thread each")
    study.add_argument("--arms", help="comma-separated; of a study of training runs, these and their baselines alone")
    study.set_defaults(command=_study)


def _compare(args: Namespace) -> int:
    from entcov.report.compare import compare
    from entcov.rl.load_config import load_config
    from entcov.rl.preflight import check_recipe

    out = check_folder("--out", Path(args.out))
    check_count("--jobs", args.jobs)
    for item in args.overrides:
        key = item.partition("=")[0]
        if key in _SET_BY_COMPARE:
            raise ValueError(f"{check.shown(item)}: compare sets {key} itself, see {_SET_BY_COMPARE[key]}")
    seeds, arms = _seeds(args.seeds), _arms(args.controls)
    configs = {label: load_config(args.recipe, [*args.overrides, *arms[label]]) for label in arms}
    first = next(iter(configs.values()))
    if first.actor.backend != "transformers":
        raise ValueError(f"actor.backend: must be transformers for compare, got {first.actor.backend}")
    check_recipe(first)  # the model and the data are the same for all

    baselines = {}
    for label, config in configs.items():
        (control,) = config.build_controls()
        if control.baseline_knobs is not None:
            baselines[label] = f"{control.name}@0"
            zero = [f"controls.{control.name}.{knob}={value}" for knob, value in control.baseline_knobs.items()]
            arms[baselines[label]] = [f"control=[{control.name}]", *zero]
        elif label != "none" and "none" in arms:
            baselines[label] = "none"

    def arguments(arm: str, seed: int, run_dir: Path) -> list[str]:
        """The command line of one run; runs of the same seed share their warm start."""
        return [
            "train", args.recipe, *args.overrides, *arms[arm], f"seed={seed}", f"run_dir={run_dir}",
            "threads=1", f"warm_start.cache_dir={out / 'warm_start'}",
        ]  # fmt: skip

    return compare(
        arguments, controls=list(arms), seeds=seeds, out_dir=out, jobs=args.jobs,
        baselines=baselines, total_steps=first.steps, command="python -m entcov " + shlex.join(sys.argv[1:]),
    )  # fmt: skip


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: must be integers parted by commas, got {check.shown(text)}") from None
    if min(seeds) < 0:
        raise ValueError(f"--seeds: must be at least 0, got {min(seeds)}")
    _check_distinct("--seeds", seeds)
    return seeds


def _arms(text: str) -> dict[str, list[str]]:
    """Label -> overrides, of "none,kl_cov:ppo_kl_coef=2"."""
    labels = text.split(",")
    _check_distinct("--controls", labels)
    arms = {}
    for label in labels:
        name, *knobs = label.split(":")
        if not re.fullmatch(r"\w+", name) or not all(re.fullmatch(r"\w+=[^/]+", knob) for knob in knobs):
            raise ValueError(
                f"--controls: must be names parted by commas, each with :knob=value as needed, got {check.shown(text)}"
            )
        arms[label] = [f"control=[{name}]", *(f"controls.{name}.{knob}" for knob in knobs)]
    return arms


def _check_distinct(option: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{option}: must not repeat an entry, got {check.shown(values)}")


def _study(args: Namespace) -> int:
    from entcov.studies.base import How
    from entcov.studies.catalogue import STUDIES
    from entcov.studies.page import listing, run_study

    if args.name is None:
        print(listing(list(STUDIES.values())))
        return 0
    if args.name not in STUDIES:
        raise ValueError(f"NAME: must be one of {', '.join(STUDIES)}, got {check.shown(args.name)}")
    check_count("--jobs", args.jobs)
    # Recipes of runs name the folder: a relative and an absolute --out must mean the same runs.
    folder = Path(args.out).resolve() / (f"{args.name}_smoke" if args.smoke else args.name)
    check_folder("--out", folder)
    page = check_folder("--page", Path(args.page) if args.page else folder / "page")
    how = How(folder, smoke=args.smoke, jobs=args.jobs, arms=args.arms.split(",") if args.arms else None)
    command = "python -m entcov " + shlex.join(sys.argv[1:])
    shown = console()
    for path in run_study(STUDIES[args.name], how, page, command=command, console=shown):
        shown.print(path, markup=False, highlight=False, soft_wrap=True)
    return 0
