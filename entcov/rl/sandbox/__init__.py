"""Confined child processes that score answers and run programs, and the pool through which the trainer asks them."""

from entcov.rl.sandbox.budget import Budget
from entcov.rl.sandbox.cores import free_cores
from entcov.rl.sandbox.pool import IsolationError, SandboxPool
from entcov.rl.sandbox.programs import Call, Outcome, ProgramResult, call_program, run_program

__all__ = [
    "Budget",
    "Call",
    "IsolationError",
    "Outcome",
    "ProgramResult",
    "SandboxPool",
    "call_program",
    "free_cores",
    "run_program",
]
