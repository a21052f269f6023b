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
        print(
            "splits: neither verl nor TRL is installed here. `scripts/setup.sh verl` makes .venv-verl, "
            "`scripts/setup.sh trl` makes .venv-trl: start it with bin/python of one of them.",
            file=sys.stderr,
        )
        return 2
    if args.plot and not find_spec("matplotlib"):
        print("splits: --plot needs matplotlib, which is not installed here; .venv-verl has it", file=sys.stderr)
        return 2
    others = json.loads(args.also.read_text())["frameworks"] if args.also else {}
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
        draw(report["frameworks"] | others, args.plot)
    return 0


def summary(found: Found, pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
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
    equal = {}
    for name, (theirs, ours) in pairs.items():
        a, b = found[theirs][WHOLE], found[ours][WHOLE]
        equal[name] = {
            "chosen": [len(a.chosen), len(b.chosen)],
            "same": len(a.chosen & b.chosen),
            "norms": [a.norm, b.norm],
            "parameters": far(a, b),
            "moved": a.moved,
        }
    return {"rows": rows, "equal": equal}


def far(a: Outcome, b: Outcome) -> float:
    """Largest difference of a parameter."""
    return float((a.parameters - b.parameters).abs().max())


def _print(part: dict) -> None:
    tables = {
        "Tokens chosen / of them chosen with one micro-batch of 8, by sequences in a micro-batch": "{chosen} / {same}",
        "First gradient norm": "{norm:.5f}",
        "Largest difference of a parameter from that with one micro-batch of 8, after the update": "{parameters:.1e}",
    }
    for title, cell in tables.items():
        print(f"\n{title}:")
        lines = [[who, *(cell.format(**row[x]) for x in LAYOUTS)] for who, row in part["rows"].items()]
        print_table(["", *LAYOUTS], lines)
    print("\nTheirs and ours with one micro-batch on one rank:")
    header = ["", "tokens", "the same", "gradient norms", "parameters differ by", "the update's change"]
    lines = [
        [name, "{} and {}".format(*row["chosen"]), str(row["same"]),
         "{:.6f} and {:.6f}".format(*row["norms"]), f"{row['parameters']:.1e}", f"{row['moved']:.1e}"]
        for name, row in part["equal"].items()
    ]  # fmt: skip
    print_table(header, lines)


def draw(parts: dict[str, dict], path: Path) -> None:
    """One panel for each framework: the first gradient norm against the sequences in a micro-batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8 * len(parts), 3.4), layout="constrained")
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
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles[::2] + handles[1::2], names[::2] + names[1::2], ncols=2, loc="upper center",
                  bbox_to_anchor=(0.5, -0.2), fontsize=7, frameon=False)  # fmt: skip
    figure.axes[0].set_ylabel("first gradient norm")
    figure.savefig(path, dpi=120)


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
    """Without what the frameworks print and warn of."""
    with open(os.devnull, "w") as null, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            logging.disable(logging.WARNING)
            try:
                yield
            finally:
                logging.disable(logging.NOTSET)


def silent_processes() -> Any:
    """Without what the imports warn of in the processes that are started in the block."""
    return mock.patch.dict(os.environ, PYTHONWARNINGS="ignore")


def _progress(name: str, total: int) -> Callable[[str], None]:
    done, stream = iter(range(1, total + 1)), sys.stderr

    def show(what: str) -> None:
        number = next(done)
        line = f"{name} {number}/{total}: {what}"
        end = "\r" + " " * 79 + "\r" if number == total else ""
        print(f"\r{line:79}{end}" if stream.isatty() else line + "\n", end="", file=stream, flush=True)

    return show
