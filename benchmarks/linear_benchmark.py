"""linear_token_stats against the same statistics of materialised logits, and against chunked heads in plain torch.

Forward and backward from hidden states to the gradients of hidden and weight, on this CPU, all in one process and in
turn. The rivals are those whose published code runs on a CPU. `python -m benchmarks rivals FOLDER` downloads them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from benchmarks.measure import DTYPES, interleaved_seconds, kept_bytes, peak_allocated_bytes, print_table
from benchmarks.ops_benchmark import ENTROPY_COEF, on_this_cpu, usual
from entcov import linear_token_stats, token_stats
from entcov.ops.core import isa
from entcov.verify import reference

CHECKED_TOKENS = 64
BASELINE = "token_stats(hidden @ W.T)"
RIVALS = ("TRL chunked head", "verl chunked head", "Liger fused linear")  # of benchmarks.gpu.rivals

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # hidden, weight, target -> logprob, entropy


def ours(hidden: Tensor, weight: Tensor, target: Tensor, **settings) -> tuple[Tensor, Tensor]:
    stats = linear_token_stats(hidden, weight, target, **settings)
    return stats.logprob, stats.entropy


def materialised(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    stats = token_stats(hidden @ weight.T, target)
    return stats.logprob, stats.entropy


def usual_head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return usual(hidden @ weight.T, target)


def usual_in_chunks(hidden: Tensor, weight: Tensor, target: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The usual code: a checkpoint around each chunk, so that its logits are computed again in backward."""
    chunks = [checkpoint(usual_head, h, weight, t, use_reentrant=False)
              for h, t in zip(hidden.split(chunk_size), target.split(chunk_size), strict=True)]  # fmt: skip
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def gradients(head: Head, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob, entropy = head(*leaves, target)
    return torch.autograd.grad((-logprob - ENTROPY_COEF * entropy).sum(), leaves)


def forward(head: Head, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return head(hidden.detach().requires_grad_(), weight.detach().requires_grad_(), target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=512, help="of the hidden states")
    parser.add_argument("--chunk", type=int, default=256, help="tokens in a chunk, for those that have chunks")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    measure.add_arguments(parser, repeats=5)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine with other work on it")
    parser.add_argument("--rivals", type=Path, default=None, help="folder with the rivals' wheels")
    parser.add_argument("--no-usual", action="store_true", help="leave the formula in plain torch out: it is slow")


def run(args: argparse.Namespace) -> int:
    measure.set_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        heads = {
            "entcov, logits kept": partial(ours, chunk_size=args.tokens),
            f"entcov, chunks of {args.chunk}": partial(ours, chunk_size=args.chunk),
            BASELINE: materialised,
        }
        if not args.no_usual:
            heads["plain torch"] = usual_head
            heads[f"plain torch, chunks of {args.chunk}"] = partial(usual_in_chunks, chunk_size=args.chunk)
        heads |= on_this_cpu(RIVALS, "lm_head", args.rivals, Path(scratch))
        report = _measure(args, heads)
    _print(report)
    measure.keep(report, args.json)
    return 0


def _measure(args, heads: dict[str, Head]) -> dict:
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    hidden = torch.randn(args.tokens, args.width).to(dtype)
    weight = (2.5 / args.width**0.5 * torch.randn(args.vocab, args.width)).to(dtype)
    target = torch.randint(0, args.vocab, (args.tokens,))
    errors = {name: _errors(head, hidden, weight, target) for name, head in heads.items()}
    calls = {name: partial(gradients, head, hidden, weight, target) for name, head in heads.items()}
    seconds = interleaved_seconds(calls, args.repeats, time.process_time if args.cpu_time else time.perf_counter)
    product = 2 * args.tokens * args.vocab * args.width
    rows = []
    for name, times in seconds.items():
        timed = measure.times_of(times, seconds[BASELINE])
        rows.append({
            "name": name,
            **timed,
            "gflop_per_s_of_three_products": 3 * product / timed["median_ms"] / 1e6,
            "bytes_kept_for_backward": kept_bytes(partial(forward, heads[name], hidden, weight, target)),
            "peak_bytes_beyond_gradients": peak_allocated_bytes(calls[name]) - hidden.nbytes - weight.nbytes,
            **errors[name],
        })  # fmt: skip
    return {
        "machine": {**measure.machine(), "isa": isa(), "threads": torch.get_num_threads()},
        "shape": {"tokens": args.tokens, "vocab": args.vocab, "width": args.width, "dtype": args.dtype},
        "clock": "processor time" if args.cpu_time else "time",
        "logits_bytes": args.tokens * args.vocab * dtype.itemsize,
        "times": rows,
    }


def _errors(head: Head, hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, float]:
    """Of the first tokens, against float64 of the same inputs; gradients relative to the norm."""
    rows, tokens = hidden[:CHECKED_TOKENS], target[:CHECKED_TOKENS]
    leaves = rows.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference.token_stats(leaves[0] @ leaves[1].T, tokens)
    wanted = torch.autograd.grad((-expected["logprob"] - ENTROPY_COEF * expected["entropy"]).sum(), leaves)
    with torch.no_grad():
        _, entropy = head(rows, weight, tokens)
    found = gradients(head, rows, weight, tokens)
    relative = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    worst = float((entropy.double() - expected["entropy"].detach()).abs().max())
    return {"entropy_error": worst, "hidden_gradient_error": relative[0], "weight_gradient_error": relative[1]}


def _print(report: dict) -> None:
    about, shape = report["machine"], report["shape"]
    print(f"{shape['tokens']} tokens, {shape['vocab']} x {shape['width']} {shape['dtype']}, {about['threads']} threads",
          about["cpu"], f"{about['isa']} kernels", f"torch {about['torch']}", sep=", ")  # fmt: skip
    print(f"forward+backward, {report['clock']}; all logits are {report['logits_bytes'] / 2**20:,.0f} MiB")
    header = ["", "median ms", "min-max ms", "x token_stats", "range", "MiB", "kept", "entropy", "d hidden", "d weight"]
    lines = [
        [
            row["name"],
            f"{row['median_ms']:.0f}",
            f"{row['min_ms']:.0f}-{row['max_ms']:.0f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['min']:.2f}-{row['ratio']['max']:.2f}",
            f"{row['peak_bytes_beyond_gradients'] / 2**20:,.0f}",
            f"{row['bytes_kept_for_backward'] / 2**20:,.0f}",
            *(f"{row[f'{what}_error']:.1e}" for what in ("entropy", "hidden_gradient", "weight_gradient")),
        ]
        for row in report["times"]
    ]
    print_table(header, lines)
    print("MiB: most that torch's allocator held beyond the two gradients; kept: what it held between forward and")
    print("backward, outputs included. Errors against float64 of the same inputs, gradients relative in norm, on")
    print(f"{CHECKED_TOKENS} tokens.")
