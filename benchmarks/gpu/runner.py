"""The stages of `python -m benchmarks gpu` in their order, and what is written after each."""

import argparse
import importlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.cuda_toolchain import ROOT
from benchmarks.gpu import checks, report
from benchmarks.gpu.stages import FAILED, PARTIAL, Context, Stage, execute

RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def late(function: str) -> Callable[[Context, float], dict]:
    """A stage of measurements.py, which imports entcov and so can only be imported when that is built."""

    def run(context: Context, seconds: float) -> dict:
        importlib.invalidate_caches()
        return getattr(importlib.import_module("benchmarks.gpu.measurements"), function)(context, seconds)

    return run


# Seconds of each: together a little more than the whole run may take, because none needs all of its own.
STAGES = [
    Stage("environment", 20, checks.environment),
    Stage("build", 90, checks.build),
    Stage("device tests", 60, checks.device_tests),
    Stage("benchmarks", 110, late("ours")),
    Stage("op tests", 90, checks.op_tests),
    Stage("selection", 20, late("selection")),
    Stage("sanitizer", 90, checks.sanitizer),
    Stage("rivals", 200, late("rivals")),  # last: what time is left
]


def run(args: argparse.Namespace) -> int:
    names = [stage.name for stage in STAGES]
    if unknown := set(args.only or []) - set(names):
        print(f"gpu: --only must name stages ({', '.join(names)}), got {', '.join(sorted(unknown))}")
        return 2
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch sees no GPU here. Rehearse the run on this machine with --rehearse.")
        return 1
    if args.rivals and not args.rivals.is_dir():
        print(f"gpu: --rivals must be a folder (`python -m benchmarks rivals FOLDER` makes one), got {args.rivals}")
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.rehearse else "cuda"
    rivals = args.rivals and args.rivals.resolve()
    context = Context(out, device, rivals, time.monotonic() + args.seconds, args.commit or commit())
    for stage in STAGES:
        if args.only and stage.name not in (*args.only, "environment"):
            continue
        print(f"{stage.name} ...", flush=True)
        found = context.results[stage.name] = execute(stage, context)
        print(
            f"  {found['status']} in {found['seconds']:.0f} s" + (f": {found['reason']}" if "reason" in found else "")
        )
        write(context)
    print("\n" + "\n".join(report.text(context)))
    return int(any(found["status"] in (FAILED, PARTIAL) for found in context.results.values()))


def write(context: Context) -> None:
    """results.json and RESULTS.md of the run so far; a real run also renews benchmarks/RESULTS.md."""
    partial = context.out / "results.json.partial"
    partial.write_text(json.dumps(report.document(context), indent=1) + "\n")
    partial.replace(context.out / "results.json")
    renewed = report.renew(RESULTS.read_text(), context)
    (context.out / "RESULTS.md").write_text(renewed)
    if not context.rehearsal:
        RESULTS.write_text(renewed)


def commit() -> str:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return "unknown (no git repository)"
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True
    )
    return (head.stdout.strip() or "unknown") + (" with changes" if changed.stdout.strip() else "")
