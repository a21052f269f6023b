"""The short scripts of examples/ops_*.py run as a newcomer runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name):
    command = [sys.executable, str(EXAMPLES / name)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_token_stats():
    out = run("ops_token_stats.py")
    assert "gradient (2, 6, 32000) torch.bfloat16" in out and "entropy drift" in out and "nan" not in out


def test_linear():
    out = run("ops_linear.py")
    assert "entropy of the first tokens:" in out and "gradient of weight (32000, 64)" in out
    # bf16 stores a gradient to 2^-9 of itself; the two sum in another order.
    assert all(float(line.split()[-1]) < 2**-7 for line in out.splitlines() if line.startswith("gradient"))


def test_tensor_parallel():
    out = run("ops_tensor_parallel.py")
    assert "entropy on both ranks:" in out and "gradient of this rank's columns: (5, 504)" in out


def test_logit_covariance_shows_the_rate():
    errors = [float(line.split()[3]) for line in run("ops_logit_covariance.py").splitlines()[1:]]
    assert len(errors) == 4 and re.match(r"0\.\d", str(errors[0]))
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert larger / smaller == pytest.approx(2.0, rel=0.15)
