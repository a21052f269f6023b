"""Every test of this folder runs the emulated CUDA kernels in place of the CPU's."""

import pytest

from tests.emulator import emulated


@pytest.fixture(autouse=True)
def emulation(monkeypatch, kernels):
    emulated.install(monkeypatch, kernels)
