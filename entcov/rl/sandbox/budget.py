"""A limit on the time that a step's answers take in sandboxes, so that slow answers cannot stop a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Seconds that answers may take, all sandboxes together. Safe to share between threads.

    Scoring inside `with budget.charged() as charge:` is charged to it. When nothing is left, further answers are
    not scored: they get 0 and count as timed out.
    """

    seconds: float
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def charged(self) -> Iterator[Charge]:
        charge = Charge(self)
        token = _CURRENT.set(charge)
        try:
            yield charge
        finally:
            _CURRENT.reset(token)


@dataclass
class Charge:
    """One response's use of a budget."""

    budget: Budget
    timed_out: bool = False

    @staticmethod
    def current() -> Charge:
        """The charge of the caller's context; outside of any, one without a limit."""
        return _CURRENT.get() or Charge(Budget(float("inf")))

    def spend(self, seconds: float) -> None:
        with self.budget._lock:
            self.budget.seconds -= seconds

    @property
    def covered(self) -> bool:
        return self.budget.seconds > 0


_CURRENT: ContextVar[Charge | None] = ContextVar("charge", default=None)
