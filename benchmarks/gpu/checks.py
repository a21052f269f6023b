"""The stages that ask whether the kernels are right: environment, build, tests on the device, sanitizer."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks import cuda_toolchain
from benchmarks.gpu.stages import FAILED, PARTIAL, PASSED, SKIPPED, Context, command, finish, start

# Tests of the ops that a GPU has kernels for; each moves its tensors there (tests/on_device.py).
OP_TESTS = ("test_row_stats", "test_logits_grad", "test_covariance_stats", "test_token_stats", "test_logit_covariance")
REHEARSED_TESTS = ("test_covariance_stats",)
DEVICE_TESTS = ("test_gpu", "test_gpu_sharded", "test_gpu_linear", "test_gpu_selection")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def environment(context: Context, seconds: float) -> dict:
    """What machine this is, and which tools it has."""
    found = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": context.commit,
        "rivals": sorted(p.name for p in context.rivals.iterdir()) if context.rivals else [],
    }
    for module in ("triton", "pytest"):
        found[module] = _version_of(module)
    if context.rehearsal:
        return {**found, "status": PASSED, "device": "CPU rehearsal"}
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    smi = ""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
        smi = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        **found,
        "status": PASSED,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": smi.split(",")[0].strip() or "unknown",
        "limits": smi,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": next(map(cuda_toolchain.version, cuda_toolchain.candidates("nvcc")), None),
        "sanitizer": bool(cuda_toolchain.candidates("compute-sanitizer")),
    }


def _version_of(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def build(context: Context, seconds: float) -> dict:
    """Both extensions in place, the kernels for this GPU only."""
    if context.rehearsal:  # the C++ core is there, or nothing could be imported; a rebuild would disturb who uses it
        from entcov import _cpu

        return {"status": SKIPPED, "reason": f"a rehearsal uses the extension that is built: {_cpu.__name__}"}
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    done = command(
        [sys.executable, "setup.py", "build_ext", "--inplace"], context.out / "build.log", seconds,
        ENTCOV_CUDA="1", ENTCOV_CUDA_ARCHS=architecture,
    )  # fmt: skip
    if done.code != 0:
        return {"status": FAILED, "reason": done.why(seconds)}
    check = [sys.executable, "-c", "from entcov import _cuda, ops; print(_cuda.__file__)"]
    loaded = command(check, context.out / "import.log", 60)
    return {"status": loaded.verdict, **({} if loaded.code == 0 else {"reason": loaded.why(60)})}


def device_tests(context: Context, seconds: float) -> dict:
    """Tests of what only a GPU has: graphs, streams, synchronisation, allocations, large offsets. Each file has a
    process of its own, side by side: what hangs, or leaves its process no usable GPU, costs no other file's results."""
    files = [[name] for name in DEVICE_TESTS]
    return _pytest(context, seconds, [list(DEVICE_TESTS)] if context.rehearsal else files)


def op_tests(context: Context, seconds: float) -> dict:
    """The tests of the ops with their tensors on the device."""
    if context.rehearsal:
        return _pytest(context, seconds, [list(REHEARSED_TESTS)])
    return _pytest(context, seconds, [list(OP_TESTS)], workers=min(8, os.cpu_count() or 1))


def _pytest(context: Context, seconds: float, groups: list[list[str]], workers: int = 0) -> dict:
    """Runs groups of test files on the device, each group in a process of its own, at the same time."""
    until = time.monotonic() + seconds
    running = []
    for names in groups:
        report, log = (context.out / f"{names[0]}.{suffix}" for suffix in ("xml", "log"))
        report.unlink(missing_ok=True)
        arguments = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", f"--junitxml={report}"]
        arguments += [f"tests/{name}.py" for name in names]
        if workers > 1 and _version_of("xdist"):
            arguments += ["-n", str(workers)]
        running.append((names[0], report, log, start(arguments, log, ENTCOV_TEST_DEVICE=context.device)))
    found = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    reasons = []
    for name, report, log, process in running:
        done = finish(process, log, until)
        mine = read_junit(report) if report.exists() else {}
        found = {key: value + mine.get(key, type(value)()) for key, value in found.items()}
        if done.code != 0 or not mine.get("passed"):
            reasons.append(f"{name}: " + ("; ".join(mine.get("failures", [])[:20]) or done.why(seconds)))
    return {"status": FAILED if reasons else PASSED, **found, **({"reason": "; ".join(reasons)} if reasons else {})}


def read_junit(report: Path) -> dict:
    """How many passed, failed and were skipped, and the names and messages of those that failed."""
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            message = (problem.get("message") or "").splitlines()
            failures.append(f"{case.get('name')}: {message[0][:300] if message else ''}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def sanitizer(context: Context, seconds: float) -> dict:
    """Every op at small shapes under compute-sanitizer's four tools, side by side. Our kernels have to be clean; what
    it says of others' is counted too."""
    target = [sys.executable, "-m", "benchmarks.gpu.sanitizer_target", "--device", context.device]
    if context.rehearsal:
        done = command(target, context.out / "sanitizer_target.log", seconds)
        reason = "no sanitizer in a rehearsal; its program ran" if done.code == 0 else done.why(seconds)
        return {"status": SKIPPED if done.code == 0 else FAILED, "reason": reason}
    program = next(iter(cuda_toolchain.candidates("compute-sanitizer")), None)
    if program is None:
        return {"status": SKIPPED, "reason": "no compute-sanitizer on this machine"}
    until = time.monotonic() + seconds
    running = {}
    for tool in TOOLS:
        log = context.out / f"{tool}.log"
        # Without torch's cache every tensor is an allocation of its own, so that its ends are known.
        running[tool] = log, start([program, "--tool", tool, *target], log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    tools = {}
    for tool, (log, process) in running.items():
        done = finish(process, log, until)
        tools[tool] = read_sanitizer(done.output, done.code)
    bad = [f"{tool}: {t['reason']}" for tool, t in tools.items() if t["status"] != PASSED]
    worst = FAILED if any(t["status"] == FAILED for t in tools.values()) else PARTIAL if bad else PASSED
    return {"status": worst, "tools": tools, **({"reason": "; ".join(bad)} if bad else {})}


def read_sanitizer(output: str, code: int | None) -> dict:
    """Findings of one tool: how many errors in all, and how many of its messages name a kernel of entcov."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    ours = len(re.findall(r"^=+ .*entcov::cuda", output, re.MULTILINE))
    errors = int(summary[1]) if summary else None
    if "sanitizer target: all ops ran" not in output or summary is None:
        stopped = "ran out of time" if code is None else f"exit code {code}"
        return {"status": PARTIAL if code is None else FAILED, "errors": errors, "in_entcov": ours,
                "reason": f"did not finish ({stopped}): {output.strip()[-400:]}"}  # fmt: skip
    if ours:
        return {"status": FAILED, "errors": errors, "in_entcov": ours, "reason": f"{ours} findings in our kernels"}
    return {"status": PASSED, "errors": errors, "in_entcov": 0}
