"""examples/trl_grpo.py as a newcomer runs it without a network, and the table of `python -m benchmarks trl`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from benchmarks import trl_selection

ROOT = Path(__file__).parents[3]


def test_the_tiny_mode_of_the_example(tmp_path):
    command = [sys.executable, "examples/trl_grpo.py", "--tiny", "--output_dir", str(tmp_path), "--controls", "kl_cov"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'entcov/cov_klfrac'") == 6 and "'reward'" in done.stdout


def test_trl_s_quantile_moves_with_the_micro_batch_and_ours_does_not(tmp_path):
    found = {(who, rows): trl_selection.step(who, rows, 0.2, tmp_path) for who in ("TRL", "entcov") for rows in (16, 2)}
    assert found["entcov", 2][0] == found["entcov", 16][0] == found["TRL", 16][0]
    assert found["TRL", 2][0] != found["TRL", 16][0]
    assert found["entcov", 2][1] == pytest.approx(found["TRL", 16][1], rel=1e-5)
    assert abs(found["TRL", 2][1] - found["TRL", 16][1]) > 1e-3
