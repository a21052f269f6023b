"""A program for the sanitizer: runs every op with GPU kernels once for each dtype, path and alignment, at small shapes,
and the selections of tokens.

Inputs are made on the CPU and copied, so that hardly any kernel but ours runs.
"""

import argparse
import itertools
import sys

import torch

from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import covariance_summary, token_covariance
from entcov.objective.token_means import token_means
from entcov.ops.clamp_bracket import clamp_bracket
from entcov.ops.clamp_partial import clamp_partial
from entcov.ops.clamp_refine import clamp_refine
from entcov.ops.clamp_sketch import clamp_sketch
from entcov.ops.clamped_stats import clamped_stats
from entcov.ops.core import RowSpec
from entcov.ops.covariance_stats import covariance_stats
from entcov.ops.logit_covariance_grad import logit_covariance_grad
from entcov.ops.logits_grad import logits_grad, logits_grad_
from entcov.ops.merge_covariance_stats import merge_covariance_stats
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.message import message
from entcov.ops.row_stats import row_stats
from entcov.stats.sharded_clamp import MOST_ROUNDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One column, a short row for one warp, two for a block, and one that is cut into segments. None is a multiple of 8.
COLUMNS = (1, 7, 1003, 9001, 40005)
OFFSETS = (0, 1)  # of the first row from a 16-byte boundary, in elements
TEMPERATURE, IGNORED, CALL = 0.7, -100, 12345


def place(rows: torch.Tensor, offset: int, device: str) -> torch.Tensor:
    """The rows on the device, with 3 other elements between rows and `offset` elements before the first."""
    T, V = rows.shape
    memory = torch.full((offset + T * (V + 3),), torch.nan, dtype=rows.dtype)
    memory.as_strided((T, V), (V + 3, 1), offset).copy_(rows)
    return memory.to(device).as_strided((T, V), (V + 3, 1), offset)


def run_all(device: str) -> int:
    calls = 0
    cases = list(itertools.product(COLUMNS, DTYPES, OFFSETS))  # the short rows first: they take least
    for n, (V, dtype, offset) in enumerate(cases, 1):
        calls += run_ops(dtype, V, offset, device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"sanitizer target: {n} of {len(cases)} ({V} columns, {dtype}, offset {offset})", flush=True)
    return calls + sum(run_selections(T, device) for T in (0, 1, 5001))


def run_ops(dtype: torch.dtype, V: int, offset: int, device: str) -> int:
    """Every op on rows of V columns; returns how many calls. The other launchers of csrc/kernels.h are run_clamp's."""
    generator = torch.Generator().manual_seed(V)
    T = 5
    rows = 3 * torch.randn(T, V + 1, generator=generator)  # the last column is padding
    rows[1, : V // 2] = -torch.inf
    rows = rows.to(dtype)
    old, new = place(rows, offset, device), place((rows.float() + 0.1).to(dtype), offset, device)
    whole = RowSpec(0, V, TEMPERATURE, IGNORED)
    shard = whole._replace(vocab_start=2, vocab_size=V + 2)  # of two columns before it
    target = torch.tensor([0, V - 1, IGNORED, V // 2, 0]).to(device)
    weight, mask = torch.linspace(0.5, 1.5, T).to(device), torch.tensor([True, True, False, True, True]).to(device)
    clamp = torch.tensor([[0.5, 0.25, 1.0, 0.5]]).repeat(T, 1).to(device)
    calls = 0
    for moments in (False, True):
        stats = row_stats(old, target, whole, moments, whole=True)[0]
        second = row_stats(old, target, shard, moments)
        first = row_stats(old[:, :2], target, shard._replace(vocab_start=0), moments)
        merge_row_stats(messages_of(first, second, target, V), target, shard, moments)
        calls += 6
    for clamped in (None, clamp):
        given = (target, stats, clamped, (weight, weight, None if clamped is None else weight), whole)
        logits_grad(old, *given)
        logits_grad_(place(rows, offset, device), *given)
        calls += 2
    for kept in (1, V // 2 + 1):
        clamped_stats(old, target, min(kept, V), whole)
        calls += 1
    pair = covariance_stats(old, new, mask, whole, whole=True)[0]
    second = covariance_stats(old, new, mask, shard)
    first = covariance_stats(old[:, :2], new[:, :2], mask, shard._replace(vocab_start=0))
    merge_covariance_stats(messages_of(first, second, mask.long(), V), mask, T, shard)
    logit_covariance_grad(old, new, mask, pair, (weight, weight, weight), whole)
    return calls + 7 + run_clamp((old, new), target, V)


def run_selections(T: int, device: str) -> int:
    """Covariance, summary and both selections of T tokens, of which a block takes 2,048; returns how many calls."""
    generator = torch.Generator().manual_seed(T)
    logprob, advantage = -torch.rand(T, generator=generator), torch.randn(T, generator=generator).round()
    mask, ids = torch.rand(T, generator=generator) < 0.8, torch.randperm(T, generator=generator)
    logprob, advantage, mask, ids = (x.to(device) for x in (logprob, advantage.double(), mask, ids))
    scores = token_covariance(logprob, advantage, mask, empty_ok=True)
    token_means({"advantage": advantage}, mask, empty_ok=True)
    covariance_summary(scores)
    select_clip_cov(scores, ids, ratio=0.01, low=-0.5, high=0.5, seed=0, step=0, exclude=~mask)
    select_largest(scores, ids, ratio=0.01, seed=0, step=0)
    return 8


def messages_of(first: torch.Tensor, second: torch.Tensor, values: torch.Tensor, V: int) -> torch.Tensor:
    """Messages of two ranks, of which the first has two columns and the second the V after them."""
    return torch.stack((message(first, values, CALL, 0, 2), message(second, values, CALL, 2, V)))


def run_clamp(shards: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor, V: int) -> int:
    """The steps of a clamp over two ranks with V columns each, all of its rounds."""
    starts, spec = (0, V), RowSpec(0, 2 * V, TEMPERATURE, IGNORED)
    specs = [spec._replace(vocab_start=start) for start in starts]
    shards = [logits[:, :V] for logits in shards]

    def sent(payloads):
        return torch.stack([message(x, target, CALL, start, V) for x, start in zip(payloads, starts, strict=True)])

    sketches = sent([clamp_sketch(x, target, s) for x, s in zip(shards, specs, strict=True)])
    bracket = clamp_bracket(sketches, target, V, V // 10, spec)
    clamp, found = torch.zeros(len(target), 4, device=target.device), None
    for _ in range(MOST_ROUNDS):
        partials = sent([clamp_partial(x, target, bracket, s) for x, s in zip(shards, specs, strict=True)])
        if found is None:
            found = merge_row_stats(partials, target, spec)
        bracket, clamp, _, _ = clamp_refine(partials, target, found[0], bracket, clamp, V, spec)
    return 6 + 5 * MOST_ROUNDS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    print(f"sanitizer target: all ops ran, {run_all(parser.parse_args().device)} calls")
    sys.stdout.flush()
