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
Ranks may hold different numbers of tokens, none included. What they must agree on, and whether one of them has an error
to raise, travels in the first all-reduce of each call (entcov/ranks.py): where they do not agree, all of them raise, or
on an accelerator get results that cannot be taken for good ones.

No two tokens may have one id. Each sets the bit of its id in a map of 2^22 bits, and the maps are added up over ranks:
numbers with a bit in common have a sum with fewer bits. Ids are looked at as they are where they lie within 4,194,303
of one another; of ids that lie further apart, within s times that, every s-th is.

Nothing makes the host wait on an accelerator: values are
checked on the CPU only, and elsewhere bad values show as NaN in the covariance and its summary. Shapes depend on T and
the number of ranks alone, so calls can be captured in a CUDA graph (with `step` as a tensor there: a number would be
part of the capture). The bits are the same on every device.

What an accelerator does for T tokens (tests/test_covariance.py counts it; reads plus writes of the T-sized operations):
  token_covariance 37 launches, 609 bytes a token       covariance_summary 72 launches, 474 bytes a token
  select_clip_cov 169 launches, 1184 bytes a token      select_kl_cov     222 launches, 1399 bytes a token
For KL-Cov on a million tokens that is 0.6 ms at 3 TB/s, and launches of about a millisecond, once in an optimizer step
that takes seconds. A kernel of our own would save most of it, and is not worth its code.

Source: Cui et al., "The Entropy Mechanism of RL for Reasoning Language Models", arXiv 2505.22617, eq. 10.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import _checks as check
from entcov.ranks import AllReduces, attempt

COARSE = 2.0**10
FINE = 2.0**31  # of a remainder of at most 1/2: 2^30 a token
LARGEST = 2.0**20
DIGIT_BITS = 16
BINS = 2**DIGIT_BITS  # of a histogram: 512 KiB of int64
MAP_WORDS = 2**16  # of the map of token ids: 2^22 bits, 512 KiB
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
    Collectives: 1 all-reduce of 48 bytes, and 8 for each rank; every rank must call.
    Raises: TypeError, ValueError for dtypes and shapes; ValueError on every rank (CPU) if any unmasked value of any
        rank is not finite or exceeds 2^20, or no token is unmasked on any rank. RuntimeError where another rank failed
        or was called differently; on an accelerator the covariance is NaN there instead.
    """

    def checked() -> tuple[Tensor, Tensor, Tensor]:
        check.vector("logprob", logprob, (torch.float32, torch.float64))
        check.vector("advantage", advantage, (torch.float32, torch.float64), logprob)
        check.vector("mask", mask, (torch.bool,), logprob)
        check.number("denominator_eps", denominator_eps, 0.0)
        return logprob, advantage, mask

    tokens, failure = attempt(checked, group)
    device = _device_of(logprob, advantage, mask)
    call = {"denominator_eps": denominator_eps, "empty_ok": empty_ok}
    ranks = AllReduces("token_covariance", group, device, call, failure=failure)
    eps, empty_ok = (0.0, True) if failure else (denominator_eps, empty_ok)
    result = covariance_over(ranks, *(tokens or _no_tokens(device)), eps, empty_ok)
    ranks.finish()
    return result


def covariance_over(
    ranks: AllReduces, logprob: Tensor, advantage: Tensor, mask: Tensor, denominator_eps: float, empty_ok: bool
) -> TokenCovariance:
    """`token_covariance` with its one all-reduce."""
    values = torch.where(mask, torch.stack([logprob, advantage]).double(), 0.0)
    bad = ~(values.abs() <= LARGEST)  # NaN too
    sums = torch.cat(
        [
            _fixed_point(torch.where(bad, 0.0, values)).sum(-1).flatten(),
            torch.stack([mask.sum(), bad.sum()]),
        ]
    )
    sums = ranks.sum(sums)
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
    bad_anywhere = num_bad > 0 if ranks.refused is None else (num_bad > 0) | ranks.refused
    mean = torch.where(bad_anywhere, torch.nan, mean)
    centred = values - mean[:, None]
    value = torch.where(mask, (centred[0] * centred[1]).float(), 0.0)
    return TokenCovariance(value, mask, num_tokens, mean[0], mean[1])


@torch.no_grad()
def covariance_summary(covariance: TokenCovariance, *, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Mean, largest value and 99.9 percent quantile of the covariance over the whole mini-batch, exact.

    The quantile is the smallest value with at least 99.9 percent of the tokens at or below it.

    Returns: {"actor/cov_mean", "actor/cov_max", "actor/cov_p999"}, 0-d tensors, the same on every rank and split: they
        describe the mini-batch and must not be added up. The mean is the population covariance.
    Collectives: 3 all-reduces, 2 MiB in total; every rank must call, with the covariance of one `token_covariance`.
    Raises: RuntimeError where ranks do not; on an accelerator all values are NaN there instead.
    """
    _, failure = attempt(lambda: _check_covariance(covariance), group)
    if failure is not None:
        covariance = _nothing(_device_of())
    ranks = AllReduces("covariance_summary", group, covariance.value.device, _means(covariance), failure=failure)
    sums = ranks.sum(_fixed_point(covariance.value.double()).sum(-1))
    n = covariance.num_tokens
    rank = torch.stack([torch.ones_like(n), n - (999 * n + 999) // 1000 + 1])
    key, _, _ = _radix_select(_float_key(covariance.value), covariance.mask, rank, 32, ranks)
    ranks.finish()
    largest, quantile = _key_to_float(key).unbind()
    summary = {
        "actor/cov_mean": _from_fixed_point(sums) / n + 0.0 * covariance.mean_logprob,  # NaN if the inputs were bad
        "actor/cov_max": largest,
        "actor/cov_p999": quantile,
    }
    if ranks.refused is not None:
        summary = {name: torch.where(ranks.refused, torch.nan, value) for name, value in summary.items()}
    return summary


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
    Collectives: 5 all-reduces of at most 512 KiB and some words; every rank must call.
    Raises: TypeError, ValueError for arguments. ValueError on every rank if token ids repeat, on one rank or over
        ranks, among those that are looked at (head of this file). RuntimeError where another rank failed or was called
        differently. On an accelerator the last two show instead as a count of -1, a threshold of NaN, and a mask of all
        unmasked tokens, on every rank.
    """

    def check_own() -> None:
        check.number("low", low)
        check.number("high", high)
        if exclude is not None:
            check.vector("exclude", exclude, (torch.bool,), covariance.value)

    def choose(ranks: AllReduces, covariance: TokenCovariance, n: Tensor, draw: Callable):
        candidate, value = covariance.mask, covariance.value
        if ranks.failure is None:
            inside = (value > low) & (value < high) if strict else (value >= low) & (value <= high)
            candidate = candidate & inside if exclude is None else candidate & inside & ~exclude
        chosen, num_candidates = draw(candidate, n)
        return chosen, torch.minimum(n, num_candidates), None

    own = {"low": low, "high": high, "strict": strict}
    return _select(
        "select_clip_cov", group, covariance, token_id, ratio, at_least, seed, step, own, check_own, choose
    )  # fmt: skip


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
    Collectives: 7 all-reduces of at most 512 KiB and some words; every rank must call.
    Raises: as `select_clip_cov`.
    """

    def choose(ranks: AllReduces, covariance: TokenCovariance, n: Tensor, draw: Callable):
        n = torch.minimum(n, covariance.num_tokens)
        key = _float_key(covariance.value)
        threshold, of_tied, _ = _radix_select(key, covariance.mask, n[None], 32, ranks)
        some = n > 0
        from_tied, _ = draw(covariance.mask & (key == threshold) & some, of_tied[0])
        chosen = (covariance.mask & (key > threshold) & some) | from_tied
        return chosen, n, torch.where(some, _key_to_float(threshold)[0], torch.inf)

    return _select("select_kl_cov", group, covariance, token_id, ratio, at_least, seed, step, {}, None, choose)


def _select(op, group, covariance, token_id, ratio, at_least, seed, step, own, check_own, choose) -> Selection:
    """What the selections have in common.

    Args:
        own: what else every rank must be called with, and `check_own` its check.
        choose: (ranks, covariance, number to choose, draw) -> (chosen tokens [T] bool, how many are due over all ranks,
            threshold), where draw(candidates [T] bool, n) -> (n of them by the hash, number of candidates).
    """

    def checked() -> None:
        _check_selection(covariance, token_id, ratio, at_least, seed, step)
        if check_own is not None:
            check_own()

    _, failure = attempt(checked, group)
    call = {}
    if failure is None:
        call = {"ratio": ratio, "at_least": at_least, "seed": seed, "step": step, **own, **_means(covariance)}
    else:
        covariance = _nothing(_device_of(token_id, getattr(covariance, "value", None)))
        token_id, ratio, at_least, seed, step = covariance.value.long(), 0.0, 0, 0, 0
    ends = _ends(token_id, covariance.mask)
    ranks = AllReduces(op, group, token_id.device, call, ends, failure)

    def draw(candidate: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return _draw(token_id, candidate, n, seed, step, ranks)

    chosen, due, threshold = choose(ranks, covariance, _count(covariance, ratio, at_least), draw)
    selection = _finish(chosen, due, token_id, covariance.mask, threshold, ranks)
    ranks.finish()
    return selection


# ---- what the ranks agree on ----------------------------------------------------------------------------------------


def _device_of(*values: object) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def _no_tokens(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The logprob, advantage and mask of a rank that has no tokens."""
    nothing = torch.zeros(0, device=device)
    return nothing, nothing, nothing.bool()


def _nothing(device: torch.device) -> TokenCovariance:
    """The covariance of a rank without tokens, in a mini-batch without any."""
    value, _, mask = _no_tokens(device)
    mean = torch.zeros((), dtype=torch.float64, device=device)
    return TokenCovariance(value, mask, mean.long(), mean, mean)


def _check_covariance(covariance: object) -> None:
    if not isinstance(covariance, TokenCovariance):
        raise TypeError(f"covariance must be what token_covariance returns, got {type(covariance).__name__}")


def _means(covariance: TokenCovariance) -> dict[str, Tensor]:
    """What the covariances of all ranks have alike if they are those of one mini-batch."""
    names = ("num_tokens", "mean_logprob", "mean_advantage")
    return {f"covariance.{name}": getattr(covariance, name) for name in names}


def _check_selection(covariance, token_id, ratio, at_least, seed, step) -> None:
    _check_covariance(covariance)
    check.vector("token_id", token_id, (torch.int64,), covariance.value)
    check.fraction("ratio", ratio)
    check.integer("at_least", at_least, 0)
    check_counter("seed", seed)
    check_counter("step", step)


def check_counter(name: str, value: object) -> None:
    """`value` is an integer, or a 0-d int64 tensor."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    elif value.dim() or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an integer or a 0-d int64 tensor, got {value.dtype} {tuple(value.shape)}")


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
    key: Tensor, valid: Tensor, rank: Tensor, bits: int, ranks: AllReduces
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


def _draw(
    token_id: Tensor, candidate: Tensor, n: Tensor, seed: int | Tensor, step: int | Tensor, ranks: AllReduces
) -> tuple[Tensor, Tensor]:
    """The n candidates of all ranks with the largest hash (all, if fewer): mask [T], number of candidates."""
    key = token_hash(token_id, seed, step)
    threshold, _, total = _radix_select(key, candidate, n[None], 64, ranks)
    reached = (key ^ SIGN) >= (threshold ^ SIGN)  # unsigned comparison
    return candidate & reached & (n > 0), total


def _ends(token_id: Tensor, mask: Tensor) -> Tensor:
    """The smallest and the largest id under the mask [2]; the extremes of int64, crossed, where there is none."""
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    if len(token_id) == 0:
        return torch.stack([token_id.new_full((), high), token_id.new_full((), low)])
    return torch.stack([token_id.masked_fill(~mask, high).amin(), token_id.masked_fill(~mask, low).amax()])


def _bits_of_ids(token_id: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """[1 + MAP_WORDS]: how many ids are looked at, and the map of their bits. `ends` [ranks, 2]: of the ids."""
    span = (ends[:, 1].amax().double() - ends[:, 0].amin()).clamp(min=0)
    stride = (span / (64 * MAP_WORDS - 2)).long() + 1
    place = token_id.div(stride, rounding_mode="floor")
    looked_at = mask & (place * stride == token_id)
    bit = torch.bitwise_left_shift(torch.ones_like(place), place & 63)
    bits = torch.zeros(MAP_WORDS, dtype=torch.int64, device=token_id.device)
    bits.scatter_add_(0, (place >> 6) & (MAP_WORDS - 1), torch.where(looked_at, bit, 0))
    return torch.cat([looked_at.sum()[None], bits])


def _num_bits(x: Tensor) -> Tensor:
    """The number of bits that are set, of int64."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def _finish(
    chosen: Tensor, due: Tensor, token_id: Tensor, mask: Tensor, threshold: Tensor | None, ranks: AllReduces
) -> Selection:
    sums = ranks.sum(torch.cat([chosen.sum()[None], _bits_of_ids(token_id, mask, ranks.own)]))
    count = sums[0]
    repeated = sums[1] - _num_bits(sums[2:]).sum()  # at least so many
    if check.readable(sums):
        if repeated > 0 or count != due:
            raise ValueError(
                "token_id must be different for every unmasked token of the mini-batch, on all ranks: at least "
                f"{max(int(repeated), 1)} tokens have the id of another one; {int(count)} tokens were chosen where "
                f"{int(due)} were due"
            )
        return Selection(chosen, count, threshold)
    spoilt = repeated > 0 if ranks.refused is None else (repeated > 0) | ranks.refused
    if threshold is not None:
        threshold = torch.where(spoilt, torch.nan, threshold)
    return Selection((chosen | spoilt) & mask, torch.where(spoilt, -1, count), threshold)
