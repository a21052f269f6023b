"""token_stats against the formula written the usual way in torch, eager and compiled: time, bytes, memory, error.

And the host time of every public op (host_time.py). With --rivals also what verl's FSDP engine does, by its published
code. `python -m benchmarks rivals FOLDER` downloads it.

All run in one process on the same logits, in turn, repetition by repetition. Memory is measured in processes of their
own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import host_time, measure
from benchmarks.measure import (
    DTYPES,
    interleaved_seconds,
    kept_bytes,
    peak_allocated_bytes,
    peak_resident_bytes,
    print_table,
)
from entcov.ops.core import isa
from entcov.stats.token_stats import token_stats
from entcov.verify import reference

ENTROPY_COEF = 0.01
CHECKED_ROWS = 16  # of each result are compared with float64
RIVALS = ("verl FSDP", "verl FSDP, padded")  # of benchmarks.gpu.rivals
MANY_TOKENS = (2**18, 64)  # shape for resident memory: with so many tokens pages and fixed buffers do not count


def usual(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The usual code. Bytes moved for each 2-byte logit, op by op: float 2+4, log_softmax 4+4, exp 4+4,
    mul 8+4, sum 4: 38. Backward: two muls 24, exp 12, adding the two 12, gather 4+12, log_softmax 12, cast 6: 82."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    logprob = log_p.gather(-1, target[:, None])[:, 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def ours(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    stats = token_stats(logits, target)
    return stats.logprob, stats.entropy


def usual_clamped(logits: Tensor, target: Tensor, clamp_p: float) -> tuple[Tensor, Tensor]:
    """logprob and clamped entropy, through topk on the logits' device; AEnt's own code selects on the CPU."""
    columns = logits.shape[-1]
    logprob = torch.log_softmax(logits.float(), dim=-1).gather(-1, target[:, None])[:, 0]
    log_p = torch.log_softmax(logits.topk(columns - int(columns * clamp_p), sorted=False).values.float(), dim=-1)
    return logprob, -(log_p.exp() * log_p).sum(-1)


def ours_clamped(logits: Tensor, target: Tensor, clamp_p: float) -> tuple[Tensor, Tensor]:
    stats = token_stats(logits, target, clamp_p=clamp_p)
    return stats.logprob, stats.clamped_entropy


def backward_of(function):
    def call(logits: Tensor, target: Tensor, *rest) -> Tensor:
        leaf = logits.detach().requires_grad_()
        logprob, entropy = function(leaf, target, *rest)
        (-logprob.sum() - ENTROPY_COEF * entropy.sum()).backward()
        return leaf.grad

    return call


def bytes_per_logit(size: int, name: str, backward: bool) -> int | None:
    """Bytes that the algorithm has to move for a logit of this size; None: not counted."""
    if name == "entcov":
        return 3 * size if backward else size  # read once; then read once and write once
    if name == "eager":  # the docstring of `usual`; a cast of fp32 to itself moves nothing
        cast = size + 4 if size < 4 else 0
        return 32 + cast + (76 + cast if backward else 0)
    return None  # fused by the compiler


def make_input(args) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.empty(args.tokens, args.vocab, dtype=DTYPES[args.dtype])
    for row in logits:  # row by row, so that the allocator keeps no large blocks afterwards
        row.copy_(2.5 * torch.randn(args.vocab))
    return logits, torch.randint(0, args.vocab, (args.tokens,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--clamp-p", type=float, default=None, help="also time the clamped entropy (eager only: topk)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    measure.add_arguments(parser, repeats=7)
    parser.add_argument("--rivals", type=Path, default=None, help="folder with the rivals' wheels")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    measure.set_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rivals = on_this_cpu(RIVALS, "token_stats", args.rivals, Path(scratch))
        if args.memory_of:
            print(json.dumps(_memory(args, {"entcov": ours, "eager": usual, **rivals}[args.memory_of])))
        else:
            _report(args, rivals)
    return 0


def on_this_cpu(names: Sequence[str], workload: str, folder: Path | None, scratch: Path) -> dict[str, Callable]:
    """The rivals of benchmarks.gpu.rivals whose archives are in the folder: functions -> (logprob, entropy)."""
    if folder is None:
        return {}
    from benchmarks.gpu import rivals  # imports what the GPU run needs

    def pair(function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = function(*inputs)
        return outputs["logprob"], outputs["entropy"]

    found = {}
    for name in names:
        if reason := rivals.missing(rivals.RIVALS[name], folder):
            print(f"{name}: {reason}", file=sys.stderr)
        else:
            contender = rivals.prepare(name, folder, scratch, "cpu")
            found[f"{name} ({contender.source.split('-py')[0]})"] = partial(pair, contender.functions[workload])
    return found


def _report(args, rivals: dict[str, Callable]) -> None:
    logits, target = make_input(args)
    functions = {"entcov": ours, "eager": usual, **rivals}
    if not args.no_compile:
        functions["torch.compile"] = torch.compile(usual)
    report = {
        "machine": {**measure.machine(), "isa": isa(), "threads": torch.get_num_threads()},
        "shape": {"tokens": args.tokens, "vocab": args.vocab, "dtype": args.dtype},
        "times": _time_all(args, functions, logits, target),
    }
    report["errors"] = _errors(functions, logits, target)
    del logits, target
    report["memory"] = {name: _memory_in_process(args, name) for name in functions if name != "torch.compile"}
    report["host_us"] = host_time.measure()
    _print(report)
    measure.keep(report, args.json)


def _time_all(args, functions, logits, target) -> list[dict]:
    passes = {
        "forward": {n: partial(f, logits, target) for n, f in functions.items()},
        "forward+backward": {n: partial(backward_of(f), logits, target) for n, f in functions.items()},
    }
    if args.clamp_p is not None:
        clamped = {"entcov": ours_clamped, "eager": usual_clamped}
        passes["clamped forward"] = {n: partial(f, logits, target, args.clamp_p) for n, f in clamped.items()}
        passes["clamped forward+backward"] = {
            n: partial(backward_of(f), logits, target, args.clamp_p) for n, f in clamped.items()
        }
    rows = []
    for label, calls in passes.items():
        with torch.set_grad_enabled("backward" in label):
            seconds = interleaved_seconds(calls, args.repeats)
        for name, times in seconds.items():
            moved = None if "clamped" in label else bytes_per_logit(logits.dtype.itemsize, name, "backward" in label)
            row = {"pass": label, "name": name, **measure.times_of(times, seconds["entcov"]), "bytes_per_logit": moved}
            rows.append(row | {"gb_per_s": moved and moved * logits.numel() / row["median_ms"] / 1e6})
    return rows


def _errors(functions, logits, target) -> dict[str, dict[str, float]]:
    """Largest error of each implementation against float64 on the first rows, in this run."""
    rows, tokens = logits[:CHECKED_ROWS].clone(), target[:CHECKED_ROWS]
    leaf = rows.double().requires_grad_()
    expected = reference.token_stats(leaf, tokens)
    loss = -expected["logprob"].sum() - ENTROPY_COEF * expected["entropy"].sum()
    (wanted,) = torch.autograd.grad(loss, leaf)
    errors = {}
    for name, function in functions.items():
        grad = backward_of(function)(rows, tokens)
        with torch.no_grad():
            logprob, entropy = function(rows, tokens)
            errors[name] = {
                "logprob": float((logprob.double() - expected["logprob"]).abs().max()),
                "entropy": float((entropy.double() - expected["entropy"]).abs().max()),
                "gradient": float((grad.double() - wanted).abs().max()),
            }
    return errors


def _memory(args, function) -> dict[str, float]:
    """Bytes a token beyond the gradient, forward and backward, of one implementation in this fresh process.

    "kept": what is held between forward and backward beyond the logits, outputs included."""
    call = backward_of(function)
    logits, target = make_input(args)
    call(logits[:1, : MANY_TOKENS[1]], target[:1] % MANY_TOKENS[1])  # what only the first call allocates
    many = torch.randn(MANY_TOKENS, dtype=torch.float32).to(logits.dtype)
    zeros = torch.zeros(len(many), dtype=torch.int64)
    resident = peak_resident_bytes(lambda: call(many, zeros)) - many.nbytes
    allocated = peak_allocated_bytes(lambda: call(logits, target)) - logits.nbytes
    kept = kept_bytes(lambda: function(logits.requires_grad_(), target))
    return {"allocated": allocated / len(logits), "resident": resident / len(many), "kept": kept / len(logits)}


def _memory_in_process(args, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks", "ops", "--memory-of", name, "--tokens", str(args.tokens)]
    command += ["--vocab", str(args.vocab), "--dtype", args.dtype, "--threads", str(torch.get_num_threads())]
    command += ["--rivals", str(args.rivals)] if args.rivals else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory measurement failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _print(report: dict) -> None:
    about, shape = report["machine"], report["shape"]
    print(f"{shape['tokens']} x {shape['vocab']} {shape['dtype']}, {about['threads']} threads, {about['cpu']}, "
          f"{about['isa']} kernels, torch {about['torch']}")  # fmt: skip
    header = ["pass", "", "median ms", "min-max ms", "x entcov", "range", "B/logit", "GB/s"]
    lines = []
    for row in report["times"]:
        r = row["ratio"]
        known = row["bytes_per_logit"] is not None
        lines.append([
            row["pass"],
            row["name"],
            f"{row['median_ms']:.1f}",
            f"{row['min_ms']:.1f}-{row['max_ms']:.1f}",
            f"{r['median']:.1f}",
            f"{r['min']:.1f}-{r['max']:.1f}",
            str(row["bytes_per_logit"]) if known else "-",
            f"{row['gb_per_s']:.1f}" if known else "-",
        ])  # fmt: skip
    print_table(header, lines)
    print(f"\nlargest error against float64 in this run ({CHECKED_ROWS} rows)")
    print_table(["", "logprob", "entropy", "gradient"],
           [[name, *(f"{x:.1e}" for x in errors.values())] for name, errors in report["errors"].items()])  # fmt: skip
    T, V = MANY_TOKENS
    print(
        "\nmemory of forward+backward beyond the gradient, bytes a token (a fresh process each); kept: by the first's"
    )
    print("allocator between forward and backward, without the logits themselves")
    print_table(
        ["", f"torch's allocator, {shape['tokens']} x {shape['vocab']}", f"resident (VmHWM), {T} x {V}", "kept"],
        [[name, *(f"{m[k]:,.1f}" for k in ("allocated", "resident", "kept"))] for name, m in report["memory"].items()],
    )
    shape = f"[{host_time.TOKENS}, {host_time.COLUMNS}]"
    print(f"\nhost time of one call on {shape}, one thread, microseconds (10th percentile)")
    print_table(*host_time.table(report["host_us"]))
