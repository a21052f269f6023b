"""token_stats and logit_covariance over gloo groups of 2 and 4 processes; the cases are in gloo_cases.py.

One group a world size runs all cases, since starting processes is what takes time.
"""

import json
import os
import subprocess
import sys
import time

import pytest

from tests import gloo_cases


def start(rank, world, folder, *only, **environment):
    command = [sys.executable, "-m", "tests.gloo_cases", str(rank), str(world), str(folder / "rendezvous"),
               str(folder / f"report{rank}.json"), *only]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes, timeout):
    """[(exit code, stdout, stderr)]; whatever happens, nothing is left running."""
    deadline = time.monotonic() + timeout
    try:
        return [(*p.communicate(timeout=max(0.1, deadline - time.monotonic())), p.returncode) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request, tmp_path_factory):
    """{case: [traceback or None for each rank]}."""
    folder = tmp_path_factory.mktemp(f"gloo{request.param}")
    results = finish([start(rank, request.param, folder) for rank in range(request.param)], timeout=120)
    assert all(code == 0 for *_, code in results), [err[-2000:] for _, err, _ in results]
    reports = [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(request.param)]
    return {name: [report[name] for report in reports] for name in gloo_cases.CASES}


@pytest.mark.parametrize("name", gloo_cases.CASES)
def test_case_on_every_rank(outcomes, name):
    failures = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes[name]) if text is not None]
    assert not failures, "\n".join(failures)


def test_different_numbers_of_tokens_end_at_once_with_an_error(tmp_path):
    """The sizes of the messages differ then. gloo ends the process that gets more than it expects and says why; the
    other rank gets our error. With torch's debugging on, our error comes on both. Nobody waits for a timeout."""
    processes = []
    for name, environment in [("plain", {}), ("detail", {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})]:
        (tmp_path / name).mkdir()
        processes += [start(rank, 2, tmp_path / name, "different_tokens", **environment) for rank in range(2)]
    (few_out, few_err, few_code), (many_out, _, many_code), *detail = finish(processes, timeout=60)
    assert many_code == 0 and many_out.startswith("RuntimeError: token_stats: ")
    assert "same tokens: rank 0 has 4, rank 1 has 64" in many_out or "equally many tokens" in many_out
    assert few_out.startswith("RuntimeError: token_stats: ") or (few_code != 0 and "mismatch" in few_err)
    for out, err, code in detail:
        assert code == 0, err
        assert out.startswith("RuntimeError: token_stats: the all-gather of [T = ") and "equally many tokens" in out
