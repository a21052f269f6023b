"""The process that scores answers and runs programs, and the child that it starts for each of them.

Run as a script by `pool`, and it imports nothing of entcov. One JSON object a line comes in on stdin, first
{"path": sys.path}; one goes out for each on the stdout that the process was started with. A request has a "nonce",
which its reply repeats, and a "limit" in seconds; a reply says "timed_out" where the limit was reached:

    math            {"gold": ..., "answer": ...}                          -> {"score": 0 | 1}
    reasoning_gym   {"item": {...}, "question": ..., "answer": ...}       -> {"score": 0 | 1, "seconds": ...}
    reasoning_gym   {"item": {...}}                                       -> {"question": ..., "answer": ...}
    reasoning_gym   {"names": true}                                       -> {"names": [...], "version": ...}
    program         {"source": ..., "stdin": ..., "most_output": ...}     -> {"status", "stdout", "ended_by", "seconds"}
    program         {"source": ..., "calls": [...], "each": ..., "most_output": ...}                       -> the same

With "calls" the program is loaded as a module, and its standard output is one line a call (`_call_source`).

A request that is wrong for every response is answered by {"error": ...}.

math-verify evaluates no code (`guard` restricts it), so its process confines itself once and scores one answer after
another; the trainer ends it when one takes too long. In the other kinds the process itself never handles an answer: it
forks a child for each, which is confined, can write to one pipe only, and is ended afterwards. So an answer can reach
neither the trainer's pipe nor the next answer. The child is confined although `guard` restricts `eval`, in case `guard`
misses something.
"""

import dataclasses
import functools
import gc
import json
import logging
import math
import os
import select
import signal
import sys
import sysconfig
import threading
import time
import types
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -P keeps it off; the trainer's path replaces it
import guard  # noqa: E402
import isolation  # noqa: E402
import values  # noqa: E402

_MEMORY = 4 << 30  # bytes of address space; "9**9**9" fails instead of eating the machine
_PROGRAM_MEMORY = 2 << 30
_MOST_THREADS = 32  # of a program
_LOOK = 0.02  # seconds between two looks at the number of threads

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def main(kind: str) -> None:
    # Ctrl-C and Slurm's SIGTERM may reach this process too, and the trainer still needs rewards to end its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    sys.path[:] = [entry for entry in json.loads(sys.stdin.readline())["path"] if entry]
    logging.disable(logging.CRITICAL)
    isolation.limit("RLIMIT_AS", _MEMORY)
    lacking = isolation.missing()
    try:
        handle = {"math": _math, "reasoning_gym": _reasoning_gym, "program": _program}[kind](lacking)
    except ImportError as error:
        _send(reply, {"missing_package": str(error)})
        return
    except Exception as error:
        _send(reply, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(reply, {"lacking": lacking})
    for line in sys.stdin:
        request = json.loads(line)
        _send(reply, {"nonce": request["nonce"], **handle(request)})


def _send(reply: Any, message: dict[str, Any]) -> None:
    reply.write(json.dumps(message) + "\n")
    reply.flush()


# ---- math-verify ---------------------------------------------------------------------------------------------------


def _math(lacking: dict[str, str]) -> Handler:
    from math_verify import parse, verify

    guard.guard_sympy()
    files = None if "Landlock" in lacking else isolation.readable(_library_folders())
    isolation.confine(files=files, memory=_MEMORY, seconds=None, threads=False, lacking=lacking)
    _must_hold(isolation.escapes(), lacking)
    parsed_gold = functools.lru_cache(maxsize=4096)(lambda gold: parse(_boxed(gold), parsing_timeout=None))

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        # The trainer ends this process at its limit. If the trainer is gone, this timer does.
        signal.setitimer(signal.ITIMER_REAL, request["limit"] + 5)
        try:
            # No time-out of math-verify's own: it needs the same timer.
            answer = parse(_boxed(request["answer"]), parsing_timeout=None)
            right = verify(parsed_gold(request["gold"]), answer, timeout_seconds=None)
        except Exception:  # an answer that the parser or sympy chokes on is a wrong answer
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        return {"score": int(bool(right))}

    return handle


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


# ---- reasoning-gym -------------------------------------------------------------------------------------------------


def _reasoning_gym(lacking: dict[str, str]) -> Handler:
    from importlib.metadata import version

    from reasoning_gym.factory import DATASETS

    guard.guard_sympy()
    guard.guard_reasoning_gym()
    children = _Children(lacking)

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("names"):
            return {"names": sorted(DATASETS), "version": version("reasoning-gym")}
        where = request["item"]
        if where["dataset"] not in DATASETS:
            return {"error": f"unknown dataset {where['dataset']!r}"}
        try:
            dataset = _dataset(where["dataset"], where["settings"], where["seed"], where["size"])
            entry = _entry(where["dataset"], where["settings"], where["seed"], where["size"], where["item"])
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        if "answer" not in request:
            return {"question": entry["question"], "answer": entry["answer"]}
        if entry["question"] != request["question"]:
            return {"error": "the question comes out differently"}

        def score() -> int:
            try:
                value = dataset.score_answer(request["answer"], entry)
            except Exception:  # several scorers raise on answers of the wrong form
                value = 0.0
            os.write(1, b"1" if value == 1.0 else b"0")  # partial credit (0.01 for "an answer was there") is no success
            return 0

        done = children.run(score, limit=request["limit"], memory=_MEMORY, most_output=1)
        right = done.output == b"1" and done.status == 0 and not done.ended_by
        return {"score": int(right), "seconds": done.seconds, "timed_out": done.ended_by == "time"}

    return handle


@functools.lru_cache(maxsize=4)
def _dataset(name: str, settings: str, seed: int, size: int) -> Any:
    """The dataset `name` with `settings` (JSON). Consecutive questions share it: some take long to build."""
    import reasoning_gym

    arguments = json.loads(settings)
    if name == "composite":
        from reasoning_gym.composite import DatasetSpec

        arguments["datasets"] = [DatasetSpec(**spec) for spec in arguments["datasets"]]
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **arguments)


@functools.lru_cache(maxsize=4096)
def _entry(name: str, settings: str, seed: int, size: int, item: int) -> dict[str, Any]:
    return _dataset(name, settings, seed, size)[item]


# ---- programs ------------------------------------------------------------------------------------------------------


def _program(lacking: dict[str, str]) -> Handler:
    if lacking:
        return lambda request: {"error": "programs are not run without isolation"}
    children = _Children(lacking)

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        calls = request.get("calls")
        done = children.run(
            lambda: _run_source(request["source"]) if calls is None else _call_source(request["source"], calls),
            limit=request["limit"],
            memory=_PROGRAM_MEMORY,
            most_output=request["most_output"],
            stdin=request.get("stdin", "").encode(errors="surrogatepass"),
            threads=True,
            each=request.get("each"),
        )
        return {
            "status": done.status,
            "stdout": done.output.decode(errors="replace"),
            "ended_by": done.ended_by,
            "seconds": done.seconds,
            "timed_out": done.ended_by == "time",
        }

    return handle


def _run_source(source: str) -> int:
    """Runs `source` as a program in this process. Returns its exit status."""
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.argv = ["program.py"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
    threading._shutdown()  # waits for the program's threads, as the interpreter does
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        status = status or 1
    return status


def _call_source(source: str, calls: list[Any]) -> int:
    """Loads `source` as a module, calls its functions, and writes a line of JSON for each call: {"value": ...} or
    {"raised": [names of the exception's classes]}.

    `calls` has [name, arguments, named arguments], values as `values` encodes them. A name that the module lacks is
    looked up in its class Solution. What the program prints goes nowhere. The program can write to the pipe itself, and
    gains nothing by it: the reader knows what is expected, and this process does not.
    """
    replies = os.dup(1)
    os.dup2(2, 1)
    sys.argv = ["solution.py"]
    sys.modules["solution"] = module = types.ModuleType("solution")
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    solution, write, dumps = module.__dict__.get("Solution"), os.write, json.dumps
    for name, arguments, named in calls:
        try:
            function = module.__dict__[name] if name in module.__dict__ else getattr(solution(), name)
            reply = {"value": values.encode(function(*values.decode(arguments), **values.decode(named)))}
        except Exception as error:
            reply = {"raised": [cls.__name__ for cls in type(error).__mro__]}
        line = memoryview(dumps(reply).encode() + b"\n")
        while line:
            line = line[write(replies, line) :]
    return 0


# ---- a child for each answer ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Done:
    status: int  # exit status; minus the signal that ended the child
    output: bytes
    seconds: float
    ended_by: str  # "": the child itself; "time", "output" or "threads": the limit that it went beyond


class _Children:
    """Runs functions in confined children, one at a time. The limits are kept by this process and by the kernel.

    Raises:
        RuntimeError: a layer that is said to be there does not hold.
    """

    def __init__(self, lacking: dict[str, str]) -> None:
        self.lacking = lacking
        self.files = None if "Landlock" in lacking else isolation.readable(_library_folders())
        gc.collect()
        gc.freeze()  # the collector would touch, and so copy, every page that a child shares with this process

        def prove() -> int:
            os.write(1, json.dumps(isolation.escapes()).encode())
            return 0

        done = self.run(prove, limit=60, memory=_MEMORY, most_output=1000)
        if done.status or done.ended_by:
            raise RuntimeError(f"a confined process does not work here: {done}")
        _must_hold(json.loads(done.output), lacking)

    def run(
        self,
        work: Callable[[], int],
        *,
        limit: float,
        memory: int,
        most_output: int,
        stdin: bytes = b"",
        threads: bool = False,
        each: float | None = None,
    ) -> _Done:
        """Calls `work` in a child, whose standard input is `stdin`. Returns what it wrote to its standard output.

        Args:
            work: returns the exit status.
            limit: seconds, after which the child is ended.
            most_output: bytes, beyond which the child is ended.
            threads: whether the child may have threads, up to 32 of them.
            each: seconds that each line of output may take; None: only `limit` counts.
        """
        started = time.monotonic()
        source = _stdin(stdin)
        output, sink = os.pipe()
        parent, child = os.getpid(), os.fork()
        if child == 0:
            status, leave = 1, os._exit  # the answer may replace the one in `os`
            try:
                isolation.die_with(parent)
                os.dup2(source, 0)
                os.dup2(sink, 1)
                files = None if self.files is None else os.dup2(self.files, 3)
                os.closerange(3 if files is None else 4, 1 << 16)
                cpu = math.ceil(limit) + 1
                isolation.confine(files=files, memory=memory, seconds=cpu, threads=threads, lacking=self.lacking)
                status = work()
            finally:
                leave(status & 0xFF)
        os.close(source)
        os.close(sink)
        received, ended_by, status = _watch(child, output, started + limit, most_output, threads, each)
        os.close(output)
        if ended_by:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        return _Done(os.waitstatus_to_exitcode(status), received, time.monotonic() - started, ended_by)


def _watch(
    child: int, output: int, deadline: float, most: int, threads: bool, each: float | None
) -> tuple[bytes, str, int]:
    """Reads a child's output until it has ended, or must be ended. Returns the output, why, and the wait status."""
    received = b""
    line_deadline = deadline if each is None else min(deadline, time.monotonic() + each)
    poll = select.poll()
    poll.register(output, select.POLLIN)
    poll.register(0, 0)  # the trainer's end of stdin: the kernel tells when it is closed
    at_end = False
    while True:
        left = line_deadline - time.monotonic()
        if left <= 0:
            return received, "time", 0
        if threads and _threads_of(child) > _MOST_THREADS:
            return received, "threads", 0
        if at_end:  # the pipe is closed: the child is ending, or it has closed the pipe and continues
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return received, "", status
            time.sleep(min(left, 0.0005))
            continue
        for file, _ in poll.poll(1000 * min(left, _LOOK if threads else left)):
            if file == 0:
                os.kill(child, signal.SIGKILL)
                os._exit(1)
            data = os.read(output, min(1 << 16, most + 1 - len(received)))
            received += data
            at_end = not data
            if each is not None and b"\n" in data:
                line_deadline = min(deadline, time.monotonic() + each)
            if len(received) > most:
                return received[:most], "output", 0


def _threads_of(process: int) -> int:
    try:
        return os.stat(f"/proc/{process}/task").st_nlink - 2
    except FileNotFoundError:
        return 0


def _must_hold(escapes: list[str], lacking: dict[str, str]) -> None:
    found = [what for what in escapes if what.partition(":")[0] not in lacking]
    if found:
        raise RuntimeError(f"the sandbox does not hold: {'; '.join(found)}")


def _stdin(content: bytes) -> int:
    if not content:
        return os.open(os.devnull, os.O_RDONLY)
    file = os.memfd_create("stdin")
    with os.fdopen(file, "wb", closefd=False) as writer:
        writer.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _library_folders() -> list[str]:
    """What an interpreter may have to read after its start: Python's library, installed packages, shared libraries."""
    packages = [entry for entry in sys.path if os.path.basename(entry) in ("site-packages", "dist-packages")]
    loaded = [folder for module in list(sys.modules.values()) for folder in getattr(module, "__path__", ())]
    return [
        *{sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *packages},
        *[folder for folder in loaded if "site-packages" not in folder and "dist-packages" not in folder],
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", os.path.join(sys.base_prefix, "lib")),
        *("/dev/null", "/dev/urandom", "/dev/zero"),
    ]


if __name__ == "__main__":
    main(sys.argv[1])
