"""Runs a program that a model wrote, in a sandbox."""

import functools
from dataclasses import dataclass

from entcov.rl.sandbox.pool import IsolationError, SandboxPool


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended. Compare `stdout` with what is expected of it outside of the sandbox, as scorers here do.

    The program shares its process with nothing that knows the expected output, so it has to compute it.
    """

    status: int  # exit status; minus the signal that ended it
    stdout: str  # UTF-8; other bytes are replaced
    ended_by: str  # "": the program itself; "time", "output" or "threads": the limit that it went beyond
    seconds: float


def run_program(source: str, stdin: str = "", *, limit: float = 5.0, most_output: int = 1 << 16) -> ProgramResult:
    """Runs Python source in a sandbox: no network, no second process, no file but Python's library, 2 GiB of memory.

    The interpreter is the trainer's, with its installed packages. Standard error goes nowhere. Safe to call from
    several threads. A `Budget` that is used up ends the program before its start (`ended_by` is "time").

    Args:
        limit: seconds.
        most_output: bytes of standard output, beyond which the program is ended.

    Raises:
        IsolationError: this system lacks what confines a program.
        ValueError: `limit` or `most_output` is not positive.
    """
    if not limit > 0 or not most_output > 0:
        raise ValueError(f"limit and most_output must be positive, got {limit} and {most_output}")
    if lacking := _pool().lacking():
        raise IsolationError("programs", lacking)
    reply = _pool().ask(source=source, stdin=stdin, limit=limit, most_output=most_output)
    if reply is None:
        return ProgramResult(-9, "", "time", limit)
    return ProgramResult(reply["status"], reply["stdout"], reply["ended_by"], reply["seconds"])


@functools.cache
def _pool() -> SandboxPool:
    return SandboxPool("program", limit=5.0, extra="")
