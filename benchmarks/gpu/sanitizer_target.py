"""A program for the sanitizer: runs every op with GPU kernels once for each dtype, path and alignment, at small shapes.

Inputs are made on the CPU and copied, so that hardly any kernel but ours runs.
"""

import argparse
import itertools
import sys

import torch

from entcov import clamp_ops, clamp_rounds, ops, shard_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One column, a short row for one warp, two for a block, and one that is cut into segments. None is a multiple of 8.
COLUMNS = (1, 7, 1003, 9001, 40005)
OFFSETS = (0, 1)  # of the first row from a 16-byte boundary, in elements


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
    return calls


def run_ops(dtype: torch.dtype, V: int, offset: int, device: str) -> int:
    generator = torch.Generator().manual_seed(V)
    T, size = 5, V + 2  # two columns that this shard has not got, and one of padding
    rows = 3 * torch.randn(T, V + 1, generator=generator)
    rows[1, : V // 2] = -torch.inf
    rows = rows.to(dtype)
    old, new = place(rows, offset, device), place((rows.float() + 0.1).to(dtype), offset, device)
    target = torch.tensor([2, V + 1, -100, V // 2 + 2, 2]).to(device)
    weight, mask = torch.linspace(0.5, 1.5, T).to(device), torch.tensor([True, True, False, True, True]).to(device)
    shard, ignored = (2, size), -100
    calls = 0
    for moments in (False, True):
        stats = ops.row_stats(old, target, *shard, 0.7, moments, ignored)
        stats = ops.merge_row_stats(stats[None], target, 0.7, ignored)
        calls += 2
    message = shard_ops.shard_message(stats, [0, 2, 0, V], shard_ops.checksum(target))
    shard_ops.accept_shards(torch.stack((message, message)), 5, 2, 4)
    clamp = torch.tensor([[0.5, 0.25, 1.0, 0.5]]).repeat(T, 1).to(device)
    for clamped in (None, clamp):
        given = (stats, weight, weight, None if clamped is None else weight, clamped)
        ops.logits_grad(old, target, *given, *shard, 0.7, ignored)
        ops.logits_grad_(place(rows, offset, device), target, *given, *shard, 0.7, ignored)
        calls += 2
    for kept in (1, V // 2 + 1):
        clamp_ops.clamped_stats(old, target.clamp(max=V - 1), kept, V, 0.7, False, ignored)
        calls += 1
    if device == "cuda":  # the CPU takes other steps over ranks
        calls += clamp_over_two_ranks(old, new, target, ignored)
    pair = ops.covariance_stats(old, new, *shard, 0.7, mask)
    pair = ops.merge_covariance_stats(pair[None], mask, 0.7)
    ops.logit_covariance_grad(old, new, pair, weight, weight, weight, mask, *shard, 0.7)
    return calls + 6


def clamp_over_two_ranks(first: torch.Tensor, second: torch.Tensor, target: torch.Tensor, ignored: int) -> int:
    """The steps of a clamp whose two shards are these, all of its rounds."""
    width = first.shape[1]
    shards, size = ((first, 0), (second, width)), 2 * width
    sketches = torch.stack([clamp_rounds.clamp_sketch(x, target, start, size, ignored) for x, start in shards])
    columns = torch.full((2,), width, dtype=torch.int64, device=target.device)
    bracket = clamp_rounds.clamp_guess(sketches, columns, target, size, width, size // 20, ignored)
    clamp, stats = torch.zeros(len(target), 4, device=target.device), None
    for _ in range(clamp_rounds.MOST_ROUNDS):
        parts = [clamp_rounds.clamp_part(x, target, bracket, start, size, 0.7, ignored) for x, start in shards]
        parts = torch.stack(parts)
        if stats is None:
            stats = ops.merge_row_stats(parts[..., :4].contiguous(), target, 0.7, ignored)
        bracket, clamp, _ = clamp_rounds.clamp_narrow(
            parts[..., 4:], target, stats, bracket, clamp, width, 0.7, ignored
        )
    return 4 + 3 * clamp_rounds.MOST_ROUNDS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    print(f"sanitizer target: all ops ran, {run_all(parser.parse_args().device)} calls")
    sys.stdout.flush()
