"""No arguments of an internal op crash the process or make it touch memory of others: tests/fuzz/malformed.py, in
processes of their own, with the core as it is installed and with both cores under the sanitizers."""

import os
import subprocess
import sys

import pytest
import torch

from entcov import _cpu
from tests.emulator.build import preload
from tests.fuzz import sanitized
from tests.fuzz.draws import seeds


def make_calls(count: int, options: list[str], environment: dict[str, str]) -> None:
    cases = list(seeds(count))
    command = [sys.executable, "-m", "tests.fuzz.malformed", str(cases[0]), str(len(cases)), *options]
    environment = environment | {"PYTHONPATH": str(sanitized.ROOT)}
    done = subprocess.run(command, env=environment, cwd=sanitized.ROOT, capture_output=True, text=True)
    printed = done.stdout.split()
    assert done.returncode == 0 and printed[-1:] == ["done"], (
        f"exit status {done.returncode}; ENTCOV_FUZZ_SEED={printed[-1] if printed else cases[0]} ENTCOV_FUZZ_CASES=1 "
        f"makes this case again\n{done.stderr[:4000]}\n...\n{done.stderr[-2000:]}"
    )


def test_as_installed():
    make_calls(100, [], dict(os.environ))


def test_cpu_core_under_the_sanitizers():
    make_calls(100, ["--cpu-core", str(sanitized.build())], sanitized.environment())


def test_cuda_kernels_under_the_sanitizers(products):
    make_calls(8, ["--cuda", str(products["asan"])], preload("asan") | sanitized.environment())


def test_as_many_threads_as_no_machine_starts():
    """OpenMP ends the process if it cannot start what it is asked for; every kernel asks for the processors at most."""
    code = """
import torch
from entcov.ops.clamp_bracket import clamp_bracket
from entcov.ops.clamp_partial import clamp_partial
from entcov.ops.clamp_refine import clamp_refine
from entcov.ops.clamp_sketch import clamp_sketch
from entcov.ops.clamped_stats import clamped_stats
from entcov.ops.core import RowSpec
from entcov.ops.message import message
from tests.support import local_ops as ops
torch.manual_seed(0)
z, target = torch.randn(64, 2000), torch.zeros(64, dtype=torch.int64)
def results():
    stats = ops.row_stats(z, target, 0, 2000, 1.0, True, -100)
    pair = ops.covariance_stats(z, z.flip(0), 0, 2000, 1.0, None)
    merged = ops.merge_row_stats(torch.stack([stats] * 99), target, 1.0, -100)
    pairs = ops.merge_covariance_stats(torch.stack([pair] * 99), None, 1.0)
    spec = RowSpec(0, 2000)
    whole, clamp, *values = clamped_stats(z, target, 700, spec, True)
    sketch = message(clamp_sketch(z, target, spec), target, 1, 0, 2000)
    bracket = clamp_bracket(sketch[None], target, 300, 100, spec)
    partial = message(clamp_partial(z, target, bracket, spec), target, 1, 0, 2000)
    found = clamp_refine(partial[None], target, whole, bracket, clamp, 300, spec)
    ones = torch.ones(64)
    grad = ops.logits_grad(z, target, whole, ones, ones, ones, clamp, 0, 2000, 1.0, -100)
    change = ops.logit_covariance_grad(z, z.flip(0), pair, ones, ones, ones, None, 0, 2000, 1.0)
    return stats, pair, merged, pairs, whole, clamp, *values, sketch, bracket, partial, *found, grad, change
torch.get_num_threads = lambda: 1
one = results()
for threads in (100_000, 2**31 - 1, 0, -1):
    torch.get_num_threads = lambda: threads
    assert all(torch.equal(a, b) for a, b in zip(results(), one, strict=True)), threads
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=sanitized.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", (done.returncode, done.stderr[-2000:])


def test_no_name_of_an_instruction_set_is_an_error():
    with pytest.raises(TypeError):
        _cpu.set_isa(None)


def test_none_in_place_of_a_tensor_is_named():
    z, target = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    for arguments, name in (((None, target), "logits"), ((z, None), "target")):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
            torch.ops.entcov.row_stats(*arguments, 0, 5, 1.0, -100, False, False)
