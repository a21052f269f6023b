"""examples/trl_grpo.py as a newcomer runs it without a network."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_command

pytest.importorskip("trl")

ROOT = Path(__file__).parents[3]


def test_the_tiny_mode_of_the_example(tmp_path):
    command = [sys.executable, "examples/trl_grpo.py", "--tiny", "--output_dir", str(tmp_path), "--controls", "kl_cov"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run_command(command, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'entcov/cov_klfrac'") == 6 and "'reward'" in done.stdout
