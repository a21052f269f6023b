"""Covariance, summary and selections of one process in torch operations: what the kernels of entcov/ops did before they
were kernels. They must choose the same tokens and give the same bits."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

DIGIT_BITS, BINS = 16, 2**16
COARSE, FINE, LARGEST = 2.0**10, 2.0**31, 2.0**20
MAP_WORDS = 2**16
GOLDEN = 0x9E3779B97F4A7C15
SIGN = -(2**63)


def fixed_point(x: Tensor) -> Tensor:
    coarse = (x * COARSE).round()
    fine = ((x * COARSE - coarse) * FINE).round()
    return torch.stack([coarse, fine], dim=-2).long()


def from_fixed_point(sums: Tensor) -> Tensor:
    return sums[..., 0].double() / COARSE + sums[..., 1].double() / (COARSE * FINE)


def means(values: list[Tensor], mask: Tensor, eps: float = 0.0) -> Tensor:
    """[k]; the values are good and some token is under the mask."""
    stacked = torch.where(mask, torch.stack([v.double() for v in values]), 0.0)
    return from_fixed_point(fixed_point(stacked).sum(-1)) / (mask.sum() + eps)


def covariance(logprob: Tensor, advantage: Tensor, mask: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """(value [T], means [2])."""
    mean = means([logprob, advantage], mask, eps)
    stacked = torch.where(mask, torch.stack([logprob.double(), advantage.double()]), 0.0)
    centred = stacked - mean[:, None]
    return torch.where(mask, (centred[0] * centred[1]).float(), 0.0), mean


def float_key(x: Tensor) -> Tensor:
    bits = (x + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def key_to_float(key: Tensor) -> Tensor:
    return torch.where(key >= 2**31, key - 2**31, -1 - key).int().view(torch.float32)


def radix_select(key: Tensor, valid: Tensor, rank: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(threshold [m], how many of those equal to it belong to the top rank[j] [m], number of valid keys)."""
    m, T = len(rank), len(key)
    digits = key.contiguous().view(torch.uint16).view(T, 64 // DIGIT_BITS)
    digits = digits if sys.byteorder == "little" else digits.flip(1)
    member, prefix, total = valid.expand(m, T), torch.zeros_like(rank), None
    first_bin = torch.arange(m)[:, None] * BINS
    for place in reversed(range(bits // DIGIT_BITS)):
        digit = digits[:, place].long()
        histogram = torch.zeros(m * BINS, dtype=torch.int64)
        histogram.scatter_add_(0, (digit + first_bin).flatten(), member.flatten().long())
        up_to = histogram.view(m, BINS).cumsum(1)
        members = up_to[:, -1]
        if total is None:
            total = members[0]
            rank = torch.minimum(rank, total)
        chosen = torch.searchsorted(up_to, (members - rank)[:, None], right=True).clamp(max=BINS - 1)
        rank = rank - (members - up_to.gather(1, chosen)[:, 0])
        prefix = (prefix << DIGIT_BITS) | chosen[:, 0]
        if place > 0:
            member = member & (digit == chosen)
    return prefix, rank, total


def summary(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, largest, 99.9 percent quantile)."""
    n = mask.sum()
    rank = torch.stack([torch.ones_like(n), n - (999 * n + 999) // 1000 + 1])
    key, _, _ = radix_select(float_key(value), mask, rank, 32)
    largest, quantile = key_to_float(key).unbind()
    return from_fixed_point(fixed_point(value.double()).sum(-1)) / n, largest, quantile


def token_hash(token_id: Tensor, seed: int, step: int) -> Tensor:
    h = _mix(_spread(token_id))
    h = _mix(h + _spread(seed))
    return _mix(h + _spread(step))


def _spread(x):
    return (x + 1) * _int64(GOLDEN) if isinstance(x, Tensor) else _int64((x + 1) * GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _int64(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


def repeated(token_id: Tensor, mask: Tensor) -> int:
    """At least so many ids under the mask repeat, by the map of bits."""
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    first, last = token_id.masked_fill(~mask, high).amin(), token_id.masked_fill(~mask, low).amax()
    stride = ((last.double() - first).clamp(min=0) / (64 * MAP_WORDS - 2)).long() + 1
    place = token_id.div(stride, rounding_mode="floor")
    checked = mask & (place * stride == token_id)
    bit = torch.bitwise_left_shift(torch.ones_like(place), place & 63)
    bits = torch.zeros(MAP_WORDS, dtype=torch.int64)
    bits.scatter_add_(0, (place >> 6) & (MAP_WORDS - 1), torch.where(checked, bit, 0))
    return int(checked.sum()) - sum((x & (2**64 - 1)).bit_count() for x in bits[bits != 0].tolist())


class Chosen(NamedTuple):
    mask: Tensor
    threshold: float | None
    due: int
    repeated: int


def select(
    value: Tensor, mask: Tensor, token_id: Tensor, *, ratio: float, seed: int, step: int, at_least: int = 0,
    round_up: bool = False, interval: tuple[float, float] | None = None, strict: bool = False,
    exclude: Tensor | None = None,
) -> Chosen:  # fmt: skip
    """select_clip_cov if there is an interval, else select_largest."""
    share = mask.sum().double() * ratio
    n = (share + 0.9999 if round_up else share).long().clamp(min=at_least)

    def draw(candidate: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        key = token_hash(token_id, seed, step)
        threshold, _, total = radix_select(key, candidate, n[None], 64)
        return candidate & ((key ^ SIGN) >= (threshold ^ SIGN)) & (n > 0), total

    if interval is not None:
        low, high = interval
        inside = (value > low) & (value < high) if strict else (value >= low) & (value <= high)
        candidate = mask & inside if exclude is None else mask & inside & ~exclude
        chosen, candidates = draw(candidate, n)
        return Chosen(chosen, None, int(torch.minimum(n, candidates)), repeated(token_id, mask))
    n = torch.minimum(n, mask.sum())
    key = float_key(value)
    threshold, of_tied, _ = radix_select(key, mask, n[None], 32)
    some = n > 0
    from_tied, _ = draw(mask & (key == threshold) & some, of_tied[0])
    chosen = (mask & (key > threshold) & some) | from_tied
    smallest = float(key_to_float(threshold)[0]) if some else torch.inf
    return Chosen(chosen, smallest, int(n), repeated(token_id, mask))
