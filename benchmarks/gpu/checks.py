"""The stages that test the kernels: environment, build, tests on the device, sanitizer."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import torch

from benchmarks import cuda_toolchain
from benchmarks.gpu import outcomes
from benchmarks.gpu.stages import FAILED, PARTIAL, PASSED, SKIPPED, Context, command, cores, finish, start

# Tests of the ops that a GPU has kernels for; each moves its tensors there (tests/support/on_device.py).
OP_TESTS = ("ops/test_row_stats", "ops/test_logits_grad", "ops/test_covariance_stats", "stats/test_token_stats",
            "stats/test_logit_covariance")  # fmt: skip
# Tests of a rehearsal: one kind of row or one dtype of each, because the CPU's own tests check all of them.
REHEARSED = "not against_float64 or gaussian or (dtype0 and not test_token_stats)"
REHEARSED_TESTS, REHEARSED_OPS = ("ops/test_covariance_stats",), "dtype0 or nan"
DEVICE_TESTS = ("gpu/test_public_functions", "gpu/test_sharded", "gpu/test_linear_token_stats", "gpu/test_selection")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PACKAGES = ("triton", "pytest", "pytest-xdist", "setuptools", "pybind11", "transformers", "megatron-core", "matplotlib")


def environment(context: Context, seconds: float) -> dict:
    """The machine and its tools. Wheels that were brought along are put on the path of all later commands."""
    wheels = install_wheels(context, seconds) if context.wheels else {"status": PASSED}
    found = {
        **wheels,
        "device": "CPU rehearsal",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": context.commit,
        "cores": cores(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "rivals": sorted(p.name for p in context.rivals.iterdir()) if context.rivals else [],
    }
    if context.rehearsal:
        return found
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    smi = ""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
        smi = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        **found,
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


def install_wheels(context: Context, seconds: float) -> dict:
    """Unpacks the wheels into a folder of this run, the first on the path of every command from now on."""
    site, wheels = context.scratch / "site", sorted(context.wheels.glob("*.whl"))
    done = command(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir",
         "--disable-pip-version-check", "--upgrade", "--target", site, *wheels],
        context.log("wheels"), seconds,
    )  # fmt: skip
    if done.code != 0:
        return {"status": FAILED, "reason": f"the wheels of {context.wheels} cannot be installed: {done.why(seconds)}"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, str(site))  # for the versions of PACKAGES
    return {"status": PASSED, "wheels": [wheel.name for wheel in wheels]}


def _version_of(package: str) -> str | None:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return None


def build(context: Context, seconds: float) -> dict:
    """Both extensions in place, the kernels for this GPU only."""
    if context.rehearsal:  # the C++ core is built already, and other processes may use it
        from entcov import _cpu

        return {"status": SKIPPED, "reason": f"a rehearsal uses the extension that is built: {_cpu.__name__}"}
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    done = command(
        [sys.executable, "setup.py", "build_ext", "--inplace"], context.log("build"), seconds,
        ENTCOV_CUDA="1", ENTCOV_CUDA_ARCHS=architecture,
    )  # fmt: skip
    if done.code != 0:
        return {"status": FAILED, "reason": done.why(seconds)}
    check = [sys.executable, "-c", "from entcov.ops.core import KERNELS; print(KERNELS['cuda'].__file__)"]
    loaded = command(check, context.log("import"), 60)
    return {"status": loaded.verdict, **({} if loaded.code == 0 else {"reason": loaded.why(60)})}


def device_tests(context: Context, seconds: float) -> dict:
    """Tests of graphs, streams, synchronisation, allocations and large offsets, which only a GPU has. The files run at
    the same time, each in its own process: a test that hangs or makes the GPU unusable ends its own file alone."""
    files = [[name] for name in DEVICE_TESTS]
    if context.rehearsal:
        return _pytest(context, seconds, [list(DEVICE_TESTS)], only=REHEARSED)
    return _pytest(context, seconds, files)


def op_tests(context: Context, seconds: float) -> dict:
    """The tests of the ops with their tensors on the device."""
    if context.rehearsal:
        return _pytest(context, seconds, [list(REHEARSED_TESTS)], only=REHEARSED_OPS)
    return _pytest(context, seconds, [list(OP_TESTS)], workers=min(8, cores()))


def _pytest(
    context: Context, seconds: float, groups: list[list[str]], workers: int = 1, only: str | None = None
) -> dict:
    """Runs groups of test files on the device, each group in a process of its own, at the same time. only: for -k."""
    until = time.monotonic() + seconds
    workers = workers if _version_of("pytest-xdist") else 1
    running = []
    for names in groups:
        name = names[0].replace("/", "_")
        written, log = context.scratch / f"{name}.outcomes", context.log(name)
        arguments = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider"]
        arguments += ["-p", outcomes.__name__, "--outcomes", written, *(f"tests/{name}.py" for name in names)]
        if only:
            arguments += ["-k", only]
        if workers > 1:
            arguments += ["-n", str(workers)]
        process = start(arguments, log, processes=len(groups) * workers, ENTCOV_TEST_DEVICE=context.device)
        running.append((name, written, log, process))
    found = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    reasons, stopped = [], False
    for name, written, log, process in running:
        done = finish(process, log, until)
        mine = outcomes.read(written)
        found = {key: value + mine[key] for key, value in found.items()}
        stopped |= done.code is None
        if done.code != 0 or not mine["passed"]:
            reasons.append(f"{name}: " + ("; ".join(mine["failures"][:20]) or done.why(seconds)))
    if stopped:
        reasons.insert(0, f"stopped after {seconds:.0f} s; the counts are of the tests that had ended")
    only_late = stopped and not found["failed"] and found["passed"]
    status = PARTIAL if only_late else FAILED if reasons else PASSED
    return {"status": status, **found, **({"reason": "; ".join(reasons)} if reasons else {})}


def sanitizer(context: Context, seconds: float) -> dict:
    """Every op at small shapes under compute-sanitizer's four tools, at the same time. A finding in our kernels is a
    failure; findings in other kernels are counted."""
    target = [sys.executable, "-m", "benchmarks.gpu.sanitizer_target", "--device", context.device]
    if context.rehearsal:
        done = command(target, context.log("sanitizer_target"), seconds)
        reason = "no sanitizer in a rehearsal; its program ran" if done.code == 0 else done.why(seconds)
        return {"status": SKIPPED if done.code == 0 else FAILED, "reason": reason}
    program = next(iter(cuda_toolchain.candidates("compute-sanitizer")), None)
    if program is None:
        return {"status": SKIPPED, "reason": "no compute-sanitizer on this machine"}
    until = time.monotonic() + seconds
    running = {}
    for tool in TOOLS:
        log = context.log(tool)
        # Without torch's cache every tensor is an allocation of its own, and the tool knows its bounds.
        running[tool] = (
            log,
            start([program, "--tool", tool, *target], log, processes=len(TOOLS), PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        )
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
        reached = re.findall(r"^sanitizer target: (\d+ of \d+) ", output, re.MULTILINE)
        return {"status": PARTIAL if code is None and not ours else FAILED, "errors": errors, "in_entcov": ours,
                "reason": f"did not finish ({stopped}; {reached[-1] if reached else 'none'} of the cases ran): "
                f"{output.strip()[-400:]}"}  # fmt: skip
    if ours:
        return {"status": FAILED, "errors": errors, "in_entcov": ours, "reason": f"{ours} findings in our kernels"}
    return {"status": PASSED, "errors": errors, "in_entcov": 0}
