"""`plan` and `check`: what a machine has room for, and whether the ops are right on it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from entcov.cli.command_line import add_recipe, check_count, console


def add_plan_and_check(commands: Any) -> None:
    plan = commands.add_parser("plan", help="memory, traffic and time of a Megatron recipe by arithmetic, no GPU")
    add_recipe(plan)
    plan.add_argument("--gpus", type=int, default=8, help="default %(default)s")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="default %(default)s")
    plan.add_argument("--gpu", default="h100", help="a100, h100 (default), h200, b200")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="such as 80GiB; default: the GPU's own")
    plan.add_argument("--mean-response", type=int, metavar="TOKENS", help="default: half of the limit")
    plan.set_defaults(command=_plan)

    ops = commands.add_parser("check", help="every op against its float64 oracle, on this machine")
    ops.set_defaults(command=_check)


def _plan(args: argparse.Namespace) -> int:
    from entcov.plan.memory import GPUS, parse_size, settings_from
    from entcov.plan.table import print_plan
    from entcov.rl.load_config import load_config

    if args.gpu not in GPUS:
        raise ValueError(f"--gpu: must be one of {', '.join(GPUS)}, got {args.gpu!r}")
    check_count("--gpus", args.gpus)
    check_count("--gpus-per-node", args.gpus_per_node)
    gpu = GPUS[args.gpu]
    if args.gpu_memory is not None:
        gpu = dataclasses.replace(gpu, memory=parse_size(args.gpu_memory))
    settings = settings_from(
        load_config(args.recipe, args.overrides), gpu=gpu, gpus=args.gpus, gpus_per_node=args.gpus_per_node,
        mean_response=args.mean_response,
    )  # fmt: skip
    return 0 if print_plan(settings, console()) else 1


def _check(args: argparse.Namespace) -> int:
    from entcov.verify.check import run_check

    return run_check()
