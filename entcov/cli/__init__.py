"""`python -m entcov train | eval | compare | study | plot | report | fit-law | data | data rank | plan | check`.

Each file has the arguments of its commands beside what they do: print results, or raise. A command itself imports what
it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entcov.cli.command_line import add_debug, run_command
from entcov.cli.data import add_data_and_rank
from entcov.cli.experiments import add_compare_and_study
from entcov.cli.machine import add_plan_and_check
from entcov.cli.runs import add_plot_report_and_law
from entcov.cli.training import add_train_and_eval

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


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["data", "rank"]:  # argparse takes a command of one word
        words[:2] = ["data rank"]
    return run_command(make_parser(), words, lambda error, text: print(text, file=sys.stderr))


def make_parser() -> argparse.ArgumentParser:
    prog = "python -m entcov" if Path(sys.argv[0]).name == "__main__.py" else "entcov"
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION, epilog=_EPILOG)
    add_debug(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _, evaluate = add_train_and_eval(commands, _transformers)
    evaluate.add_argument(
        "--trust-run", action="store_true",
        help="let RUN/config.yaml import modules, read environment variables and choose a server, as overrides may",
    )  # fmt: skip
    add_compare_and_study(commands)
    add_plot_report_and_law(commands)
    add_data_and_rank(commands)
    add_plan_and_check(commands)
    for command in commands.choices.values():
        add_debug(command, default=argparse.SUPPRESS)
    return parser


def _transformers(config: Config) -> Backend:
    from entcov.rl.backend import TransformersBackend

    return TransformersBackend(config.device)
