"""`python -m benchmarks splits` in TRL: its top_entropy_quantile beside entcov's, in its GRPOTrainer."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.splits import LAYOUTS, RANKS, Found, Outcome, silent, silent_processes, watched_ours

QUANTILE = 0.2  # share of the tokens that is kept
THEIRS, OURS = "TRL top_entropy_quantile", "entcov high_entropy_tokens"
WHO = (THEIRS, OURS)
PAIRS = {"highest entropies": (THEIRS, OURS)}
ABOUT = f"8 responses of 1 to 8 tokens; {QUANTILE:.0%} of the tokens are kept (ours with denominator='all')"


def measured(folder: Path, progress: Callable[[str], None]) -> Found:
    """Every row of WHO in every layout."""
    found: Found = {who: {} for who in WHO}
    for layout, (rows, ranks) in LAYOUTS.items():
        for who in WHO:
            progress(f"{who}, micro-batch {layout}")
            if ranks == 1:
                found[who][layout] = step(folder, who, rows)
            elif who == THEIRS:  # both in the same two processes: importing takes longest
                with silent_processes():
                    torch.multiprocessing.spawn(_rank, (_free_port(), str(folder)), nprocs=ranks)
    for who, outcome in torch.load(folder / "ranks.pt", weights_only=False).items():
        found[who][RANKS] = outcome
    return found


def step(folder: Path, who: str, rows: int) -> Outcome:
    """One update of a new trainer, in micro-batches of `rows`; 8 responses on all processes together."""
    from entcov.controls import make_control
    from entcov.integrations.trl import EntcovGRPOTrainer
    from tests.support.trl_runs import finished, made, tiny_model

    changed: dict[str, Any] = {"cls": _observed_trainer(), "top_entropy_quantile": QUANTILE}
    if who == OURS:
        control = make_control("high_entropy_tokens", top_entropy_quantile=QUANTILE, denominator="all")
        changed = {"cls": EntcovGRPOTrainer, "controls": [control]}
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    changed |= {"rows": rows, "gradient_accumulation_steps": 8 // (rows * ranks), "max_steps": 1, "num_iterations": 1}
    with silent(), watched_ours(_key) as chosen:
        run = finished(made(folder / f"{who} {rows} {ranks}", **changed))
    if who == THEIRS:
        chosen = run.trainer.kept
    before = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    return Outcome(chosen, run.logged("grad_norm")[0], run.parameters, float((run.parameters - before).abs().max()))


def _key(tokens) -> list[tuple]:
    return list(zip(tokens.sequence.tolist(), tokens.position.tolist(), strict=True))


def _observed_trainer() -> type:
    """TRL's trainer, which numbers its responses over all processes and notes those tokens that it keeps."""
    from trl import GRPOTrainer

    class Observed(GRPOTrainer):
        kept: set

        def _generate_and_score_completions(self, inputs):
            batch, self.kept = super()._generate_and_score_completions(inputs), set()
            count = len(batch["completion_ids"])
            batch["row"] = self.accelerator.process_index * count + torch.arange(count)
            return batch

        def _compute_loss(self, model, inputs):
            self._rows = inputs["row"].tolist()
            return super()._compute_loss(model, inputs)

        def get_high_entropy_mask(self, entropies, mask, threshold):
            chosen = super().get_high_entropy_mask(entropies, mask, threshold)
            self.kept |= {(self._rows[row], position) for row, position in chosen.nonzero().tolist()}
            return chosen

    return Observed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, port: int, folder: str) -> None:
    """Process `rank` of two: both trainers in the layout RANKS. Process 0 writes the outcomes of all to ranks.pt."""
    rows, world = LAYOUTS[RANKS]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in group.items()} | {"ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    found = {}
    for who in WHO:
        one = step(Path(folder), who, rows)
        chosen: list[Any] = [None] * world
        dist.all_gather_object(chosen, one.chosen)
        found[who] = Outcome(set.union(*chosen), one.norm, one.parameters, one.moved)
    if rank == 0:
        torch.save(found, Path(folder, "ranks.pt"))
    dist.destroy_process_group()
