"""`python -m entcov train | eval | compare | study | plot | fit-law | report | data | data rank | plan | check`.

Parses arguments, prints results, and turns a failure into a message and an exit code. Imports are made by the command
that needs them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from entcov import arguments as check

if TYPE_CHECKING:
    from entcov.rl.config import Config
    from entcov.rl.interfaces import Backend

_DESCRIPTION = (
    "Reinforcement learning of language models with control of the policy's entropy: train from a recipe, evaluate, "
    "compare controls in matched runs, plot, prepare and rank data, plan a large run, check the ops on this machine."
)
_EPILOG = (
    "A recipe is a YAML file, such as examples/tiny_cpu.yaml, and key=value changes it. "
    "%(prog)s COMMAND --help has more."
)
_OVERRIDES = "keys of the recipe to change, such as actor.lr=1e-4 or preset=clip_cov (docs/methods.md)"
# Keys that compare sets itself, and the option that decides each.
_SET_BY_COMPARE = {
    "control": "--controls", "seed": "--seeds", "threads": "--jobs", "run_dir": "--out",
    "warm_start.cache_dir": "--out",
}  # fmt: skip
# Options of `data rank` that go with each --by.
_RANKINGS = {
    "semantic_entropy": ("samples", "stages", "length_normalized"),
    "solve_rate": ("samples", "least", "most", "prompts"),
    "kmeans": ("count",),
}
_BAD_INPUT = (ValueError, TypeError, OSError, UnpicklingError)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["data", "rank"]:  # argparse takes a command of one word
        words[:2] = ["data rank"]
    return run_command(_parser(), words, lambda error, text: print(text, file=sys.stderr))


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, tell: Callable[[Exception, str], None]
) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 SIGTERM.

    Args:
        tell: prints a failure; called with the exception and the message about it.
    """
    args = parse(parser, argv)
    try:
        return args.command(args)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # of several processes one is enough
            print("stopped; the same command goes on from the latest checkpoint", file=sys.stderr, flush=True)
        return 128 + (stop.args or (signal.SIGINT,))[0]
    except (*_BAD_INPUT, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        text, code = explain(error)
        tell(error, text)
        return code


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. Overrides may stand before, between and after the options, which argparse refuses."""
    args, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {check.one_line(' '.join(rest))}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def explain(error: Exception) -> tuple[str, int]:
    """The message about a failure, and the process's exit code."""
    from entcov.rl.record.checkpoint import CheckpointError

    if isinstance(error, ModuleNotFoundError) and error.name in _extra("train"):
        return f"error: {error}. The trainer needs its extra: pip install 'entcov[train]'", 2
    if isinstance(error, UnpicklingError):
        return f"error: a file holds more than tensors and plain values and is not loaded: {check.one_line(error)}", 2
    if isinstance(error, (*_BAD_INPUT, ImportError)):
        return f"error: {error}", 2
    if isinstance(error, CheckpointError):
        return f"error: {error}", 1
    return f"error: {error}\n(--debug shows where)", 1


def _extra(name: str) -> set[str]:
    """Names of the modules that the extra `name` installs."""
    wanted = {r.partition(";")[0].strip() for r in metadata.requires("entcov") or () if f'extra == "{name}"' in r}
    return {re.split(r"[^\w-]", one)[0].replace("-", "_") for one in wanted} | {"yaml"}


def add_train_and_eval(
    commands: Any, make_backend: Callable[[Config], Backend], *, always: Sequence[str] = ()
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Adds the two commands; returns their parsers.

    Args:
        commands: the result of `ArgumentParser.add_subparsers`.
        make_backend: builds the backend that trains or evaluates.
        always: overrides that come before those of the command line.
    """
    train = commands.add_parser("train", help="run a recipe, or go on with it where it stopped")
    train.add_argument("recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    train.add_argument(
        "--resume", default="auto", help="auto (default), never, or the path of a checkpoint to go back to"
    )
    train.add_argument("--no-display", action="store_true", help="print nothing while running")
    train.set_defaults(command=train_command, make_backend=make_backend, always=always)
    evaluate = commands.add_parser(
        "eval",
        help="held-out accuracy of a run's policy, a table by data source",
        description="Prints held-out accuracy by data source, and keeps metrics and responses under RUN/eval. Where "
        "they cannot be kept (a read-only folder), the output says why, and the exit code is 0 all the same.",
    )
    evaluate.add_argument("run", help="a run directory")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="such as eval.samples=32, data.val_files=[data/aime24/test.parquet] or eval.sources.aime24.samples=32",
    )  # fmt: skip
    evaluate.add_argument("--checkpoint", help="default: the latest")
    evaluate.set_defaults(command=eval_command, make_backend=make_backend)
    return train, evaluate


def add_debug(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure", **options)


def _parser() -> argparse.ArgumentParser:
    prog = "python -m entcov" if Path(sys.argv[0]).name == "__main__.py" else "entcov"
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION, epilog=_EPILOG)
    add_debug(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _, evaluate = add_train_and_eval(commands, _transformers)
    evaluate.add_argument(
        "--trust-run", action="store_true",
        help="let RUN/config.yaml import modules, read environment variables and choose a server, as overrides may",
    )  # fmt: skip

    compare = commands.add_parser("compare", help="matched runs of several entropy controls, a table and plots")
    compare.add_argument("recipe")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
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

    plot = commands.add_parser("plot", help="PNG plots of one or several runs")
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument("--out", help="directory; default: RUN/plots for one run, ./plots for several")
    plot.set_defaults(command=_plot)

    report = commands.add_parser("report", help="one HTML file of runs: curves, tables, their responses token by token")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or one that compare has written")
    report.add_argument("--out", help="file; default: RUN/report.html for one folder, ./report.html for several")
    report.set_defaults(command=_report)

    law = commands.add_parser("fit-law", help="the law reward = -a exp(H) + b of runs: fit, forecast, entropy left")
    law.add_argument("runs", nargs="+", metavar="RUN")
    law.add_argument("--fraction", type=float, default=0.15, help="of the run, for the forecast; default %(default)s")
    law.add_argument(
        "--entropy", default="response_mean",
        help="response_mean (default, as in the paper), token_mean, or heldout:SOURCE (of runs with eval.entropy)",
    )  # fmt: skip
    law.add_argument("--reward", help="train or heldout:SOURCE; default: that of the entropy")
    law.add_argument("--out", help="directory; default: RUN/plots for one run, ./plots for several")
    law.set_defaults(command=_fit_law)

    data = commands.add_parser("data", help="public sets of mathematics and code into verl's row format")
    sets = "dapo_math_17k, math, gsm8k, an evaluation set, or eval; classic_programs, eurus2_code, acecode, kodcode"
    data.add_argument("names", nargs="+", metavar="NAME", help=sets)
    data.add_argument("--source", metavar="FILE", help=".parquet or .jsonl in the set's schema; default: from the hub")
    data.add_argument("--split", help="train or test; default: all the set has")
    data.add_argument("--template", help="prompt wording: dapo, boxed, gsm8k, code; default: the set's own")
    data.add_argument("--revision", help="commit or tag of the set's repository")
    data.add_argument("--out", default="data", help="folder; default %(default)s; files are OUT/NAME/SPLIT.parquet")
    data.set_defaults(command=_data)

    rank = commands.add_parser("data rank", help="a data set's prompts by what a policy makes of them, before training")
    rank.add_argument("recipe", help="its data.train_files are ranked, by its policy and rollout settings")
    rank.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    rank.add_argument("--by", choices=tuple(_RANKINGS), default="semantic_entropy", help="default: %(default)s")
    rank.add_argument("--out", required=True, help="folder of the new files, in verl's row format with score columns")
    rank.add_argument("--checkpoint", metavar="RUN/checkpoints/step_N", help="its policy; default: the recipe's")
    rank.add_argument(
        "--samples", type=int, help="responses to each prompt; default 8 for semantic_entropy, 32 for solve_rate"
    )
    rank.add_argument("--least", type=int, help="solve_rate: right responses of a chosen prompt, at least; default 0")
    rank.add_argument("--most", type=int, help="solve_rate: and at most; default 3")
    rank.add_argument("--prompts", type=int, help="solve_rate: of a data.task, how many different prompts are ranked")
    rank.add_argument("--stages", type=int, help="semantic_entropy: files, from low to high entropy; default 2")
    rank.add_argument(
        "--length-normalized", action="store_true", default=None,
        help="semantic_entropy: a response's probability is exp(mean log-probability of its tokens), not of their sum",
    )  # fmt: skip
    rank.add_argument("--count", type=int, help="kmeans: prompts to choose; default 616")
    rank.set_defaults(command=_rank)

    plan = commands.add_parser("plan", help="memory, traffic and time of a Megatron recipe by arithmetic, no GPU")
    plan.add_argument("recipe")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    plan.add_argument("--gpus", type=int, default=8, help="default %(default)s")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="default %(default)s")
    plan.add_argument("--gpu", default="h100", help="a100, h100 (default), h200, b200")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="such as 80GiB; default: the GPU's own")
    plan.add_argument("--mean-response", type=int, metavar="TOKENS", help="default: half of the limit")
    plan.set_defaults(command=_plan)

    ops = commands.add_parser("check", help="every op against its float64 oracle, on this machine")
    ops.set_defaults(command=_check)
    for command in commands.choices.values():
        add_debug(command, default=argparse.SUPPRESS)
    return parser


def _transformers(config: Config) -> Backend:
    from entcov.rl.backend import TransformersBackend

    return TransformersBackend(config.device)


def train_command(args: argparse.Namespace) -> int:
    from entcov.rl.load_config import load_config
    from entcov.rl.run import train

    config = load_config(args.recipe, [*args.always, *args.overrides])
    backend = args.make_backend(config)
    metrics = train(config, resume=args.resume, display=False if args.no_display else "auto", backend=backend)
    if backend.is_rank0:
        if not metrics:
            print(f"{config.run_dir} is complete at step {config.steps}; a larger steps= goes on with it")
        if config.steps:
            for path in _plot_runs({Path(config.run_dir).name: config.run_dir}, Path(config.run_dir) / "plots"):
                print(path)
    backend.close()
    return 0


def eval_command(args: argparse.Namespace) -> int:
    from entcov.rl.evaluation import report
    from entcov.rl.run import evaluate_run
    from entcov.rl.stored_recipe import load_run

    config = load_run(args.run, args.overrides, trusted=args.trust_run)
    backend = args.make_backend(config)
    shown = sys.stderr.isatty() and backend.world_size == 1
    unkept: list[OSError] = []
    step, _, results = evaluate_run(
        config,
        checkpoint=args.checkpoint,
        progress=_counter("responses") if shown else None,
        backend=backend,
        on_unkept=unkept.append,
    )
    if shown:
        print(file=sys.stderr)
    if backend.is_rank0:
        print(report(args.run, step, results, config.eval, *unkept))
    backend.close()
    return 0


def _counter(what: str) -> Callable[[int, int], None]:
    """Shows on one line of a terminal how many are done, and the time left."""
    from entcov.rl.record.progress import duration

    started: list[tuple[float, int]] = []

    def show(done: int, in_all: int) -> None:
        now = time.monotonic()
        if not started:
            started.append((now, done))  # what the first call reports may have been stored before
        since, before = started[0]
        left = f"{duration((now - since) * (in_all - done) / (done - before))} left" if done > before else ""
        bar = "━" * round(24 * done / in_all)
        print(f"\r{bar:╌<24} {done} of {in_all} {what}  {left:<16}", end="", file=sys.stderr, flush=True)

    return show


def _compare(args: argparse.Namespace) -> int:
    from entcov.report.compare import compare
    from entcov.rl.load_config import load_config
    from entcov.rl.preflight import check_recipe

    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: must be a folder, got the file {out}")
    if args.jobs < 1:
        raise ValueError(f"--jobs: must be at least 1, got {args.jobs}")
    for item in args.overrides:
        key = item.partition("=")[0]
        if key in _SET_BY_COMPARE:
            raise ValueError(f"{check.shown(item)}: compare sets {key} itself, see {_SET_BY_COMPARE[key]}")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: must be integers parted by commas, got {check.shown(args.seeds)}") from None
    if min(seeds) < 0:
        raise ValueError(f"--seeds: must be at least 0, got {min(seeds)}")
    labels = args.controls.split(",")
    for option, values in (("--controls", labels), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{option}: must not repeat an entry, got {check.shown(values)}")
    arms = {}  # label -> overrides
    for label in labels:
        name, *knobs = label.split(":")
        if not re.fullmatch(r"\w+", name) or not all(re.fullmatch(r"\w+=[^/]+", knob) for knob in knobs):
            raise ValueError(
                "--controls: must be names parted by commas, each with :knob=value as needed, got "
                f"{check.shown(args.controls)}"
            )
        arms[label] = [f"control=[{name}]", *(f"controls.{name}.{knob}" for knob in knobs)]
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


def _study(args: argparse.Namespace) -> int:
    from rich.console import Console

    from entcov.studies.base import How
    from entcov.studies.catalogue import STUDIES
    from entcov.studies.page import listing, run_study

    if args.name is None:
        print(listing(list(STUDIES.values())))
        return 0
    if args.name not in STUDIES:
        raise ValueError(f"NAME: must be one of {', '.join(STUDIES)}, got {check.shown(args.name)}")
    if args.jobs < 1:
        raise ValueError(f"--jobs: must be at least 1, got {args.jobs}")
    # Recipes of runs name the folder: a relative and an absolute --out must mean the same runs.
    folder = Path(args.out).resolve() / (f"{args.name}_smoke" if args.smoke else args.name)
    page = Path(args.page) if args.page else folder / "page"
    for option, path in (("--out", folder), ("--page", page)):
        if file := next((one for one in (path, *path.parents) if one.is_file()), None):
            raise ValueError(f"{option}: must be a folder, and {file} is a file")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    how = How(folder, smoke=args.smoke, jobs=args.jobs, arms=args.arms.split(",") if args.arms else None)
    command = "python -m entcov " + shlex.join(sys.argv[1:])
    for path in run_study(STUDIES[args.name], how, page, command=command, console=console):
        console.print(path, markup=False, highlight=False, soft_wrap=True)
    return 0


def _plot(args: argparse.Namespace) -> int:
    for path in _plot_runs(*_runs_and_out(args)):
        print(path)
    return 0


def _runs_and_out(args: argparse.Namespace) -> tuple[dict[str, str], Path]:
    """Label -> run folder, and where the results go."""
    paths = list(dict.fromkeys(args.runs))
    names = [Path(run).resolve().name for run in paths]
    out = Path(args.out or (Path(paths[0]) / "plots" if len(paths) == 1 else "plots"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: must be a folder, got the file {out}")
    return {run if names.count(name) > 1 else name: run for name, run in zip(names, paths, strict=True)}, out


def _plot_runs(runs: dict[str, str], out: Path) -> list[Path]:
    from entcov.report.diagnostics import Diagnosed, plot_diagnostics
    from entcov.report.plots import plot_runs
    from entcov.report.solves import plot_solves
    from entcov.rl.record.metrics import read_metrics
    from entcov.rl.solve_counts import read_solve_counts

    rows = {label: read_metrics(run) for label, run in runs.items()}
    solves = {label: read_solve_counts(run) for label, run in runs.items()}
    paths = plot_runs(rows, out) + plot_solves(solves, out)
    return paths + plot_diagnostics({label: Diagnosed([rows[label]], solves[label]) for label in runs}, out)


def _fit_law(args: argparse.Namespace) -> int:
    from rich.console import Console

    from entcov.report.fit_law import fit_runs

    runs, out = _runs_and_out(args)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    options = {"fraction": args.fraction, "entropy": args.entropy, "reward": args.reward}
    for path in fit_runs(runs, out, **options, console=console):
        print(path)
    return 0


def _report(args: argparse.Namespace) -> int:
    from entcov.report.page import write_report

    out = Path(args.out or (Path(args.runs[0]) / "report.html" if len(args.runs) == 1 else "report.html"))
    if out.is_dir():
        raise ValueError(f"--out: must be a file, got the folder {out}")
    if file := next((folder for folder in out.parents if folder.is_file()), None):
        raise ValueError(f"--out: must be in a folder, got {out}, and {file} is a file")
    print(write_report(args.runs, out))
    return 0


def _data(args: argparse.Namespace) -> int:
    from entcov.rl.data.prepare import EVAL_SETS, prepare

    names = [one for name in args.names for one in (EVAL_SETS if name == "eval" else (name,))]
    if args.source is not None and len(names) > 1:
        raise ValueError(f"--source: goes with one data set, got {', '.join(names)}")
    for name in names:
        options = {"source": args.source, "split": args.split, "template": args.template, "revision": args.revision}
        for prepared in prepare(name, args.out, **options):
            print(prepared)
    return 0


def _rank(args: argparse.Namespace) -> int:
    from entcov.rl.data.rank import kmeans_subset, rank_by_entropy, rank_by_solve_rate
    from entcov.rl.load_config import load_config

    own = _RANKINGS[args.by]
    for by, names in _RANKINGS.items():
        for name in names:
            if name not in own and getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: goes with --by {by}, got --by {args.by}")
    given = {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    shown = sys.stderr.isatty()
    commands = {"semantic_entropy": rank_by_entropy, "solve_rate": rank_by_solve_rate, "kmeans": kmeans_subset}
    command = commands[args.by]
    paths = command(
        load_config(args.recipe, args.overrides), args.out, checkpoint=args.checkpoint, **given,
        progress=_counter("prompts") if shown else None,
    )  # fmt: skip
    if shown:
        print(file=sys.stderr)
    for path in paths:
        print(path)
    return 0


def _plan(args: argparse.Namespace) -> int:
    import dataclasses

    from rich.console import Console

    from entcov.plan.memory import GPUS, parse_size, settings_from
    from entcov.plan.table import print_plan
    from entcov.rl.load_config import load_config

    if args.gpu not in GPUS:
        raise ValueError(f"--gpu: must be one of {', '.join(GPUS)}, got {args.gpu!r}")
    for name in ("gpus", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: must be >= 1, got {getattr(args, name)}")
    gpu = GPUS[args.gpu]
    if args.gpu_memory is not None:
        gpu = dataclasses.replace(gpu, memory=parse_size(args.gpu_memory))
    settings = settings_from(
        load_config(args.recipe, args.overrides), gpu=gpu, gpus=args.gpus, gpus_per_node=args.gpus_per_node,
        mean_response=args.mean_response,
    )  # fmt: skip
    console = Console() if sys.stdout.isatty() else Console(width=120)
    return 0 if print_plan(settings, console) else 1


def _check(args: argparse.Namespace) -> int:
    from entcov.verify.check import run_check

    return run_check()
