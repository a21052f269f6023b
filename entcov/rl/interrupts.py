"""Ctrl-C (SIGINT) and SIGTERM, which Slurm, Kubernetes and torchrun send before they end a run.

Between steps the state of a run is whole, inside a step it is not: while `waits_for_step` is set, a signal is only
remembered, and the run asks for it when a step has ended. Otherwise it raises KeyboardInterrupt at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ctrl-C in a terminal reaches torchrun's processes twice: from the terminal, and from torchrun right after.
_SAME_INTERRUPT = 1.0  # seconds


class Interrupts:
    """A context manager that handles the two signals, unless the program has a handler of its own for them.

    tells: whether this process prints on stderr that it waits; one of several does.
    received: the first signal that was remembered, 0 while there is none.
    at_once: whether a second Ctrl-C has asked not to wait for the step's end. A second SIGTERM changes nothing: several
        senders may pass the same one on, and there is SIGKILL.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self.tells = tells
        self.waits_for_step = False
        self.received = 0
        self.at_once = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:  # a signal that is ignored, or has another handler, stays as it is
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.waits_for_step:
            raise KeyboardInterrupt(number)
        if not self.received:
            self.received, self._since = number, now
            if self.tells:
                with contextlib.suppress(OSError):  # past Python's buffers: a handler may interrupt a print
                    os.write(2, b"\nstopping when this step is done and stored; Ctrl-C again stops at once\n")
        elif number == signal.SIGINT and now - self._since > _SAME_INTERRUPT:
            self.at_once = True
            raise KeyboardInterrupt(number)
