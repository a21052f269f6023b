"""Divides a mini-batch over replicas, micro-batches and context-parallel ranks, and builds the model's inputs.

Every process sees the whole mini-batch in its node's memory and computes the same division, so nothing is communicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from entcov.controls import Selection
from entcov.rl.batch import IGNORE_INDEX, Batch, micro_batches


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences of a mini-batch, and this rank's inputs and loss tokens of them.

    The logit row `places[k]` belongs to token `rows[k]` of `sequences`.
    """

    sequences: Batch  # without padding
    inputs: dict[str, Any]  # keyword arguments of GPTModel.forward
    target: Tensor  # the logits' leading shape, int64; IGNORE_INDEX where nothing is learned
    places: Tensor  # [k] int64: the logit rows, flattened, whose target is not IGNORE_INDEX
    rows: Tensor  # [k] int64: entries of `sequences` that are this rank's loss tokens, in the logits' order

    def local(self, selection: Selection | None) -> Selection | None:
        """A selection of the loss tokens of `sequences` -> of this rank's, in the logits' order."""
        if selection is None:
            return None
        numbers = self.sequences.loss_mask.cumsum(0) - 1  # among the loss tokens
        return selection.at(numbers[self.rows])


def assign_to_replicas(
    lengths: tuple[int, ...], replicas: int, max_tokens: int, padded: bool, temperatures: Sequence[float | None] = ()
) -> list[list[list[int]]]:
    """Sequence numbers by replica and micro-batch.

    Sequences go, longest first, to the replica with the fewest tokens so far. Each replica then makes its micro-batches
    as the transformers backend does. Replicas may have different numbers of them, none included.

    Args:
        lengths: tokens of each sequence, its own padding included.
        max_tokens: of one micro-batch of one replica, before context parallelism splits it.
        temperatures: of each sequence, one a micro-batch; none given: they are equal.
    """
    loads = [(0, replica) for replica in range(replicas)]  # a heap: tokens so far
    members: list[list[int]] = [[] for _ in range(replicas)]
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        load, lightest = loads[0]
        heapreplace(loads, (load + lengths[s], lightest))
        members[lightest].append(s)
    return [
        [
            [own[i] for i in group]
            for group in micro_batches(
                [lengths[s] for s in own], max_tokens, padded, [temperatures[s] for s in own] if temperatures else ()
            )
        ]
        for own in members
    ]


def dummy_micro_batch(batch: Batch) -> Batch:
    """The batch's shortest sequence without a loss: what a replica without a sequence runs."""
    micro = batch.subset([batch.lengths.index(min(batch.lengths))])
    return replace(micro, loss_mask=torch.zeros_like(micro.loss_mask))


def build_inputs(sequences: Batch, *, unit: int, packing: bool, context_parallel: int, context_rank: int) -> MicroBatch:
    """The model's inputs for this rank.

    Each sequence is padded at its end to a multiple of `unit`; causal attention keeps padding from its tokens. Under
    context parallelism this rank takes chunks r and 2 C - 1 - r of the 2 C chunks of each sequence (or row).

    Args:
        sequences: on the model's device.
        packing: one row with all sequences and their boundaries (THD), or a row a sequence, padded to the longest.
    """
    starts = list(accumulate(sequences.lengths, initial=0))
    padding = len(sequences.tokens)  # the entry of a padding position
    padded = [padded_length(n, unit) for n in sequences.lengths]
    widths = padded if packing else [max(padded)] * len(padded)
    entries, positions = [], []
    for s, width in enumerate(widths):
        row = F.pad(torch.arange(starts[s], starts[s + 1]), (0, width - sequences.lengths[s]), value=padding)
        entries.append(_own_chunks(row, context_parallel, context_rank))
        positions.append(_own_chunks(torch.arange(width), context_parallel, context_rank))
    join = (lambda rows: torch.cat(rows)[None]) if packing else torch.stack
    entry, position = (join(rows).to(sequences.tokens.device) for rows in (entries, positions))
    target = F.pad(sequences.target, (0, 1), value=IGNORE_INDEX)[entry]
    inputs = {
        "input_ids": F.pad(sequences.tokens, (0, 1))[entry].long(),
        "position_ids": position,
        "attention_mask": None,
    }
    if packing:
        # Padding belongs to its sequence, so there is none between sequences: Transformer Engine, given bounds with
        # padding too, would compare the two on the host.
        bounds = torch.tensor([0, *widths], device=sequences.tokens.device).cumsum(0).int()
        inputs["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(widths),
            max_seqlen_kv=max(widths),
        )  # fmt: skip
    # The one wait for the device: before the passes, and not in every pass.
    places = (target != IGNORE_INDEX).flatten().nonzero()[:, 0]
    return MicroBatch(sequences, inputs, target, places, entry.flatten()[places])


def padded_length(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _own_chunks(row: Tensor, size: int, rank: int) -> Tensor:
    if size == 1:
        return row
    chunks = row.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
