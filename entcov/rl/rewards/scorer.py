"""Rewards of responses while others are still being generated."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Semaphore

from entcov.rl.rewards import rules
from entcov.rl.sandbox import Budget, free_cores
from entcov.rl.threads import submit
from entcov.rl.types import Rollout

STEP_LIMIT = 300.0  # seconds that the responses of one step may keep every sandbox busy; the rest of them score 0


class Scorer:
    """Threads that fill in `Rollout.reward` and `Rollout.components`. A context manager.

    `take` is a sampler's `on_done`, `finish` comes after.

    The built-in rewards run in child processes or take microseconds, so they hardly slow the generation: they get one
    thread for each sandbox. A reward function of your own gets one thread, so it need not be thread-safe. Where the
    system has no thread left, `take` scores itself.

    A reward depends on its rollout alone, not on the order or the number of threads. Time is the exception: a response
    that is not scored within its limit, or after the step's responses have used up the time of the sandboxes (300 s
    for each sandbox), gets reward 0 and `Rollout.timed_out`.
    """

    def __init__(self, reward_fn: rules.RewardFunction) -> None:
        self.reward_fn = reward_fn
        threads = free_cores() if reward_fn is rules.score else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="entcov-reward")
        self._turn = Semaphore(threads)
        self._budget = Budget(STEP_LIMIT * threads)
        self._waiting: list[Future[None]] = []
        self._taken: set[int] = set()

    def take(self, rollout: Rollout) -> None:
        """Scores a complete response some time before `finish` returns. Callable from any thread."""
        self._taken.add(id(rollout))
        self._waiting.append(submit(self._pool, self._score, rollout))

    def finish(self, rollouts: Sequence[Rollout]) -> None:
        """Returns when all of `rollouts` have their rewards.

        Those that `take` has not got are scored now, unless they have a reward already: a sampler need not call `take`,
        and one over several processes returns scored rollouts.

        Raises:
            Whatever the reward function raised first.
        """
        for rollout in rollouts:
            if id(rollout) not in self._taken and rollout.reward is None:
                self.take(rollout)
        wait(self._waiting, return_when=FIRST_EXCEPTION)
        for scored in self._waiting:
            if scored.done():
                scored.result()

    def _score(self, rollout: Rollout) -> None:
        with self._turn, self._budget.charged() as charge:
            reward = self.reward_fn(rollout.prompt.example, rollout.text)
        if isinstance(reward, dict):
            rollout.components, reward = reward, float(sum(reward.values()))
        rollout.reward = reward
        rollout.timed_out = charge.timed_out

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
