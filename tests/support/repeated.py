"""Tests that one file takes over from another and runs once more under its own fixtures.

The emulated CUDA kernels promise what the CPU kernels do, so the tests of the CPU kernels judge them too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType


def module_of(file: str) -> ModuleType:
    """The module tests/`file`.py."""
    return importlib.import_module("tests." + file.replace("/", "."))


def cases_of(file: str, names: str, prefix: str = "") -> dict[str, Callable]:
    """{"test_" + prefix + name: test_<name> of tests/`file`.py} for the names in a text that spaces separate."""
    module = module_of(file)
    return {f"test_{prefix}{name}": getattr(module, f"test_{name}") for name in names.split()}
