"""vLLM changes the process that it runs in, so its tests run in processes of their own, many in each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)


def run(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.parametrize("cases", ["vllm_cases.py vllm_run_cases.py", "vllm_server_cases.py"])
def test_in_a_process_of_its_own(cases):
    files = [f"tests/support/{name}" for name in cases.split()]
    run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files)


def test_one_engine_over_two_processes():
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.support.vllm_ranks",
    )
    run(*torchrun)
