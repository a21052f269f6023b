"""The stages of `python -m benchmarks gpu` in their order, and what is written after each."""

import argparse
import hashlib
import importlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cuda_toolchain import ROOT
from benchmarks.gpu import checks, report, results, training
from benchmarks.gpu.stages import FAILED, PARTIAL, Context, Stage, execute, limit

DOCUMENT = ROOT / "benchmarks" / "RESULTS.md"
SOURCES = ("csrc", "entcov", "megatron_integration", "benchmarks", "tests", "setup.py")


def late(function: str) -> Callable[[Context, float], dict]:
    """A stage of measurements.py, which imports entcov and is therefore imported after the build."""

    def run(context: Context, seconds: float) -> dict:
        importlib.invalidate_caches()
        return getattr(importlib.import_module("benchmarks.gpu.measurements"), function)(context, seconds)

    return run


# With the seconds of stages.Stage. The first two run in every command: the machine may have nothing built.
ALWAYS = [Stage("environment", 20, checks.environment), Stage("build", 90, checks.build)]
STAGES = [
    *ALWAYS,
    Stage("device tests", 120, checks.device_tests),
    Stage("op tests", 110, checks.op_tests),
    Stage("sanitizer", 120, checks.sanitizer),
    Stage("benchmarks", 320, late("ours")),
    Stage("selection", 40, late("selection")),
    Stage("training", 50, training.torch_actor),
    Stage("megatron", 50, training.megatron_actor),
    Stage("rivals", 270, late("rivals")),
]


def run(args: argparse.Namespace) -> int:
    names = [stage.name for stage in STAGES]
    if unknown := set(args.only or []) - set(names):
        print(f"gpu: --only must name stages ({', '.join(names)}), got {', '.join(sorted(unknown))}")
        return 2
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu: torch sees no GPU here. Rehearse the run on this machine with --rehearse.")
        return 1
    for option, folder, maker in (
        ("--rivals", args.rivals, "`python -m benchmarks rivals FOLDER` makes one"),
        ("--wheels", args.wheels, "docs/gpu.md says how to fill one"),
    ):
        if folder and not folder.is_dir():
            print(f"gpu: {option} must be a folder ({maker}), got {folder}")
            return 2
    out = args.out.resolve()
    try:
        earlier = [run for file in (out / results.RESULTS, args.merge) if file and (file.exists() or file == args.merge)
                   for run in results.load(file)]  # fmt: skip
    except ValueError as error:
        print(f"gpu: {error}")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="entcov-gpu-") as scratch:
        return _run(args, out, Path(scratch), results.merged(sorted(earlier, key=lambda run: run["ended"])))


def _run(args: argparse.Namespace, out: Path, scratch: Path, earlier: list[dict]) -> int:
    chosen = [stage for stage in STAGES if not args.only or stage in ALWAYS or stage.name in args.only]
    seconds = args.seconds or sum(stage.seconds for stage in chosen)
    rivals, wheels = (folder and folder.resolve() for folder in (args.rivals, args.wheels))
    context = Context(
        out, scratch, "cpu" if args.rehearse else "cuda", rivals, wheels, time.monotonic() + seconds,
        args.commit or commit(),
    )  # fmt: skip
    results.take_up_logs(context)
    for n, stage in enumerate(chosen):
        print(f"{stage.name} ...", flush=True)

        def keep(found: dict, stage=stage) -> None:  # so that a command that is killed leaves part of a long stage
            context.results[stage.name] = {**found, "status": PARTIAL, "reason": "was not finished", "seconds": 0.0}
            results.write(context, earlier, DOCUMENT)

        context.keep = keep
        found = execute(stage, context, limit(chosen[n:], context.deadline - time.monotonic()))
        context.results[stage.name] = found
        print(
            f"  {found['status']} in {found['seconds']:.0f} s" + (f": {found['reason']}" if "reason" in found else ""),
            flush=True,
        )
        results.write(context, earlier, DOCUMENT)
    print("\n" + "\n".join(report.entry(results.merged([*earlier, results.of(context)]))))
    return int(any(found["status"] in (FAILED, PARTIAL) for found in context.results.values()))


def commit() -> str:
    """The commit; without a git repository, or with changes in it, also a hash of the sources."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return f"unknown, {fingerprint()}"
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", *SOURCES], cwd=ROOT, capture_output=True, text=True
    )
    clean = head.returncode == 0 and changed.returncode == 0 and not changed.stdout.strip()
    return head.stdout.strip() if clean else f"{head.stdout.strip() or 'unknown'} with changes, {fingerprint()}"


def fingerprint(root: Path = ROOT) -> str:
    """A hash of the sources, without files that a build or a run creates."""
    digest = hashlib.sha256()
    for name in SOURCES:
        paths = [root / name] if (root / name).is_file() else sorted((root / name).rglob("*"))
        for path in paths:
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"sources {digest.hexdigest()[:12]}"
