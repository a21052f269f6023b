"""The short scripts of examples/ run as a newcomer runs them."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_command

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *options, processes=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(EXAMPLES / name), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_command(command, env=env)
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


def test_fsdp2_loop():
    """Two processes and another micro-batch: the same rewards, metrics and chosen tokens; the parameters to rounding.

    2^-23 of the sum of 6,000 parameters' sizes, 3300, is 4e-4 where all errors have one sign; they have not.
    """
    *one, size = run("fsdp2_loop.py", "--steps", "4", processes=1).splitlines()
    *two, other = run("fsdp2_loop.py", "--steps", "4", "--micro-batch", "3", processes=2).splitlines()
    assert one == two and len(one) == 4 and all(line.count(",") == 4 for line in one)
    assert float(size.split()[-1]) == pytest.approx(float(other.split()[-1]), abs=1e-3)
    rewards = [float(line.split()[3]) for line in one]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.2
