"""Runs a program that a model wrote, or calls its functions, in a sandbox."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from entcov.rl.sandbox.pool import IsolationError, SandboxPool
from entcov.rl.sandbox.values import decode, encode


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
    return _run(source, limit, most_output, stdin=stdin)


class Call(NamedTuple):
    """A call of one of a program's functions. The arguments are plain values, see `values`."""

    name: str
    arguments: Sequence[Any] = ()
    named: Mapping[str, Any] = {}


class Outcome(NamedTuple):
    """What a call returned, or raised."""

    value: Any = None  # of built-in types, or an `Opaque`
    raised: tuple[str, ...] = ()  # names of the exception's class and of those that it inherits from


def call_program(
    source: str, calls: Sequence[Call], *, limit: float = 15.0, each: float = 5.0, most_output: int = 1 << 20
) -> list[Outcome]:
    """Loads Python source as a module, in the sandbox of `run_program`, and calls its functions one after another.

    A function that the module lacks is looked up in its class Solution, as LeetCode has it. The program sees the
    arguments and nothing else, so a caller that compares the outcomes here keeps what it expects to itself. All calls
    share one process: what one leaves in the program's variables, the next finds there. What is printed goes nowhere.

    Args:
        limit: seconds in all.
        each: seconds for a call; the first one's include loading the module.
        most_output: bytes of all encoded results, beyond which the program is ended.

    Returns:
        One outcome a call, in order. There are fewer where the program ended, was ended, or sent what is no outcome.

    Raises:
        IsolationError: this system lacks what confines a program.
        ValueError: `limit`, `each` or `most_output` is not positive.
    """
    if not each > 0:
        raise ValueError(f"each must be positive, got {each}")
    encoded = [(call.name, encode(list(call.arguments)), encode(dict(call.named))) for call in calls]
    done = _run(source, limit, most_output, calls=encoded, each=each)
    outcomes = []
    for line in done.stdout.split("\n")[: len(calls)]:
        try:
            match json.loads(line):
                case {"value": message, **others} if not others:
                    outcomes.append(Outcome(decode(message)))
                case {"raised": [*names], **others} if not others and all(isinstance(name, str) for name in names):
                    outcomes.append(Outcome(raised=tuple(names)))
                case _:
                    break
        except (ValueError, RecursionError):
            break
    return outcomes


def _run(source: str, limit: float, most_output: int, **request: Any) -> ProgramResult:
    if not limit > 0 or not most_output > 0:
        raise ValueError(f"limit and most_output must be positive, got {limit} and {most_output}")
    if lacking := _pool().lacking():
        raise IsolationError("programs", lacking)
    reply = _pool().ask(source=source, limit=limit, most_output=most_output, **request)
    if reply is None:
        return ProgramResult(-9, "", "time", limit)
    return ProgramResult(reply["status"], reply["stdout"], reply["ended_by"], reply["seconds"])


@functools.cache
def _pool() -> SandboxPool:
    return SandboxPool("program", limit=5.0, extra="")
