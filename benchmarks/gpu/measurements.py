"""The stages that measure: ceilings, entcov and torch, then the rivals. Each contender has a process of its own."""

import json
import sys
import time

from benchmarks.gpu import rivals as known_rivals
from benchmarks.gpu.report import NOT_REACHED
from benchmarks.gpu.stages import FAILED, PARTIAL, PASSED, SKIPPED, Context, command

START_UP = 12  # seconds that a process may take to begin and to end, beside those it measures in
# Seconds of every 320 that each of them has. Seconds that one does not use go to those after it.
OWN_SHARES = {"ceilings": 25, "entcov": 95, "entcov, chunks": 25, "entcov, token_stats": 25, "eager torch": 60,
              "torch.compile": 90}  # fmt: skip
PROMISED_ERROR = 1e-5  # of logprob and entropy, absolute; the rounding of a value of 12 to fp32 comes on top


def ours(context: Context, seconds: float) -> dict:
    """The ceilings of this GPU, entcov, eager torch and torch.compile."""
    found = _measure(context, seconds, OWN_SHARES)
    entcov = [r for r in found["measurements"] if r["contender"] == "entcov"]
    wrong = [
        f"{name} of {r['workload']}, {r['columns']} columns {r['dtype']}: error {r['errors'][name]}"
        for r in entcov
        if r.get("workload") in ("token_stats", "clamped_entropy") and "errors" in r
        for name in ("logprob", "entropy", "clamped_entropy")
        if not _within(r["errors"].get(name, 0.0), PROMISED_ERROR + 1.2e-7 * 20)
    ]
    failed = [r["failure"] for r in entcov if "failure" in r and not r["failure"].startswith(NOT_REACHED)]
    if wrong or failed or not entcov:
        reason = "; ".join(dict.fromkeys(wrong + failed)) or found.get("reason", "entcov was not measured")
        return {**found, "status": FAILED, "reason": reason}
    return found


def _within(error: float | str, bound: float) -> bool:
    return isinstance(error, float) and error <= bound


def selection(context: Context, seconds: float) -> dict:
    """Clip-Cov's and KL-Cov's selections over many tokens, against nonzero, randperm and topk."""
    sizes = ["1000"] if context.rehearsal else [str(2**n) for n in (17, 20, 22)]
    results = context.scratch / "selection.json"
    arguments = [sys.executable, "-m", "benchmarks", "selection", "--device", context.device, "--json", results]
    done = command([*arguments, "--tokens", *sizes], context.log("selection"), seconds)
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
    return _measure(context, seconds, dict.fromkeys(ready, 1), absent)


def _measure(context: Context, seconds: float, shares: dict[str, float], absent: list[dict] | None = None) -> dict:
    """Runs the workers one after the other, each with its share of the time that is left. `absent`: those not here."""
    until = time.monotonic() + seconds
    records, unfinished = [], []

    def found() -> dict:
        late = sum(r.get("failure", "").startswith(NOT_REACHED) for r in records)
        reasons = [*unfinished, *([f"{late} shapes or contenders were not reached in time"] if late else [])]
        return {
            "status": PARTIAL if reasons else PASSED,
            **({"reason": "; ".join(reasons)} if reasons else {}),
            "ceilings": [r for r in records if "ceiling" in r],
            "measurements": [r for r in records if "ceiling" not in r] + (absent or []),
        }

    names = list(shares)
    for n, name in enumerate(names):
        left = until - time.monotonic()
        share = left * shares[name] / sum(shares[other] for other in names[n:])
        if share < START_UP / 2:
            records.append({"contender": name, "failure": f"{NOT_REACHED}: {max(share, 0):.0f} s left for it"})
            continue
        arguments = [sys.executable, "-m", "benchmarks.gpu.worker", name, "--device", context.device]
        arguments += ["--seconds", f"{max(share - START_UP, 1):.1f}"]
        if context.rivals:
            arguments += ["--rivals", context.rivals]
        done = command(arguments, context.log(f"worker {name}"), share)
        mine = read_records(done.output)
        records += mine
        if done.code is None:
            records.append({"contender": name, "failure": f"{NOT_REACHED}: {done.why(share)[:400]}"})
        elif done.code != 0 or not mine:
            unfinished.append(f"{name}: {done.why(share)[:400]}")
            records.append({"contender": name, "failure": done.why(share)[:400]})
        context.keep(found())
    return found()


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
