"""The n-th largest key of all ranks, by a radix search.

Each round finds 16 bits of the answer from a histogram over those bits, summed over the ranks. Counts are integers, so
the answer is bit-identical for every split. The number of collectives depends on the key's width, not on the data.
"""

import sys

import torch
from torch import Tensor

from entcov.stats.ranks import AllReduces

DIGIT_BITS = 16
BINS = 2**DIGIT_BITS  # of a histogram: 512 KiB of int64


def float_key(x: Tensor) -> Tensor:
    """float32 -> int64 in [0, 2^32) that sorts as the numbers do; -0 and 0 are the same."""
    bits = (x + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def key_to_float(key: Tensor) -> Tensor:
    return torch.where(key >= 2**31, key - 2**31, -1 - key).int().view(torch.float32)


def radix_select(
    key: Tensor, valid: Tensor, rank: Tensor, bits: int, ranks: AllReduces
) -> tuple[Tensor, Tensor, Tensor]:
    """The rank[j]-th largest of the valid keys of all ranks, keys read as unsigned numbers of `bits` (32 or 64) bits.

    Args: key [T] int64, valid [T] bool, rank [m] int64, 1-based; it is lowered to the number of valid keys.
    Returns: (threshold [m], how many of the keys equal to the threshold belong to the top rank[j] [m], number of valid
        keys 0-d). With rank 0 the threshold is the largest possible key, and none of those equal to it belong.
    Collectives: bits / 16 all-reduces of m * 512 KiB.
    """
    m, T = len(rank), len(key)
    digits = key.contiguous().view(torch.uint16).view(T, 64 // DIGIT_BITS)  # a view, no copy
    digits = digits if sys.byteorder == "little" else digits.flip(1)
    member = valid.expand(m, T)
    prefix = torch.zeros_like(rank)
    total = None
    first_bin = torch.arange(m, device=key.device)[:, None] * BINS
    for place in reversed(range(bits // DIGIT_BITS)):
        digit = digits[:, place].long()
        # One-dimensional: there torch's deterministic mode has an answer, and integers add up to the same in any order.
        histogram = torch.zeros(m * BINS, dtype=torch.int64, device=key.device)
        histogram.scatter_add_(0, (digit + first_bin).flatten(), member.flatten().long())
        histogram = ranks.sum(histogram).view(m, BINS)
        up_to = histogram.cumsum(1)
        members = up_to[:, -1]
        if total is None:
            total = members[0]
            rank = torch.minimum(rank, total)
        chosen = torch.searchsorted(up_to, (members - rank)[:, None], right=True).clamp(max=BINS - 1)
        rank = rank - (members - up_to.gather(1, chosen)[:, 0])  # less those in higher bins
        prefix = (prefix << DIGIT_BITS) | chosen[:, 0]
        if place > 0:
            member = member & (digit == chosen)
    return prefix, rank, total
