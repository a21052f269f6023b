"""Micro-batch invariance: what a control chooses, and the gradient, by how one mini-batch is divided.

The reference code of Clip-Cov, KL-Cov, SENT and 80/20 chooses tokens in each micro-batch of each data-parallel rank
alone; entcov's controls choose over the mini-batch (scope "global"), and `scope="micro_batch"` reproduces the other.
Both choose here among the same tokens: a mini-batch of 512 responses of a small transformer, whose head has moved since
they were scored, as after some updates. It is divided into micro-batches of 512, 128, 32 and 8 responses, on one
process and on two that all-reduce (gloo). The gradient is that of the model's head. The denominators of the loss are
the mini-batch's in both, so that the choice alone is compared. `python -m benchmarks splits` shows what verl and TRL
themselves do in their own trainers.

AEnt chooses nothing; its controller is fed with the mean clamped entropy. entcov takes the mean over all tokens of the
mini-batch; verl's trainer, and AEnt's port to it, averages the means of micro-batches and ranks.

Published strengths, and for Clip-Cov and KL-Cov one ten times larger as well, since the published fractions choose some
tokens of a million and none or one of the few thousand here. Nothing is chosen by a result: every seed is reported.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from entcov.controls import (
    SENT,
    AEnt,
    ClipCov,
    Control,
    HighEntropyTokens,
    KLCov,
    Selection,
    mini_batch_totals,
    select,
)
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.report.compare import Estimate
from entcov.report.plots import COLOURS, new_figure
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.studies.base import Findings, PartsStudy, Table
from entcov.studies.small_policy import response_rows, small_policy
from entcov.studies.words import shown

WARM_START = 150  # supervised steps
SIZES = (512, 128, 32, 8)  # responses in a micro-batch
RANKS = 2
MOVED = 0.03  # standard deviation of the change of the head since the responses were scored, in units of its own
CONFIG = PolicyLossConfig(clip_low=1.0, clip_high=1.0)  # as in the authors' runs of Clip-Cov
AENT = AEnt()  # with the knobs of the paper's MATH run
SEEDS = tuple(range(4))


@dataclass(frozen=True)
class Pair:
    """A method as entcov does it and as the reference code does."""

    ours: Control
    reference: Control


PAIRS = {
    "Clip-Cov 2e-4": Pair(ClipCov(), ClipCov(semantics="reference", scope="micro_batch")),
    "Clip-Cov 2e-3": Pair(ClipCov(2e-3), ClipCov(2e-3, semantics="reference", scope="micro_batch")),
    "KL-Cov 2e-3": Pair(KLCov(), KLCov(scope="micro_batch")),
    "KL-Cov 2e-2": Pair(KLCov(2e-2), KLCov(2e-2, scope="micro_batch")),
    "SENT": Pair(SENT(), SENT(scope="micro_batch")),
    "80/20": Pair(HighEntropyTokens(), HighEntropyTokens(scope="micro_batch")),
}
WHO = ("entcov", "reference")


@dataclass(frozen=True)
class Data:
    """The mini-batch's tokens and what the head makes of them; everything is in the order of the responses."""

    tokens: Tokens
    hidden: Tensor  # [T, D]
    target: Tensor  # [T]
    head: Tensor  # [V, D], as it is now

    def at(self, index: Tensor) -> Data:
        fields = {name: value[index] for name, value in vars(self.tokens).items() if value is not None}
        return Data(Tokens(**fields), self.hidden[index], self.target[index], self.head)


def scored(seed: int, prompts: int, warm_start: int) -> Data:
    model, batch = small_policy(seed, warm_start=warm_start, prompts=prompts)
    with torch.no_grad():
        hidden = response_rows(model, batch)[1]
    head = model.get_output_embeddings().weight.detach().clone()
    head += MOVED * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
    at = batch.loss_mask
    stats = linear_token_stats(hidden, head, batch.target[at], **AENT.clamp)
    tokens = batch.loss_tokens(at, stats.logprob, entropy=stats.entropy, clamped_entropy=stats.clamped_entropy)
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(seed))
    tokens.sequence = order[tokens.sequence]  # as a trainer that balances lengths mixes the prompts
    return Data(tokens, hidden, batch.target[at], head)


def divided(data: Data, size: int, rank: int, ranks: int) -> list[Data]:
    """The micro-batches of a rank: every `ranks`-th response is its own, `size` responses in each."""
    number = data.tokens.sequence
    place = torch.div(number, ranks, rounding_mode="floor")
    mine, count = number % ranks == rank, int(number.max()) + 1
    starts = range(0, -(-count // ranks), size)
    return [data.at((mine & (place >= start) & (place < start + size)).nonzero()[:, 0]) for start in starts]


def chosen(tokens: Tokens, selection: Selection) -> Tensor:
    """[T] bool: what the selection takes, or keeps where it drops the others."""
    if selection.weight is not None:
        return selection.weight > 0
    return selection.mask if selection.mask is not None else tokens.loss_mask & ~selection.drop


def step(controls: Sequence[Control], parts: Sequence[Data], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """One backward pass over this rank's micro-batches: ids of the chosen tokens, loss and gradient of all ranks."""
    micro_batches = [part.tokens for part in parts]
    selections, _ = select(controls, micro_batches, step=0, config=CONFIG, group=group)
    totals = mini_batch_totals(micro_batches, selections, group=group)
    head = parts[0].head.clone().requires_grad_()
    loss, ids = torch.zeros((), dtype=torch.float64), []
    for part, own in zip(parts, selections, strict=True):
        ids += [i for choice in own for i in part.tokens.token_id[chosen(part.tokens, choice)].tolist()]
        loss += _backward(part, head, controls, own, totals)
    everyone = [ids]
    if group is not None:
        dist.all_reduce(loss, group=group)
        dist.all_reduce(head.grad, group=group)
        everyone = [[]] * dist.get_world_size(group)
        dist.all_gather_object(everyone, ids, group=group)
    return {"ids": {i for own in everyone for i in own}, "loss": float(loss), "gradient": head.grad.double()}


def _backward(part: Data, head: Tensor, controls: Sequence[Control], selections: list, totals: Totals) -> float:
    """Adds the micro-batch's gradient to the head's; returns its loss."""
    stats = linear_token_stats(part.hidden, head, part.target)
    tokens = replace(part.tokens, logprob=stats.logprob, entropy=stats.entropy)
    loss, metrics = policy_loss(tokens, CONFIG, totals=totals, controls=controls, selections=selections)
    loss.backward()
    return float(metrics["actor/loss"])


def clamped_means(parts: Sequence[Data], group: dist.ProcessGroup | None) -> tuple[float, float]:
    """The mean clamped entropy over tokens, as `policy_loss` gives it to the controller; and the mean of the means of
    micro-batches, then of ranks."""
    micro_batches = [part.tokens for part in parts]
    totals = mini_batch_totals(micro_batches, [[None]] * len(parts), group=group)
    sums = [
        policy_loss(tokens, CONFIG, totals=totals, controls=[AENT])[1]["actor/clamped_entropy"]
        for tokens in micro_batches
    ]
    means = [tokens.clamped_entropy.double().mean() for tokens in micro_batches]
    found = torch.stack([torch.stack(sums).sum(), torch.stack(means).mean()])
    if group is not None:
        dist.all_reduce(found, group=group)
        found[1] /= dist.get_world_size(group)
    return float(found[0]), float(found[1])


def measure(seed: int, sizes: Sequence[int], warm_start: int) -> dict[str, Any]:
    """Rows by method and by who chooses, one for each layout: see `_row`. The first layout is the undivided one."""
    data = scored(seed, sizes[0] // 8, warm_start)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(data, Path(folder) / "data")
        torch.multiprocessing.start_processes(_rank, (Path(folder), tuple(sizes)), nprocs=RANKS, start_method="spawn")
        return json.loads((Path(folder) / "found").read_text())


def _rank(rank: int, folder: Path, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    data = torch.load(folder / "data", weights_only=False)
    layouts = [(size, ranks) for ranks in (1, RANKS) for size in sizes if size <= sizes[0] // ranks]
    found: dict[str, Any] = {"tokens": len(data.target), "layouts": layouts, "rows": {}, "aent": []}
    whole: dict[str, dict[str, Any]] = {}
    for size, ranks in layouts:
        if rank >= ranks:
            continue
        parts, group = divided(data, size, rank, ranks), dist.group.WORLD if ranks > 1 else None
        plain = step([], parts, group)
        for method, pair in PAIRS.items():
            for who in WHO:
                own = step([getattr(pair, who if who != "entcov" else "ours")], parts, group)
                key = f"{method} / {who}"
                base = whole.setdefault(key, own | {"effect": float((own["gradient"] - plain["gradient"]).norm())})
                found["rows"].setdefault(key, []).append(_row(own, base))
        found["aent"].append(clamped_means(parts, group))
    if rank == 0:
        (folder / "found").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _row(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """A layout against the undivided mini-batch.

    chosen, same: number of tokens, and of those that are chosen undivided too; loss: difference; gradient: norm of
    the difference / norm undivided; of_effect: the same / norm of what the control does to the undivided gradient,
    None where it does nothing.
    """
    apart = float((own["gradient"] - base["gradient"]).norm())
    return {
        "chosen": len(own["ids"]), "whole": len(base["ids"]), "same": len(own["ids"] & base["ids"]),
        "loss": own["loss"] - base["loss"], "gradient": apart / float(base["gradient"].norm()),
        "of_effect": apart / base["effect"] if base["effect"] > 0 else None,
    }  # fmt: skip


class Splits(PartsStudy):
    name = "splits"
    title = "What a control chooses, by how the mini-batch is divided"
    question = "Do micro-batches and ranks change which tokens a control chooses, and the gradient?"

    def parts(self, smoke: bool) -> Mapping[str, Callable[[], Any]]:
        seeds, sizes, warm_start = (SEEDS[:1], (128, 32), 80) if smoke else (SEEDS, SIZES, WARM_START)
        return {f"seed {seed}": partial(measure, seed, sizes, warm_start) for seed in seeds}

    def findings(self, results: Mapping[str, Any]) -> Findings:
        runs = list(results.values())
        statements = [_ours(runs), *_reference(runs), _controller(runs)]
        tables = [_choices(runs), _gradients(runs), _means(runs)]
        return Findings(statements, tables, {"splits": _figure(runs)}, {"seeds": results})


Runs = Sequence[Mapping[str, Any]]


def _layout(size: int, ranks: int) -> str:
    return f"{size}" if ranks == 1 else f"{size}, {ranks} ranks"


def _of(runs: Runs, key: str, layout: int, name: str) -> Estimate:
    found = {seed: own["rows"][key][layout][name] for seed, own in enumerate(runs)}
    return Estimate.of({seed: value for seed, value in found.items() if value is not None})


def _share(runs: Runs, key: str, layout: int) -> tuple[float, float]:
    """(tokens chosen / chosen undivided, share of those chosen undivided that still are), over all seeds."""
    rows = [own["rows"][key][layout] for own in runs]
    whole = sum(row["whole"] for row in rows)
    if not whole:
        return (float("nan"), float("nan"))
    return sum(row["chosen"] for row in rows) / whole, sum(row["same"] for row in rows) / whole


def _ours(runs: Runs) -> str:
    rows = [row for own in runs for key, rows in own["rows"].items() if key.endswith(WHO[0]) for row in rows[1:]]
    changed = [row for row in rows if not row["chosen"] == row["same"] == row["whole"]]
    largest = max(row["gradient"] for row in rows)
    same = "the same tokens in each" if not changed else f"other tokens in {len(changed)}"
    return (
        f"entcov's controls choose {same} of {len(rows)} divisions of {len(runs)} mini-batches, and the gradient of "
        f"the head differs by at most {largest:.1e} of its norm."
    )


def _reference(runs: Runs) -> list[str]:
    """The smallest micro-batches on the most ranks."""
    layouts = runs[0]["layouts"]
    last = max(range(len(layouts)), key=lambda i: (layouts[i][1], -layouts[i][0]))
    clauses, unequal = [], 0
    for method in PAIRS:
        key = f"{method} / {WHO[1]}"
        times, kept = _share(runs, key, last)
        of_effect = _of(runs, key, last, "of_effect")
        unequal += any(
            row["chosen"] != row["same"] or row["same"] != row["whole"] for own in runs for row in own["rows"][key]
        )
        if times != times:
            clauses.append(f"{method} chooses nothing undivided")
        else:
            clauses.append(
                f"{method} chooses {times:.2f} times as many, {kept:.0%} of the undivided choice among them "
                f"(gradient moved by {shown(of_effect, 2)} of the control's own effect)"
            )
    size, ranks = layouts[last]
    head = (
        f"With the reference's scope the choice of {unequal} of {len(PAIRS)} methods depends on the division"
        if unequal
        else f"The reference's scope chooses the same tokens for all {len(PAIRS)} methods"
    )
    return [f"{head}. In micro-batches of {size} responses on {ranks} ranks: " + "; ".join(clauses) + "."]


def _controller(runs: Runs) -> str:
    ours = max(abs(mean - own["aent"][0][0]) for own in runs for mean, _ in own["aent"])
    apart = max(abs(of_means - mean) for own in runs for mean, of_means in own["aent"])
    return (
        f"The mean clamped entropy that AEnt's controller reads is the same to {ours:.0e} nats in every division. The "
        f"mean of the micro-batches' means differs from it by up to {apart:.1e} nats, which moves the coefficient by "
        f"{AENT.coef_lr * apart:.1e} a step with the paper's knobs, of a coefficient between {AENT.coef_min:g} and "
        f"{AENT.coef_max:g}."
    )


def _choices(runs: Runs) -> Table:
    layouts = [_layout(*own) for own in runs[0]["layouts"]]
    rows = []
    for key in runs[0]["rows"]:
        cells = []
        for index in range(len(layouts)):
            chosen_, same = (sum(own["rows"][key][index][name] for own in runs) for name in ("chosen", "same"))
            cells.append(f"{chosen_} / {same}")
        rows.append([*key.split(" / "), *cells])
    tokens = sum(own["tokens"] for own in runs)
    title = (
        f"Tokens chosen / of them chosen undivided, of {tokens:,} in {len(runs)} mini-batches, by responses in a "
        "micro-batch"
    )
    return Table(title, ["method", "who", *layouts], rows)


def _gradients(runs: Runs) -> Table:
    layouts = [_layout(*own) for own in runs[0]["layouts"]]
    rows = []
    for key in runs[0]["rows"]:
        cells = [
            f"{_of(runs, key, i, 'gradient').mean:.1e} / {_of(runs, key, i, 'loss').mean:+.1e}"
            for i in range(len(layouts))
        ]
        rows.append([*key.split(" / "), *cells])
    return Table("Gradient moved, of its norm / loss moved, means over seeds", ["method", "who", *layouts], rows)


def _means(runs: Runs) -> Table:
    rows = []
    for index, (size, ranks) in enumerate(runs[0]["layouts"]):
        columns = [sum(own["aent"][index][i] for own in runs) / len(runs) for i in (0, 1)]
        rows.append([_layout(size, ranks), *(f"{own:.5f}" for own in columns)])
    header = ["micro-batch", "mean over tokens", "mean of means"]
    return Table("Mean clamped entropy, nats, means over seeds", header, rows)


def _figure(runs: Runs):
    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    one = [i for i, (_, ranks) in enumerate(runs[0]["layouts"]) if ranks == 1]
    sizes = [runs[0]["layouts"][i][0] for i in one]
    for number, method in enumerate(PAIRS):
        look = {"color": COLOURS[number % len(COLOURS)], "markersize": 4, "linewidth": 1.5}
        for who, style in zip(WHO, ("-s", "--o"), strict=True):
            key = f"{method} / {who}"
            label = method if who == WHO[1] else None
            left.plot(sizes, [_share(runs, key, i)[1] for i in one], style, label=label, **look)
            moved = [_of(runs, key, i, "gradient").mean for i in one[1:]]
            right.plot(sizes[1:], moved, style, label=label, **look)
    left.set_ylabel("share of the undivided choice")
    left.set_ylim(-0.03, 1.05)
    left.set_title("Tokens still chosen", loc="left")
    right.set_ylabel("change / norm")
    right.set_yscale("log")
    right.set_title("Gradient moved", loc="left")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlim(1.1 * sizes[0], sizes[-1] / 1.1)
        ax.set_xlabel("responses in a micro-batch")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize=8, frameon=False)
    figure.supxlabel("dashed: reference scope; solid: entcov", fontsize=8, color="#555555")
    return figure
