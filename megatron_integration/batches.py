"""A mini-batch over replicas, micro-batches and context-parallel ranks, and back.

Every rank holds the whole mini-batch and works out the same division, so nothing about it is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from entcov.rl.batch import IGNORE_INDEX, Batch, micro_batches


@dataclass(frozen=True)
class MicroBatch:
    """Some whole sequences of a mini-batch, and what this rank computes of them.

    The k-th logit row whose `target` is not IGNORE_INDEX belongs to token `rows[k]` of `part`, and so to token
    `index[rows[k]]` of the mini-batch.
    """

    part: Batch  # the sequences, without padding
    index: Tensor  # [n] int64, where part's tokens are in the mini-batch
    inputs: dict[str, Any]  # keyword arguments of GPTModel.forward
    target: Tensor  # the logits' leading shape, int64; IGNORE_INDEX where nothing is learned
    rows: Tensor  # [k] int64: entries of part that this rank's loss tokens are, in the logits' order

    def local(self, mask: Tensor | None) -> Tensor | None:
        """A selection over part's loss tokens, in part's order -> over this rank's, in the logits' order."""
        if mask is None:
            return None
        spread = torch.zeros_like(self.part.loss_mask)
        spread[self.part.loss_mask] = mask
        return spread[self.rows]


def divide(lengths: tuple[int, ...], replicas: int, max_tokens: int, padded: bool) -> list[list[list[int]]]:
    """Sequence numbers by replica and micro-batch.

    Sequences go, longest first, to the replica with the fewest tokens so far. Each replica then makes its micro-batches
    as the torch actor does. Replicas may have different numbers of them, none included.

    Args:
        lengths: tokens of each sequence, its own padding included.
        max_tokens: of one micro-batch of one replica, before context parallelism splits it.
    """
    loads = [0] * replicas
    members: list[list[int]] = [[] for _ in range(replicas)]
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        lightest = loads.index(min(loads))
        loads[lightest] += lengths[s]
        members[lightest].append(s)
    return [
        [[mine[i] for i in group] for group in micro_batches([lengths[s] for s in mine], max_tokens, padded)]
        for mine in members
    ]


def silent(batch: Batch) -> Batch:
    """The batch's shortest sequence without a loss: what a replica with no sequence of its own runs instead."""
    shortest = min(range(batch.num_sequences), key=lambda s: batch.lengths[s])
    part = batch.subset([shortest])
    return replace(
        part, loss_mask=torch.zeros_like(part.loss_mask), target=torch.full_like(part.target, IGNORE_INDEX)
    )


def lay_out(
    part: Batch, index: Tensor, *, unit: int, packing: bool, context_parallel: int, context_rank: int
) -> MicroBatch:
    """The model's inputs for this rank.

    Each sequence is padded at its end to a multiple of `unit`; causal attention keeps padding from its tokens. Under
    context parallelism this rank takes chunks r and 2 C - 1 - r of the 2 C chunks of each sequence (or row).

    Args:
        part: whole sequences, on the model's device.
        packing: one row with all sequences and their boundaries (THD), or a row a sequence, padded to the longest.
    """
    absent = len(part.tokens)  # the entry of a padding position
    starts = [0]
    for n in part.lengths:
        starts.append(starts[-1] + n)
    width = max(_padded(n, unit) for n in part.lengths)
    widths = [_padded(n, unit) if packing else width for n in part.lengths]
    entries, positions = [], []
    for s, (n, w) in enumerate(zip(part.lengths, widths, strict=True)):
        row = torch.full((w,), absent)
        row[:n] = torch.arange(starts[s], starts[s] + n)
        entries.append(_own_chunks(row, context_parallel, context_rank))
        positions.append(_own_chunks(torch.arange(w), context_parallel, context_rank))
    join = (lambda rows: torch.cat(rows)[None]) if packing else torch.stack
    entry, position = (join(rows).to(part.tokens.device) for rows in (entries, positions))
    target = _with_padding(part.target, IGNORE_INDEX)[entry]
    inputs = {"input_ids": _with_padding(part.tokens, 0)[entry], "position_ids": position, "attention_mask": None}
    if packing:
        bounds = torch.tensor([0, *widths], device=part.tokens.device).cumsum(0).int()
        inputs["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=bounds, cu_seqlens_kv_padded=bounds,
            max_seqlen_q=max(widths), max_seqlen_kv=max(widths),
        )  # fmt: skip
    return MicroBatch(part, index, inputs, target, entry[target != IGNORE_INDEX])


def _padded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _own_chunks(row: Tensor, size: int, rank: int) -> Tensor:
    if size == 1:
        return row
    chunks = row.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def _with_padding(values: Tensor, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((1,), fill)])
