"""`data` and `data rank`: prompts to train on, and which of them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from entcov.cli.command_line import add_recipe, counter

# Options of `data rank` that go with each --by.
_RANKINGS = {
    "semantic_entropy": ("samples", "stages", "length_normalized"),
    "solve_rate": ("samples", "least", "most", "prompts"),
    "kmeans": ("count",),
}


def add_data_and_rank(commands: Any) -> None:
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
    add_recipe(rank, "its data.train_files are ranked, by its policy and rollout settings")
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
        progress=counter("prompts") if shown else None,
    )  # fmt: skip
    if shown:
        print(file=sys.stderr)
    for path in paths:
        print(path)
    return 0
