"""The trainer's side of the sandbox: a pool of processes that score answers (`worker`), reused and not trusted.

Processes, because math-verify's time limit needs the main thread, and no Python thread can interrupt sympy inside one
long integer operation; a process can be ended at any time. They are started when first needed and replaced when one has
ended; a call is one line each way through a pipe. Each line carries a fresh random number that its reply must repeat. A
process that sends anything else, sends more, or sends nothing in time is ended with its whole process group.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entcov.rl.sandbox.budget import Charge
from entcov.rl.sandbox.cores import free_cores

_SCRIPT = Path(__file__).with_name("worker.py")
_START_LIMIT = 120.0  # seconds to import, or to make a question, which is no fault of the response
# Seconds that a process of each kind may take beyond an answer's limit, which all but math-verify's keep themselves.
_SLACK = {"math": 0.0, "reasoning_gym": _START_LIMIT, "program": 30.0}
_MOST_REPLY = 64 << 20  # bytes


class IsolationError(RuntimeError):
    """This system cannot confine what would run the model's output, so it is not run."""

    def __init__(self, what: str, lacking: Mapping[str, str]) -> None:
        reasons = "; ".join(f"no {layer}: {reason}" for layer, reason in lacking.items())
        super().__init__(
            f"{what} must be confined by Landlock and seccomp, which is not possible here ({reasons}). It takes Linux "
            "5.13 or newer on x86-64 or aarch64 with Landlock switched on, as Debian 12 and Ubuntu 22.04 have it, and "
            "in a container a seccomp profile that allows it, as Docker's own does since version 23"
        )


class SandboxPool:
    """Processes of one kind ("math", "reasoning_gym" or "program"), as many as threads call at once and cores are free.

    Args:
        kind: which requests the processes answer, see `worker`.
        limit: seconds that one answer may take.
        extra: the extra that the error names where the library is missing.
    """

    def __init__(self, kind: str, *, limit: float, extra: str) -> None:
        self.kind, self.limit, self.extra = kind, limit, extra
        self._idle: list[_Worker] = []
        self._slots = threading.Semaphore(free_cores())
        self._lock = threading.Lock()
        self._lacking: Mapping[str, str] | None = None
        atexit.register(self.close)

    def lacking(self) -> Mapping[str, str]:
        """The layers of isolation that this system lacks, and why; empty on a usual Linux."""
        if self._lacking is None:
            with self._slots:
                self._release(self._take())
        return self._lacking

    def score(self, **request: Any) -> float:
        """The score of one response; 0.0 where it was not scored (time or memory limit). Raises as `ask`."""
        reply = self.ask(**request)
        return 0.0 if reply is None else float(reply["score"])

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """The reply to one request; None where there is none. The caller's `Budget` is charged for it.

        Raises:
            ImportError: the library is not installed.
            RuntimeError: the process does not start.
            ValueError: the request is wrong, independently of the response in it.
        """
        charge = Charge.current()
        if not charge.covered:
            charge.timed_out = True
            return None
        request = {"limit": self.limit, **request}
        with self._slots:
            # If the process ended, the answer need not be the cause: another process gets the request once.
            reply = self._exchange(request, charge, retry=True)
        if reply is not None and "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def _exchange(self, request: dict[str, Any], charge: Charge, retry: bool) -> dict[str, Any] | None:
        worker = self._take()
        started = time.monotonic()
        try:
            reply = worker.ask(request, request["limit"] + _SLACK[self.kind])
        except TimeoutError:
            worker.end()
            charge.timed_out = True
            charge.spend(time.monotonic() - started)
            return None
        except _Ended:
            worker.end()
            charge.spend(time.monotonic() - started)
            return self._exchange(request, charge, retry=False) if retry else None
        except _Disorder:
            worker.end()
            charge.spend(time.monotonic() - started)
            return None
        except BaseException:
            worker.end()
            raise
        self._release(worker)
        charge.spend(reply.get("seconds", time.monotonic() - started))
        charge.timed_out |= bool(reply.get("timed_out"))
        return reply

    def _take(self) -> _Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and worker.is_quiet():
            return worker
        if worker is not None:  # it has ended, or has sent something unasked
            worker.end()
        worker = _Worker(self.kind, self.extra)
        self._lacking = worker.lacking
        return worker

    def _release(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)

    def close(self) -> None:
        """Ends the idle processes."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.end()


class _Ended(Exception):
    """The process has closed its pipe."""


class _Disorder(Exception):
    """The process has sent something that is not the one reply to the request."""


class _Worker:
    """One process and its two pipes.

    Raises:
        ImportError: it lacks a library.
        RuntimeError: it does not start.
    """

    def __init__(self, kind: str, extra: str) -> None:
        # -P keeps the script's folder off sys.path. The environment is new, so that it holds no secret. Several of
        # reasoning-gym's generators iterate over sets: without a fixed hash seed (seed, index) would name another
        # question in every process.
        environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        if "LD_LIBRARY_PATH" in os.environ:  # without it some interpreters do not start
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", str(_SCRIPT), kind],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,  # a new process group, which is ended as a whole
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        try:
            hello = json.loads(self._talk(json.dumps({"path": sys.path}).encode() + b"\n", _START_LIMIT))
        except (TimeoutError, _Ended, _Disorder, ValueError) as error:
            code = self.end()
            raise RuntimeError(
                f"the {kind} scoring process did not start: {type(error).__name__}, it ended with code {code}"
            ) from None
        except BaseException:
            self.end()
            raise
        if "lacking" not in hello:
            self.end()
            if "missing_package" in hello:
                reason = hello["missing_package"]
                raise ImportError(f'scoring needs a missing package ({reason}): pip install "entcov[{extra}]"')
            raise RuntimeError(f"the {kind} scoring process did not start: {hello.get('error')}")
        self.lacking: dict[str, str] = hello["lacking"]

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to `request`.

        Raises:
            TimeoutError: none came in `seconds`.
            _Ended: the process has closed its pipe.
            _Disorder: what came is not the one reply to this request.
        """
        nonce = secrets.token_hex(16)
        line = self._talk(json.dumps({**request, "nonce": nonce}).encode() + b"\n", seconds)
        try:
            reply = json.loads(line)
        except ValueError:
            raise _Disorder from None
        if not isinstance(reply, dict) or reply.pop("nonce", None) != nonce:
            raise _Disorder
        return reply

    def is_quiet(self) -> bool:
        """Whether the process runs and has sent nothing since its last reply."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        return not poll.poll(0) and self.process.poll() is None

    def _talk(self, line: bytes, seconds: float) -> bytes:
        """Sends `line` and returns the one line that comes back. Neither blocks beyond `seconds`."""
        deadline = time.monotonic() + seconds
        stdin, stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        poll.register(stdin, select.POLLOUT)
        rest, received = memoryview(line), b""
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            for file, _ in poll.poll(1000 * left):
                if file == stdin:
                    try:
                        rest = rest[os.write(stdin, rest[: 1 << 16]) :]
                    except BlockingIOError:
                        pass
                    except BrokenPipeError:
                        raise _Ended from None
                    if not rest:
                        poll.unregister(stdin)
                else:
                    data = os.read(stdout, 1 << 16)
                    if not data:
                        raise _Ended
                    received += data
            if len(received) > _MOST_REPLY or (received and rest):
                raise _Disorder
        return received

    def end(self) -> int:
        """Ends the process and its group. Returns its exit code."""
        if self.process.returncode is None:  # else its number may belong to another process
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()
        return code
