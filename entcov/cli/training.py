"""`train` and `eval`, for any backend of the actor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entcov.cli.command_line import add_recipe, counter
from entcov.cli.runs import plot_runs

if TYPE_CHECKING:
    from entcov.rl.config import Config
    from entcov.rl.interfaces import Backend


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
    add_recipe(train)
    train.add_argument(
        "--resume", default="auto", help="auto (default), never, or the path of a checkpoint to go back to"
    )
    train.add_argument("--no-display", action="store_true", help="print nothing while running")
    train.set_defaults(command=_train, make_backend=make_backend, always=always)
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
    evaluate.set_defaults(command=_eval, make_backend=make_backend)
    return train, evaluate


def _train(args: argparse.Namespace) -> int:
    from entcov.rl.load_config import load_config
    from entcov.rl.run import train

    config = load_config(args.recipe, [*args.always, *args.overrides])
    backend = args.make_backend(config)
    metrics = train(config, resume=args.resume, display=False if args.no_display else "auto", backend=backend)
    if backend.is_rank0:
        if not metrics:
            print(f"{config.run_dir} is complete at step {config.steps}; a larger steps= goes on with it")
        if config.steps:
            for path in plot_runs({Path(config.run_dir).name: config.run_dir}, Path(config.run_dir) / "plots"):
                print(path)
    backend.close()
    return 0


def _eval(args: argparse.Namespace) -> int:
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
        progress=counter("responses") if shown else None,
        backend=backend,
        on_unkept=unkept.append,
    )
    if shown:
        print(file=sys.stderr)
    if backend.is_rank0:
        print(report(args.run, step, results, config.eval, *unkept))
    backend.close()
    return 0
