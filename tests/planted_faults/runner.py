"""Plants faults in a copy of the repository, one at a time, and runs the tests that must see them.

The process that imports this module imports torch, transformers and pytest once, and forks a child for every fault. A
child imports entcov afresh from its copy of the repository, in which one file has the fault, so nothing is left over
from one fault to the next, processes that a test starts see the fault too, and the repository itself is never touched.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

from tests.planted_faults.fault import Fault

ROOT = Path(__file__).parents[2]
COPIED = (
    "entcov",
    "megatron_integration",
    "tests",
    "examples",
    "scripts",
    "benchmarks",
    "csrc",
    "pyproject.toml",
    "build_backend.py",
)
PRELOADED = (
    "tomllib", "zoneinfo", "numpy", "omegaconf", "pydantic.fields", "pydantic.json_schema", "rich.live",
    "rich.progress", "rich.table", "safetensors.torch", "torch.distributed", "torch.utils.tensorboard",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_fast",
)  # fmt: skip
LIMIT = 300.0  # seconds; a fault may make its test hang
# A test that ends in one of these was not failed by a wrong result: the fault itself is no working code.
BROKEN_CODE = (NameError, ImportError, SyntaxError)


@dataclass
class Outcome:
    """How the named tests of one run ended. Names are those that were asked for."""

    failed: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)  # at least one of its parameters
    broken: dict[str, str] = field(default_factory=dict)  # neither a pass nor a fail, with the reason
    seconds: float = 0.0

    def problem(self, tests: Sequence[str]) -> str | None:
        """What is wrong with a fault that led to this, or None if it was caught."""
        if self.broken:
            return "the fault breaks more than it says: " + "; ".join(f"{k}: {v}" for k, v in self.broken.items())
        if missed := [test for test in tests if test not in self.failed]:
            return f"SURVIVED {', '.join(missed)}"
        return None


def survivors(faults: Sequence[Fault], *, jobs: int = 1, tell: Callable[[str], None] = print) -> dict[str, str]:
    """What went wrong, by the name of the fault: nothing if every fault makes all tests that it names fail.

    Args:
        jobs: how many faults are tried at once.
        tell: gets a line for each fault.

    Raises:
        ValueError: the list of faults does not fit the code; the message names the fault.
        RuntimeError: a named test does not pass without a fault.
    """
    names = [fault.name for fault in faults]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two faults have the name {', '.join(sorted(twice))}")
    planted = {fault.name: fault.planted_in((ROOT / fault.file).read_text()) for fault in faults}
    _preload()
    with tempfile.TemporaryDirectory(prefix="entcov_faults_") as folder:
        tests = sorted({test for fault in faults for test in fault.tests})
        # No more copies than tests: pytest without a test's name would run them all.
        trees = [_copy(Path(folder) / f"copy_{i}") for i in range(min(jobs, len(tests)))]
        # A run in each copy, with a share of the tests each, leaves compiled files there that all later runs use.
        started = [_Run(tree, tests[i::jobs], keep_compiled=True) for i, tree in enumerate(trees)]
        for run in started:
            outcome = run.outcome()
            if bad := outcome.failed | outcome.broken.keys() | set(run.tests) - outcome.passed:
                reasons = "".join(f"\n  {test}: {outcome.broken.get(test, 'failed')}" for test in sorted(bad))
                raise RuntimeError(f"without any fault these tests do not pass:{reasons}")
            tell(f"{len(run.tests)} tests pass without a fault ({outcome.seconds:.1f} s)")
        problems: dict[str, str] = {}
        waiting, idle, running = list(faults), list(trees), {}
        while waiting or running:
            while waiting and idle:
                fault, tree = waiting.pop(0), idle.pop()
                run = _Run(_plant(tree, fault, planted[fault.name]), fault.tests)
                running[run.pipe] = fault, run
            for pipe in wait(list(running), timeout=1):
                fault, run = running.pop(pipe)
                outcome = run.outcome()
                problem = outcome.problem(fault.tests)
                _restore(run.tree, fault)
                idle.append(run.tree)
                if problem is not None:
                    problems[fault.name] = problem
                tell(f"{problem or 'caught':<7} {outcome.seconds:5.1f} s  {fault.name}")
            for _, run in running.values():
                run.end_if_late()
        return problems


def _preload() -> None:
    """Imports once what every child needs and no fault can be in."""
    for name in PRELOADED:  # the environments of other trainers have not all of them
        with suppress(ModuleNotFoundError):
            import_module(name)

    # pytest imports most of itself when it first runs: an empty run here saves 0.7 s in every child.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with tempfile.TemporaryDirectory() as empty, redirect_stdout(io.StringIO()):
        pytest.main(["-p", "no:cacheprovider", f"--rootdir={empty}", empty])
    loaded = [name for name in sys.modules if name.partition(".")[0] in ("entcov", "megatron_integration")]
    if loaded:
        raise RuntimeError(f"children must import the faulty code afresh, and {loaded[0]} is imported already")
    gc.collect()
    gc.freeze()  # children share what is here, and their collector leaves it alone


def _copy(tree: Path) -> Path:
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    return tree


def _plant(tree: Path, fault: Fault, source: str) -> Path:
    path = tree / fault.file
    path.write_text(source)
    os.utime(path, (0, 0))  # a compiled file is taken by size and time: this one has no such file
    return tree


def _restore(tree: Path, fault: Fault) -> None:
    shutil.copy2(ROOT / fault.file, tree / fault.file)


class _Run:
    """Named tests in a forked child with its own copy of the repository."""

    def __init__(self, tree: Path, tests: Sequence[str], keep_compiled: bool = False) -> None:
        self.tree, self.tests = tree, tests
        self.started = time.monotonic()
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.child = context.Process(target=_child, args=(tree, tests, keep_compiled, theirs))
        self.child.start()
        theirs.close()

    def outcome(self) -> Outcome:
        """Waits for the child."""
        try:
            outcome = Outcome(**self.pipe.recv())
        except EOFError:
            self.child.join()
            log = self.tree.with_name(f"{self.tree.name}.log").read_text(errors="replace")
            how = f"ran for more than {LIMIT} s" if self.late else f"ended with code {self.child.exitcode}"
            outcome = Outcome(broken={"the run": f"{how}\n{log[-3000:]}"})
        self.child.join()
        self.pipe.close()
        outcome.seconds = time.monotonic() - self.started
        return outcome

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > LIMIT

    def end_if_late(self) -> None:
        if self.late:
            os.killpg(self.child.pid, signal.SIGKILL)


def _child(tree: Path, tests: Sequence[str], keep_compiled: bool, out: Connection) -> None:
    os.setsid()  # a test that hangs is ended with all that it has started
    os.chdir(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry).resolve() not in (ROOT, Path.cwd()))]
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = not keep_compiled
    if not keep_compiled:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    watch = _Watch(tests)
    scratch = tree.with_name(f"{tree.name}_tmp")
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
    with open(tree.with_name(f"{tree.name}.log"), "w") as log, _redirected(log):
        pytest.main([*options, f"--rootdir={tree}", *tests], plugins=[watch])
    import entcov

    if not Path(entcov.__file__).is_relative_to(tree):
        watch.outcome.broken["import"] = f"entcov comes from {entcov.__file__}"
    out.send(vars(watch.outcome))  # the class of that name is another one by now
    out.close()


class _Watch:
    """A pytest plugin: what became of each named test."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.tests, self.outcome = tests, Outcome()

    def _names(self, nodeid: str) -> set[str]:
        return {test for test in self.tests if nodeid == test or nodeid.startswith(test + "[")}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._names(item.nodeid) <= self.outcome.failed:
            pytest.skip("another parameter of it has failed already")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        names = self._names(item.nodeid)
        if report.when == "call" and report.passed:
            self.outcome.passed |= names
        elif report.failed and report.when == "call" and not call.excinfo.errisinstance(BROKEN_CODE):
            self.outcome.failed |= names
        elif report.failed:
            self.outcome.broken[item.nodeid] = f"{report.when}: {call.excinfo.exconly()[:300]}"
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome.broken[report.nodeid or "collection"] = f"collection: {str(report.longrepr)[-300:]}"


@contextmanager
def _redirected(file):
    """Everything that this process and those it starts print goes to `file`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    yield
