"""The stages that measure: ceilings, entcov and torch; then the rivals. Each contender has a process of its own."""

import json
import sys
import time

from benchmarks.gpu import contenders
from benchmarks.gpu import rivals as known_rivals
from benchmarks.gpu.stages import FAILED, PARTIAL, PASSED, SKIPPED, Context, command

START_UP = 10  # seconds that a process may take to begin and to end, beside those it measures in
PROMISED_ERROR = 1e-5  # of logprob and entropy, absolute; a value of 12 also carries its own rounding to fp32


def ours(context: Context, seconds: float) -> dict:
    """The ceilings of this GPU, entcov, eager torch and torch.compile."""
    found = _measure(context, seconds, ["ceilings", *contenders.OWN])
    wrong = [
        f"{name} of {r['workload']}, {r['columns']} columns {r['dtype']}: error {r['errors'][name]}"
        for r in found["measurements"]
        if r["contender"] == "entcov" and r.get("workload") in ("token_stats", "clamped_entropy") and "errors" in r
        for name in ("logprob", "entropy", "clamped_entropy")
        if not _within(r["errors"].get(name, 0.0), PROMISED_ERROR + 1.2e-7 * 20)
    ]
    failed = [r["failure"] for r in found["measurements"] if r.get("contender") == "entcov" and "failure" in r]
    if wrong or failed or not any(r["contender"] == "entcov" for r in found["measurements"]):
        reason = "; ".join(dict.fromkeys(wrong + failed)) or found.get("reason", "entcov was not measured")
        return {**found, "status": FAILED, "reason": reason}
    return found


def _within(error: float | str, bound: float) -> bool:
    return isinstance(error, float) and error <= bound


def selection(context: Context, seconds: float) -> dict:
    """Clip-Cov's and KL-Cov's selections over many tokens, against nonzero, randperm and topk."""
    sizes = ["1000"] if context.rehearsal else [str(2**n) for n in (17, 20, 22)]
    results = context.out / "selection.json"
    arguments = [sys.executable, "-m", "benchmarks", "selection", "--device", context.device, "--json", results]
    done = command([*arguments, "--tokens", *sizes], context.out / "selection.log", seconds)
    if done.code != 0:
        return {"status": done.verdict, "reason": done.why(seconds)}
    return {"status": PASSED, "selections": json.loads(results.read_text())["rows"]}


def rivals(context: Context, seconds: float) -> dict:
    """Every rival whose archive is there. One that fails or is wrong is reported; that is no failure of this stage."""
    reasons = {name: known_rivals.missing(rival, context.rivals) for name, rival in known_rivals.RIVALS.items()}
    ready = [name for name, reason in reasons.items() if reason is None]
    absent = [{"contender": name, "failure": reason} for name, reason in reasons.items() if reason is not None]
    if not ready:
        return {"status": SKIPPED, "reason": "no --rivals folder, or nothing in it", "measurements": absent}
    found = _measure(context, seconds, ready)
    return {**found, "measurements": found["measurements"] + absent}


def _measure(context: Context, seconds: float, names: list[str]) -> dict:
    """Runs the workers one after the other, none with more than one and a half times its share of what is left."""
    until = time.monotonic() + seconds
    records, unfinished = [], []
    for n, name in enumerate(names):
        left = until - time.monotonic()
        if left < START_UP / 2:
            unfinished.append(f"{name}: no time left")
            records.append({"contender": name, "failure": "no time left"})
            continue
        share = min(left, max(2 * START_UP, 1.5 * left / (len(names) - n)))
        arguments = [sys.executable, "-m", "benchmarks.gpu.worker", name, "--device", context.device]
        arguments += ["--seconds", f"{max(share - START_UP, 1):.1f}"]
        if context.rivals:
            arguments += ["--rivals", context.rivals]
        done = command(arguments, context.out / f"worker {name}.log", share)
        mine = read_records(done.output)
        records += mine
        if done.code != 0 or not mine:
            unfinished.append(f"{name}: {done.why(share)[:400]}")
            records.append({"contender": name, "failure": done.why(share)[:400]})
    status = PARTIAL if unfinished else PASSED
    return {
        "status": status,
        **({"reason": "; ".join(unfinished)} if unfinished else {}),
        "ceilings": [r for r in records if "ceiling" in r],
        "measurements": [r for r in records if "ceiling" not in r],
    }


def read_records(output: str) -> list[dict]:
    """The JSON lines among what a worker printed (libraries print other things)."""
    records = []
    for line in output.splitlines():
        if line.startswith('{"'):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # cut off when the process was stopped
                continue
    return records
