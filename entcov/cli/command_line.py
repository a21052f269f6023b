"""What all commands share: how one is run, how its failure becomes a message and an exit code, recurring arguments."""

from __future__ import annotations

import argparse
import os
import re
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
    from rich.console import Console

_BAD_INPUT = (ValueError, TypeError, OSError, UnpicklingError)


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


def add_debug(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure", **options)


def add_recipe(parser: argparse.ArgumentParser, help: str | None = None) -> None:
    """Adds `recipe`, a file, and `overrides`."""
    parser.add_argument("recipe", help=help)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="keys of the recipe to change, such as actor.lr=1e-4 or preset=clip_cov (docs/methods.md)",
    )  # fmt: skip


def check_count(option: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{option}: must be at least 1, got {value}")


def check_folder(option: str, path: Path) -> Path:
    """`path` is a folder, or can be made one."""
    if file := next((one for one in (path, *path.parents) if one.is_file()), None):
        raise ValueError(f"{option}: must be a folder, and {file} is a file")
    return path


def console() -> Console:
    """As wide as the terminal; 120 columns in a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def counter(what: str) -> Callable[[int, int], None]:
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
