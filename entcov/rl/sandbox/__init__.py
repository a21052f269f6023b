"""Children that work on model output: what confines them, what they run, and the pool that the trainer asks."""

from entcov.rl.sandbox.budget import Budget
from entcov.rl.sandbox.cores import free_cores
from entcov.rl.sandbox.pool import IsolationError, SandboxPool
from entcov.rl.sandbox.programs import ProgramResult, run_program

__all__ = ["Budget", "IsolationError", "ProgramResult", "SandboxPool", "free_cores", "run_program"]
