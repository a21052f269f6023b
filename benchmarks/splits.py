"""The same mini-batch in micro-batches of 8, 2 and 1 sequences and on two ranks: which tokens are chosen, by whom.

verl's own clip_cov and kl_cov, TRL's own top_entropy_quantile, and entcov's in the same trainer: verl's TrainingWorker
(FSDP2) and TRL's GRPOTrainer, with a tiny Qwen2 on the CPU, float32, one optimizer step on 8 responses. Theirs are only
observed. Runs what this environment has: verl (.venv-verl) or TRL (.venv-trl). About a minute.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import keep, machine, print_table

FRAMEWORKS = {"verl": "benchmarks.splits_verl", "trl": "benchmarks.splits_trl"}
LAYOUTS = {"8": (8, 1), "2": (2, 1), "1": (1, 1), "4, DP 2": (4, 2)}  # rows of a micro-batch, data-parallel ranks
WHOLE, RANKS = "8", "4, DP 2"  # one micro-batch on one rank; the layout for processes of its own


@dataclass
class Outcome:
    """One optimizer step.

    chosen: (response, position) of the tokens that were chosen, on all ranks
    norm: of the gradient, as the trainer logs it
    parameters: after the update, in one vector
    moved: largest change of a parameter by the update
    """

    chosen: set[tuple]
    norm: float
    parameters: Tensor
    moved: float


Found = dict[str, dict[str, Outcome]]  # [who chooses][layout]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, default=None, help="also write the results there")
    parser.add_argument("--plot", type=Path, default=None, help="draw the gradient norms; needs matplotlib")
    parser.add_argument("--also", type=Path, default=None, help="--json of the other framework, for --plot")


def run(args: argparse.Namespace) -> int:
    here = [name for name in FRAMEWORKS if find_spec(name)]
    if not here:
        print("splits: neither verl nor TRL is installed here. `scripts/setup.sh verl` makes .venv-verl, "
              "`scripts/setup.sh trl` makes .venv-trl: start it with bin/python of one of them.", file=sys.stderr)  # fmt: skip
        return 2
    about = machine()
    report = {"machine": about, "frameworks": {}}
    for name in here:
        module = import_module(FRAMEWORKS[name])
        with tempfile.TemporaryDirectory() as folder:
            found = module.measured(Path(folder), _progress(name, len(LAYOUTS) * len(module.WHO)))
        versions = ", ".join(f"{package} {metadata.version(package)}" for package in (name, "transformers"))
        print(f"{versions}, torch {about['torch']}, Python {about['python']}, {about['cpu']}")
        print(module.ABOUT)
        part = report["frameworks"][versions] = summary(found, module.PAIRS)
        _print(part)
    keep(report, args.json)
    if args.plot:
        parts = report["frameworks"] | (json.loads(args.also.read_text())["frameworks"] if args.also else {})
        draw(parts, args.plot)
    return 0


def summary(found: Found, pairs: dict[str, str]) -> dict[str, Any]:
    """Numbers of what was found; `pairs`: theirs and ours that should be equal with one micro-batch on one rank."""
    rows = {}
    for who, layouts in found.items():
        first = layouts[WHOLE]
        rows[who] = {
            layout: {
                "chosen": len(one.chosen),
                "same": len(one.chosen & first.chosen),
                "norm": one.norm,
                "parameters": far(one, first),
            }
            for layout, one in layouts.items()
        }
    equal = []
    for theirs, ours in pairs.items():
        a, b = found[theirs][WHOLE], found[ours][WHOLE]
        equal.append({"theirs": theirs, "ours": ours, "chosen": [len(a.chosen), len(b.chosen)],
                      "same": len(a.chosen & b.chosen), "norms": [a.norm, b.norm], "parameters": far(a, b),
                      "moved": a.moved})  # fmt: skip
    return {"rows": rows, "equal": equal}


def far(a: Outcome, b: Outcome) -> float:
    """Largest difference of a parameter."""
    return float((a.parameters - b.parameters).abs().max())


def _print(part: dict) -> None:
    layouts = list(LAYOUTS)
    print("\nTokens chosen / of them chosen with one micro-batch of 8, by sequences in a micro-batch:")
    print_table(["", *layouts], [[who, *(f"{row[x]['chosen']} / {row[x]['same']}" for x in layouts)]
                                 for who, row in part["rows"].items()])  # fmt: skip
    print("\nFirst gradient norm:")
    print_table(["", *layouts], [[who, *(f"{row[x]['norm']:.5f}" for x in layouts)]
                                 for who, row in part["rows"].items()])  # fmt: skip
    print("\nLargest difference of a parameter after the update from that with one micro-batch of 8:")
    print_table(["", *layouts], [[who, *(f"{row[x]['parameters']:.1e}" for x in layouts)]
                                 for who, row in part["rows"].items()])  # fmt: skip
    print("\nOne micro-batch, one rank:")
    header = ["", "tokens", "the same", "gradient norms", "largest difference of a parameter", "change by the update"]
    print_table(header, [
        [f"{row['theirs']} = {row['ours']}", "{} and {}".format(*row["chosen"]), str(row["same"]),
         "{:.6f} and {:.6f}".format(*row["norms"]), f"{row['parameters']:.1e}", f"{row['moved']:.1e}"]
        for row in part["equal"]
    ])  # fmt: skip


def draw(parts: dict[str, dict], path: Path) -> None:
    """One panel for each framework: the first gradient norm against the sequences in a micro-batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(parts), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (versions, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        layouts = [layout for layout in LAYOUTS if layout != RANKS]
        for n, (who, row) in enumerate(part["rows"].items()):  # theirs and ours in turn
            ours = n % 2 == 1
            ax.plot(layouts, [row[layout]["norm"] for layout in layouts], label=who, marker="osD"[n // 2],
                    color="black" if ours else "0.45", linestyle="-" if ours else "--",
                    markerfacecolor="black" if ours else "white")  # fmt: skip
        ax.set_title(versions.split(",")[0], fontsize=10)
        ax.set_xlabel("sequences in a micro-batch")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    figure.axes[0].set_ylabel("first gradient norm")
    figure.savefig(path, dpi=150)


@contextlib.contextmanager
def watched_ours(key: Callable) -> Iterator[set]:
    """The tokens that entcov's first control chooses in the block: key(tokens) -> one name for each token."""
    from entcov.integrations.controlled_loss import ControlledLoss

    chosen, own = set(), ControlledLoss.update

    def update(self, micro_batches, **others):
        made = own(self, micro_batches, **others)
        for tokens, (selection, *_) in zip(micro_batches, made.selections, strict=True):
            chosen.update(name for name, taken in zip(key(tokens), selection.mask.tolist(), strict=True) if taken)
        return made

    with mock.patch.object(ControlledLoss, "update", update):
        yield chosen


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the frameworks print and warn of, here and in processes that are started in the block."""
    quiet = mock.patch.dict(os.environ, PYTHONWARNINGS="ignore")
    with quiet, open(os.devnull, "w") as null, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(logging.NOTSET)


def _progress(name: str, total: int) -> Callable[[str], None]:
    done, stream = iter(range(1, total + 1)), sys.stderr

    def show(what: str) -> None:
        number = next(done)
        line = f"{name} {number}/{total}: {what}"
        end = "\r" + " " * 79 + "\r" if number == total else ""
        print(f"\r{line:79}{end}" if stream.isatty() else line + "\n", end="", file=stream, flush=True)

    return show
