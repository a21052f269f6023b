"""Child processes for scoring, with a time limit that holds in any thread.

math-verify limits its time by a signal, which works in the main thread only, and no Python thread can interrupt sympy
inside one long integer operation. A child process can be ended whatever it does. Children are started when first
needed, kept, and started anew when a response has ended one; a call costs one line each way through a pipe.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("score_worker.py")
MAX_CHILDREN = min(4, os.cpu_count() or 1)


class ScorePool:
    """Children of one kind ("math" or "reasoning_gym"), as many as threads call at once, at most 4.

    Args:
        kind: which requests the children answer, see `score_worker`.
        limit: seconds that scoring one response may take.
        extra: the extra that the error names where the library is missing.
    """

    def __init__(self, kind: str, *, limit: float, extra: str) -> None:
        self.kind, self.limit, self.extra = kind, limit, extra
        self._idle: list[subprocess.Popen[str]] = []
        self._slots = threading.Semaphore(MAX_CHILDREN)
        self._lock = threading.Lock()
        atexit.register(self.close)

    def score(self, **request: Any) -> float:
        """The score of one response; 0.0 where the child did not survive it (time or memory limit). Raises as `ask`."""
        reply = self.ask(**request)
        return 0.0 if reply is None else float(reply["score"])

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """The reply to one request; None where the child did not survive it.

        Raises:
            ImportError: the library is not installed.
            RuntimeError: the child does not start.
            ValueError: the request itself is wrong, whatever the response in it.
        """
        line = json.dumps({"limit": self.limit, **request}) + "\n"
        with self._slots:
            # A child that ended without the timer may have been ended by anyone: another one gets the request once.
            reply, code = self._exchange(line)
            if reply is None and code != -signal.SIGALRM:
                reply, _ = self._exchange(line)
        if reply is not None and "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def _exchange(self, line: str) -> tuple[dict[str, Any] | None, int]:
        """One request and its reply by an idle or a new child; without a reply, the exit code of the child."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or self._start()
        try:
            child.stdin.write(line)
            child.stdin.flush()
            reply = child.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            child.wait()  # its end of the pipe is closed: it is ending
            return None, _end(child)
        with self._lock:
            self._idle.append(child)
        return json.loads(reply), 0

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps the script's folder off sys.path, where types.py would stand in for the standard library's.
        child = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Several of reasoning-gym's generators go through sets: without a fixed hash seed, (seed, index) would name
            # another question in every process.
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.kind} scoring process ended at its start with code {_end(child)}")
        reply = json.loads(line)
        if "error" in reply:
            _end(child)
            raise ImportError(f'scoring needs a missing package ({reply["error"]}): pip install "entcov[{self.extra}]"')
        return child

    def close(self) -> None:
        """Ends the idle children."""
        with self._lock:
            children, self._idle = self._idle, []
        for child in children:
            _end(child)


def _end(child: subprocess.Popen[str]) -> int:
    child.kill()
    code = child.wait()
    child.stdout.close()
    try:
        child.stdin.close()
    except BrokenPipeError:  # a request that was never read
        pass
    return code
