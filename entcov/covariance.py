"""Token covariance and the selections of Clip-Cov and KL-Cov, exact over the optimizer's mini-batch.

Cov_i = (logprob_i - mean logprob) (advantage_i - mean advantage), means over all unmasked tokens of the mini-batch,
wherever they are: the tokens given to one call and those that the other ranks of `group` give to theirs.

The chosen set is bit-identical for every split of the batch, every order of the tokens and every number of ranks:
  - Sums are integers. Each value is written in fixed point as coarse * 2^-10 + fine * 2^-41, and the two integers are
    added in int64, where addition is associative. Floating sums in another order differ in the last bit, and that
    bit moves borderline tokens in and out. A value is off by at most 2^-42; 2^32 tokens of |value| <= 2^20 fit.
  - A token's covariance is computed in float64 from its own values and these means and rounded once to float32, so
    it is a function of the token and the global sums alone. All comparisons are between those float32 values.
  - The n-th largest of a key is found by a radix search: a histogram of 16 bits of the key, summed over ranks, picks
    the next 16 bits. Integers again; the number of collectives depends on the key's width alone, not on the data.
  - Draws and ties go by a 64-bit hash of (seed, step, token_id) that is one-to-one in token_id.
Ranks may hold different numbers of tokens, none included. Nothing makes the host wait on an accelerator: values are
checked on the CPU only, and elsewhere bad values show as NaN in the covariance and its summary. Shapes depend on T and
the number of ranks alone, so calls can be captured in a CUDA graph (with `step` as a tensor there: a number would be
part of the capture). The bits are the same on every device.

What an accelerator does for T tokens (tests/test_covariance.py counts it; reads plus writes of the T-sized operations):
  token_covariance 37 launches, 609 bytes a token       covariance_summary 72 launches, 474 bytes a token
  select_clip_cov 119 launches, 951 bytes a token       select_kl_cov     170 launches, 1166 bytes a token
For KL-Cov on a million tokens that is 0.6 ms at 3 TB/s, and launches of about a millisecond, once in an optimizer step
that takes seconds. A kernel of our own would save most of it, and is not worth its code.

Source: Cui et al., "The Entropy Mechanism of RL for Reasoning Language Models", arXiv 2505.22617, eq. 10.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import _checks as check

COARSE = 2.0**10
FINE = 2.0**31  # of a remainder of at most 1/2: 2^30 a token
LARGEST = 2.0**20
DIGIT_BITS = 16
BINS = 2**DIGIT_BITS  # of a histogram: 512 KiB of int64
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
SIGN = -(2**63)


@dataclass(frozen=True)
class TokenCovariance:
    value: Tensor  # [T] float32, 0 outside the mask
    mask: Tensor  # [T] bool
    num_tokens: Tensor  # 0-d int64, under the mask, over all ranks
    mean_logprob: Tensor  # 0-d float64
    mean_advantage: Tensor  # 0-d float64


@dataclass(frozen=True)
class Selection:
    mask: Tensor  # [T] bool, the chosen tokens among those of this call
    count: Tensor  # 0-d int64, chosen over all ranks
    threshold: Tensor | None = None  # 0-d float32: smallest chosen covariance (KL-Cov), inf if none is chosen


@torch.no_grad()
def token_covariance(
    logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    denominator_eps: float = 0.0,
    empty_ok: bool = False,
) -> TokenCovariance:
    """Covariance of every unmasked token over the whole mini-batch.

    Equivalent to `(logprob - logprob[mask].mean()) * (advantage - advantage[mask].mean())`, in exact arithmetic up to
    2^-42 in the means and one rounding to float32.

    Args:
        logprob: [T] float32 or float64, nats, of the current policy.
        advantage: [T] float32 or float64.
        mask: [T] bool. Values outside it are not used.
        group: data-parallel group that shares the mini-batch. None: all of it is here (not torch's default group).
        denominator_eps: added to the token count in the means; verl's masked_mean has 1e-8.
        empty_ok: with no unmasked token anywhere, return zeros instead of an error.
    Not differentiable (constants, as in the method). Nothing is mutated.
    Collectives: 1 all-reduce of 48 bytes; every rank must call.
    Raises: TypeError, ValueError for dtypes and shapes, on the rank that has them; ValueError on every rank (CPU) if
        any unmasked value of any rank is not finite or exceeds 2^20, or no token is unmasked on any rank.
    """
    check.vector("logprob", logprob, (torch.float32, torch.float64))
    check.vector("advantage", advantage, (torch.float32, torch.float64), logprob)
    check.vector("mask", mask, (torch.bool,), logprob)
    values = torch.where(mask, torch.stack([logprob, advantage]).double(), 0.0)
    bad = ~(values.abs() <= LARGEST)  # NaN too
    sums = torch.cat(
        [
            _fixed_point(torch.where(bad, 0.0, values)).sum(-1).flatten(),
            torch.stack([mask.sum(), bad.sum()]),
        ]
    )
    sums = _sum_over_ranks(sums, group)
    num_tokens, num_bad = sums[4], sums[5]
    if check.readable(sums):
        if num_bad > 0:
            raise ValueError(
                f"logprob and advantage must be finite and at most 2^20 in size under the mask: {int(num_bad)} of "
                f"{2 * int(num_tokens)} values over all ranks are not, {int(bad[0].sum())} in logprob and "
                f"{int(bad[1].sum())} in advantage on this rank"
            )
        if num_tokens == 0 and not empty_ok:
            raise ValueError("mask must have a True token on at least one rank, got none in the whole mini-batch")
    mean = _from_fixed_point(sums[:4].reshape(2, 2)) / (num_tokens + denominator_eps)
    mean = torch.where(num_bad > 0, torch.nan, mean)
    centred = values - mean[:, None]
    value = torch.where(mask, (centred[0] * centred[1]).float(), 0.0)
    return TokenCovariance(value, mask, num_tokens, mean[0], mean[1])


@torch.no_grad()
def covariance_summary(covariance: TokenCovariance, *, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Mean, largest value and 99.9 percent quantile of the covariance over the whole mini-batch, exact.

    The quantile is the smallest value with at least 99.9 percent of the tokens at or below it.

    Returns: {"actor/cov_mean", "actor/cov_max", "actor/cov_p999"}, 0-d tensors, the same on every rank and split: they
        describe the mini-batch and must not be added up. The mean is the population covariance.
    Collectives: 3 all-reduces, 2 MiB in total.
    """
    sums = _sum_over_ranks(_fixed_point(covariance.value.double()).sum(-1), group)
    n = covariance.num_tokens
    rank = torch.stack([torch.ones_like(n), n - (999 * n + 999) // 1000 + 1])
    key, _, _ = _radix_select(_float_key(covariance.value), covariance.mask, rank, 32, group)
    largest, quantile = _key_to_float(key).unbind()
    return {
        "actor/cov_mean": _from_fixed_point(sums) / n + 0.0 * covariance.mean_logprob,  # NaN if the inputs were bad
        "actor/cov_max": largest,
        "actor/cov_p999": quantile,
    }


@torch.no_grad()
def select_clip_cov(
    covariance: TokenCovariance,
    token_id: Tensor,
    *,
    ratio: float,
    low: float,
    high: float,
    seed: int | Tensor,
    step: int | Tensor,
    at_least: int = 0,
    strict: bool = False,
    exclude: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """A uniform draw of floor(ratio * N) tokens, without replacement, among those with low <= covariance <= high.

    Uniform in the sense of a hash: the candidates with the largest hash of (seed, step, token_id) are taken.

    Args:
        token_id: [T] int64, number of each token in the whole rollout batch, different for all unmasked tokens.
        ratio: fraction of all N unmasked tokens of the mini-batch; all candidates are taken if they are fewer.
        seed, step: any integers; the draw changes with each. In a CUDA graph: a 0-d int64 tensor on the device.
        at_least: lower bound of the number of tokens to take (reference code: 1).
        strict: low < covariance < high (reference code).
        exclude: [T] bool, tokens that are no candidates.
    Collectives: 5 all-reduces of at most 512 KiB; every rank must call.
    Raises: ValueError (CPU) if token ids repeat.
    """
    check.fraction("ratio", ratio)
    value = covariance.value
    inside = (value > low) & (value < high) if strict else (value >= low) & (value <= high)
    candidate = inside & covariance.mask
    if exclude is not None:
        check.vector("exclude", exclude, (torch.bool,), value)
        candidate = candidate & ~exclude
    n = _count(covariance, ratio, at_least)
    chosen, num_candidates = _draw(token_id, candidate, n, seed, step, group)
    return _finish(chosen, torch.minimum(n, num_candidates), token_id, covariance.mask, None, group)


@torch.no_grad()
def select_kl_cov(
    covariance: TokenCovariance,
    token_id: Tensor,
    *,
    ratio: float,
    seed: int | Tensor,
    step: int | Tensor,
    at_least: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """The floor(ratio * N) tokens with the largest covariance; a tie at the threshold is settled by the hash.

    Args: as `select_clip_cov`.
    Collectives: 7 all-reduces of at most 512 KiB; every rank must call.
    Raises: ValueError (CPU) if token ids repeat.
    """
    check.fraction("ratio", ratio)
    n = torch.minimum(_count(covariance, ratio, at_least), covariance.num_tokens)
    key = _float_key(covariance.value)
    threshold, of_tied, _ = _radix_select(key, covariance.mask, n[None], 32, group)
    some = n > 0
    tied = covariance.mask & (key == threshold) & some
    from_tied, _ = _draw(token_id, tied, of_tied[0], seed, step, group)
    chosen = (covariance.mask & (key > threshold) & some) | from_tied
    lowest = torch.where(some, _key_to_float(threshold)[0], torch.inf)
    return _finish(chosen, n, token_id, covariance.mask, lowest, group)


def token_hash(token_id: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """64-bit hash of (seed, step, token_id) as int64 [T], one-to-one in token_id. seed, step: integers or 0-d int64.

    SplitMix64's finaliser, applied to token_id, then seed, then step.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014 (constants: Stafford's mix13).
    """
    h = _mix(_spread(token_id))
    h = _mix(h + _spread(seed))
    return _mix(h + _spread(step))


def _spread(x: int | Tensor) -> int | Tensor:
    """(x + 1) * GOLDEN modulo 2^64."""
    return (x + 1) * _int64(GOLDEN) if isinstance(x, Tensor) else _int64((x + 1) * GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _int64(x: int) -> int:
    """The int64 that equals x modulo 2^64; int64 tensors wrap around, so arithmetic modulo 2^64 needs no more."""
    return (x + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch's own copies the sign), defined for 64 bits too."""
    if bits == 0:
        return x
    return (x >> bits) & (2 ** (64 - bits) - 1) if bits < 64 else torch.zeros_like(x)


def _sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _fixed_point(x: Tensor) -> Tensor:
    """float64 [..., T], at most 2^20 in size -> int64 [..., 2, T]: coarse and fine part."""
    coarse = (x * COARSE).round()
    fine = ((x * COARSE - coarse) * FINE).round()
    return torch.stack([coarse, fine], dim=-2).long()


def _from_fixed_point(sums: Tensor) -> Tensor:
    return sums[..., 0].double() / COARSE + sums[..., 1].double() / (COARSE * FINE)


def _float_key(x: Tensor) -> Tensor:
    """float32 -> int64 in [0, 2^32) that sorts as the numbers do; -0 and 0 are the same."""
    bits = (x + 0.0).view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def _key_to_float(key: Tensor) -> Tensor:
    return torch.where(key >= 2**31, key - 2**31, -1 - key).int().view(torch.float32)


def _count(covariance: TokenCovariance, ratio: float, at_least: int) -> Tensor:
    """floor(ratio * N) in float64, as Python's int(ratio * N)."""
    return (covariance.num_tokens.double() * ratio).long().clamp(min=at_least)


def _radix_select(
    key: Tensor, valid: Tensor, rank: Tensor, bits: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rank[j]-th largest of the valid keys of all ranks, keys read as unsigned numbers of `bits` (32 or 64) bits.

    Args: key [T] int64, valid [T] bool, rank [m] int64, 1-based; it is lowered to the number of valid keys.
    Returns: (threshold [m], how many of the keys equal to the threshold belong to the top rank[j] [m], number of valid
        keys 0-d). With rank 0 the threshold is the largest possible key, and none of those equal to it belong.
    Collectives: bits / 16 all-reduces of m * 512 KiB.
    """
    m, T = len(rank), len(key)
    digits = key.contiguous().view(torch.uint16).view(T, 64 // DIGIT_BITS)  # no pass over memory to cut them out
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
        histogram = _sum_over_ranks(histogram, group).view(m, BINS)
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


def _draw(
    token_id: Tensor, candidate: Tensor, n: Tensor, seed: int | Tensor, step: int | Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The n candidates of all ranks with the largest hash (all, if fewer): mask [T], number of candidates."""
    check.vector("token_id", token_id, (torch.int64,), candidate)
    key = token_hash(token_id, seed, step)
    threshold, _, total = _radix_select(key, candidate, n[None], 64, group)
    reached = (key ^ SIGN) >= (threshold ^ SIGN)  # unsigned comparison
    return candidate & reached & (n > 0), total


def _finish(
    chosen: Tensor,
    expected: Tensor,
    token_id: Tensor,
    mask: Tensor,
    threshold: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Selection:
    count = _sum_over_ranks(chosen.sum(), group)
    if check.readable(count):
        ids = token_id[mask]
        if count != expected or len(ids.unique()) != len(ids):
            raise ValueError(
                "token_id must be different for every unmasked token of the mini-batch, on all ranks: "
                f"{len(ids) - len(ids.unique())} ids repeat on this rank, {int(count)} tokens were chosen where "
                f"{int(expected)} were due"
            )
    return Selection(chosen, count, threshold)
