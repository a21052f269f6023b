"""The child process for what could hang or crash the trainer: math-verify, and all of reasoning-gym.

Run as a script by `score_process`, which says why; it imports nothing of entcov. One JSON object a line comes in on
stdin, one goes out on the stdout that the process was started with:

    math            {"limit": seconds, "gold": ..., "answer": ...}                   -> {"score": 0 | 1}
    reasoning_gym   {"limit": seconds, "item": {...}, "question": ..., "answer": ...}  -> {"score": 0 | 1}
    reasoning_gym   {"limit": seconds, "item": {...}}                               -> {"question": ..., "answer": ...}
    reasoning_gym   {"limit": seconds, "names": true}                               -> {"names": [...], "version": ...}

A request that no response could make right is answered by {"error": ...}.

The process kills itself when a request takes longer than its limit: the kernel's timer ends even a computation that
never returns to the interpreter, and one whose parent is gone.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from typing import Any

_START_LIMIT = 120.0  # seconds to import or to build a dataset, which is no fault of the response
_MEMORY_LIMIT = 4 << 30  # bytes of address space; "9**9**9" fails instead of eating the machine


def main(kind: str) -> None:
    _outlive_interrupts()
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not break the protocol
    _limit_memory()
    logging.disable(logging.CRITICAL)
    arm(_START_LIMIT)
    try:
        handle = {"math": _math, "reasoning_gym": _reasoning_gym}[kind]()
    except ImportError as error:
        _send(reply, {"error": str(error)})
        return
    arm(0)
    _send(reply, {"ready": True})
    for line in sys.stdin:
        answer = handle(json.loads(line))
        arm(0)
        _send(reply, answer)


def _outlive_interrupts() -> None:
    """Ctrl-C and Slurm's SIGTERM reach children too, and the trainer still needs rewards to end its step."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def arm(seconds: float) -> None:
    """Starts the timer that ends this process after `seconds`; 0 stops it."""
    import signal

    signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory() -> None:
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    except (ValueError, OSError):  # a lower limit is in force already, or the system knows no such limit
        pass


def _send(reply: Any, message: dict[str, Any]) -> None:
    reply.write(json.dumps(message) + "\n")
    reply.flush()


def _math():
    from math_verify import parse, verify

    parsed_gold = functools.lru_cache(maxsize=4096)(lambda gold: parse(_boxed(gold), parsing_timeout=None))

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        arm(request["limit"])
        try:
            # No time-out of math-verify's own: it needs the signal that `arm` uses.
            answer = parse(_boxed(request["answer"]), parsing_timeout=None)
            right = verify(parsed_gold(request["gold"]), answer, timeout_seconds=None)
        except Exception:  # an answer that the parser or sympy chokes on is a wrong answer
            right = False
        return {"score": int(bool(right))}

    return handle


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _reasoning_gym():
    from importlib.metadata import version

    from reasoning_gym.factory import DATASETS

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if request.get("names"):
            return {"names": sorted(DATASETS), "version": version("reasoning-gym")}
        arm(_START_LIMIT)
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
        arm(request["limit"])
        try:
            value = dataset.score_answer(request["answer"], entry)
        except Exception:  # several scorers raise on answers of the wrong form
            value = 0.0
        return {"score": int(value == 1.0)}  # partial credit (0.01 for "an answer was there") is no success

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


if __name__ == "__main__":
    main(sys.argv[1])
