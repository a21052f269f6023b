"""TRL's top_entropy_quantile and entcov's, on the same mini-batch in micro-batches of 8, 4, 2 and 1 rows.

One optimizer step of a tiny model on 16 responses that are the same in every run. TRL takes the threshold of the
entropies from each micro-batch, entcov from the mini-batch. Runs in the environment of TRL (.venv-trl), on the CPU.
"""

import argparse
import contextlib
import os
import tempfile
import warnings
from pathlib import Path

from benchmarks.measure import print_table

LAYOUTS = (16, 8, 4, 2, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantile", type=float, default=0.2, help="top_entropy_quantile, the share that is kept")


def run(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = {(who, rows): step(who, rows, args.quantile, Path(folder)) for who in ("TRL", "entcov") for rows in LAYOUTS}
    header = ["", "rows of a micro-batch", "tokens kept", "of them kept with 16 rows", "gradient norm"]
    lines = []
    for (who, rows), (kept, norm) in found.items():
        lines.append([who, rows, len(kept), len(kept & found[who, 16][0]), f"{norm:.5f}"])
    print_table(header, [[str(cell) for cell in line] for line in lines])
    return 0


def step(who: str, rows: int, quantile: float, folder: Path) -> tuple[set, float]:
    """(the tokens that are kept, as (prompt and completion, position); the norm of the gradient)."""
    from trl import GRPOTrainer

    from entcov.controls import make_control
    from tests.support.trl_runs import Recorded, finished, made

    class Watched(GRPOTrainer):
        kept: set

        def _compute_loss(self, model, inputs):
            self.responses = [tuple(row) for row in inputs["completion_ids"].tolist()]
            return super()._compute_loss(model, inputs)

        def get_high_entropy_mask(self, entropies, mask, threshold):
            chosen = super().get_high_entropy_mask(entropies, mask, threshold)
            self.kept |= {(self.responses[row], column) for row, column in chosen.nonzero().tolist()}
            return chosen

    class Ours(Recorded):
        def _compute_loss(self, model, inputs):
            number, responses = self._micro, inputs["completion_ids"].tolist()
            ids, chosen = self._update._token_ids[number], self._update.selections[number][0].mask
            first = {row: i for i, row in enumerate(inputs["entcov_row"].tolist())}
            for one in ids[chosen].tolist():
                self.kept.add((tuple(responses[first[one >> 24]]), one & (2**24 - 1)))
            return super()._compute_loss(model, inputs)

    control = make_control("high_entropy_tokens", top_entropy_quantile=quantile, denominator="all")
    ours = {"cls": Ours, "controls": [control]}
    theirs = {"cls": Watched, "top_entropy_quantile": quantile}
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        chosen = theirs if who == "TRL" else ours
        trainer = made(folder / f"{who}{rows}", rows=rows, max_steps=1, num_iterations=1, **chosen)
        trainer.kept = set()
        found = finished(trainer)
    return trainer.kept, found.logged("grad_norm")[0]
