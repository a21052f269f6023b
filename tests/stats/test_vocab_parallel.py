"""token_stats and logit_covariance over gloo groups of 2 and 4 processes; the cases are in
tests/support/gloo_cases.py.

One group a world size runs all cases, since starting processes is what takes time.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from entcov.verify import reference
from tests.support import gloo_cases
from tests.support.processes import LIMIT
from tests.support.thread_ranks import ThreadRanks


def start(rank, world, folder, *only, **environment):
    command = [sys.executable, "-m", "tests.support.gloo_cases", str(rank), str(world), str(folder / "rendezvous"),
               str(folder / f"report{rank}.json"), *only]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes):
    """[(exit code, stdout, stderr)]; whatever happens, nothing is left running."""
    deadline = time.monotonic() + LIMIT
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
    results = finish([start(rank, request.param, folder) for rank in range(request.param)])
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
    (few_out, few_err, few_code), (many_out, _, many_code), *detail = finish(processes)
    assert many_code == 0 and many_out.startswith("RuntimeError: token_stats: ")
    assert "same tokens: rank 0 has 4, rank 1 has 64" in many_out or "equally many tokens" in many_out
    assert few_out.startswith("RuntimeError: token_stats: ") or (few_code != 0 and "mismatch" in few_err)
    for out, err, code in detail:
        assert code == 0, err
        assert out.startswith("RuntimeError: token_stats: the all-gather of [T = ") and "equally many tokens" in out


def test_ranks_in_threads_get_the_values_of_whole_rows(monkeypatch):
    """Three equal shards by default placing, of which the last one ends in padding; values and gradients in float64."""
    T, width, vocab_size = 6, 16, 43
    generator = torch.Generator().manual_seed(1)
    logits, after = (3 * torch.randn(T, 3 * width, generator=generator) for _ in range(2))
    target = torch.tensor([0, 15, 16, 40, 42, 7])
    ranks = ThreadRanks(3, monkeypatch)

    def call(rank):
        own = slice(width * rank, width * (rank + 1))
        leaf, new = logits[:, own].clone().requires_grad_(), after[:, own].clone().requires_grad_()
        place = {"group": ranks, "vocab_size": vocab_size, "temperature": 0.7}
        stats = token_stats(leaf, target, moments=True, clamp_p=0.3, **place)
        change = logit_covariance(logits[:, own], new, **place)
        total = stats.logprob + 2 * stats.entropy + 3 * stats.clamped_entropy
        gradients = torch.autograd.grad(total.sum(), leaf), torch.autograd.grad((change[0] + change[3]).sum(), new)
        found = stats._asdict() | change._asdict()
        return {name: x.detach() for name, x in found.items()}, [x for pair in gradients for x in pair]

    whole, changed = logits.double().requires_grad_(), after.double().requires_grad_()
    expected = reference.token_stats(whole, target, vocab_size=vocab_size, temperature=0.7, clamp_p=0.3)
    change = reference.logit_covariance(logits.double(), changed, vocab_size=vocab_size, temperature=0.7)
    total = expected["logprob"] + 2 * expected["entropy"] + 3 * expected["clamped_entropy"]
    gradients = [
        torch.autograd.grad(total.sum(), whole)[0],
        torch.autograd.grad((change["covariance"] + change["kl"]).sum(), changed)[0],
    ]
    for rank, (values, gradient) in enumerate(ranks.run(call)):
        for name, want in (expected | change).items():
            torch.testing.assert_close(values[name].double(), want.detach(), atol=2e-5, rtol=2e-5, msg=name)
        for got, want in zip(gradient, gradients, strict=True):
            torch.testing.assert_close(got.double(), want[:, width * rank : width * (rank + 1)], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "starts, vocab_size, message",
    [
        ((0, 16, 33), 49, "rank 2 starts at 33, leaving a hole from 32"),
        ((0, 16, 31), 47, "rank 2 starts at 31, overlapping what ends at 32"),
        ((0, 16, 32), 50, "they end at 48, vocab_size is 50"),
    ],
)
def test_shards_in_threads_that_do_not_cover_the_vocabulary_once(monkeypatch, starts, vocab_size, message):
    ranks = ThreadRanks(3, monkeypatch)

    def call(rank):
        with pytest.raises(RuntimeError, match=message):
            place = {"group": ranks, "vocab_start": starts[rank], "vocab_size": vocab_size}
            token_stats(torch.zeros(2, 16), torch.tensor([0, 1]), **place)

    ranks.run(call)
