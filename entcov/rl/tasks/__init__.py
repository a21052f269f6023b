"""Tasks: sources of prompts with verifiable answers. See docs/tasks.md."""

from entcov.rl.tasks import (  # noqa: F401  (importing them registers them)
    carry_arithmetic,
    countdown,
    linear_equations,
    modular_arithmetic,
    programs,
    reasoning_gym,
    word_problems,
)
from entcov.rl.tasks.base import ALPHABET, SPLITS, TASKS, GeneratedTask, Task, make_task, register

__all__ = ["ALPHABET", "SPLITS", "TASKS", "GeneratedTask", "Task", "make_task", "register"]
