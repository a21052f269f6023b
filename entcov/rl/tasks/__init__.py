"""Tasks: sources of prompts with verifiable answers. See docs/tasks.md."""

from entcov.rl.tasks import carry_arithmetic, countdown  # noqa: F401  (import registers them)
from entcov.rl.tasks.base import ALPHABET, SPLITS, TASKS, GeneratedTask, Task, make_task, register

__all__ = ["ALPHABET", "SPLITS", "TASKS", "GeneratedTask", "Task", "make_task", "register"]
