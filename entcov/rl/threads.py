"""Runs work in threads, or in the calling thread where the machine allows no more threads.

A limit on processes (ulimit -u, a container's pids limit) makes Python's "can't start new thread", which must not end a
run.
"""

import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from typing import TypeVar

T = TypeVar("T")


def submit(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments) -> Future[T]:
    """As `pool.submit`. Where the pool gets no thread, the work is done before this returns."""
    future: Future[T] = Future()
    run = _once(future, lambda: work(*arguments))
    try:
        pool.submit(run)
    except RuntimeError as error:
        if not no_thread(error):
            raise
        say(f"{error}: work is done one after the other that would be done side by side")
        run()  # the pool may have queued it for a thread that it has: the first of the two runs it
    return future


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Runs `work()` in a new daemon thread."""
    future: Future[T] = Future()
    run = _once(future, work)
    try:
        Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        if not no_thread(error):
            raise
        say(f"{error}: {name} does not go on beside other work")
        run()
    return future


def no_thread(error: RuntimeError) -> bool:
    """Whether `error` says that the machine gives no further thread."""
    return "can't start new thread" in str(error)


@functools.cache
def say(text: str) -> None:
    """Prints a note to stderr, once in a process."""
    print(f"note: {text}", file=sys.stderr)


def _once(future: Future[T], work: Callable[[], T]) -> Callable[[], None]:
    """A function that fills the future when it is called first, and does nothing when it is called again."""
    taken = Lock()

    def run() -> None:
        if not taken.acquire(blocking=False) or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):  # an interrupt is also raised in the thread that it struck
                raise

    return run
