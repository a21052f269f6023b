"""Selections of tokens, exact over the optimizer's mini-batch: a draw from an interval, and the largest.

The chosen set is bit-identical for every split of the batch, every order of the tokens and every number of ranks. The
scores are so (entcov/objective/token_covariance.py, token_means.py), a radix search over integers finds the thresholds
(entcov/objective/radix_select.py), and a 64-bit hash of (seed, step, token_id), one-to-one in token_id, decides draws
and ties. The number of collectives does not depend on the data.

No two tokens may have the same id. To check it, each rank sets a bit for every id in a map of 2^22 bits, and the maps
are added up over the ranks: where two ids set the same bit, the sum has fewer bits than there are ids. All ids are
checked if they differ by at most 4,194,303, every s-th one if they differ by up to s times that.

Calls can be captured in a CUDA graph if `step` is a tensor. docs/methods.md has the cost on an accelerator.

Source: Cui et al., "The Entropy Mechanism of RL for Reasoning Language Models", arXiv 2505.22617.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.objective.radix_select import float_key, key_to_float, radix_select
from entcov.objective.token_covariance import device_of, equal_on_all_ranks, no_covariance
from entcov.objective.token_means import TokenScores
from entcov.stats.ranks import AllReduces, attempt

MAP_WORDS = 2**16  # of the map of token ids: 2^22 bits, 512 KiB
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
SIGN = -(2**63)


@dataclass(frozen=True)
class Selection:
    mask: Tensor  # [T] bool, the chosen tokens among those of this call
    count: Tensor  # 0-d int64, chosen over all ranks
    threshold: Tensor | None = None  # 0-d float32: smallest chosen score (select_largest), inf if none is chosen


@torch.no_grad()
def select_clip_cov(
    scores: TokenScores,
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
    """A uniform draw of floor(ratio * N) tokens, without replacement, among those with low <= score <= high.

    Uniform in the sense of a hash: the candidates with the largest hash of (seed, step, token_id) are taken.

    Args:
        scores: what `token_covariance` or `token_scores` returns.
        token_id: [T] int64, number of each token in the whole rollout batch, different for all unmasked tokens.
        ratio: fraction of all N unmasked tokens of the mini-batch; all candidates are taken if they are fewer.
        seed, step: any integers; the draw changes with each. In a CUDA graph: a 0-d int64 tensor on the device.
        at_least: lower bound of the number of tokens to take (reference code: 1).
        strict: low < score < high (reference code).
        exclude: [T] bool, tokens that are no candidates.
    Collectives: 5 all-reduces of at most 512 KiB and some words; every rank must call.
    Raises: TypeError, ValueError for arguments. ValueError on every rank if token ids repeat, on one rank or over
        ranks, among those that are checked (head of this file). RuntimeError where another rank failed or was called
        differently. On an accelerator the last two show instead as a count of -1, a threshold of NaN, and a mask of all
        unmasked tokens, on every rank.
    """

    def check_own() -> None:
        check.number("low", low)
        check.number("high", high)
        if exclude is not None:
            check.vector("exclude", exclude, (torch.bool,), scores.value)

    def choose(ranks: AllReduces, scores: TokenScores, n: Tensor, draw: Callable):
        candidate, value = scores.mask, scores.value
        if ranks.failure is None:
            inside = (value > low) & (value < high) if strict else (value >= low) & (value <= high)
            candidate = candidate & inside if exclude is None else candidate & inside & ~exclude
        chosen, num_candidates = draw(candidate, n)
        return chosen, torch.minimum(n, num_candidates), None

    own = {"low": low, "high": high, "strict": strict}
    return _select("select_clip_cov", group, scores, token_id, ratio, at_least, seed, step, own, check_own, choose)


@torch.no_grad()
def select_largest(
    scores: TokenScores,
    token_id: Tensor,
    *,
    ratio: float,
    seed: int | Tensor,
    step: int | Tensor,
    at_least: int = 0,
    round_up: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """The floor(ratio * N) tokens with the largest score; the hash decides ties at the threshold.

    Of scores with the sign changed (`-scores`) it takes the smallest.

    Args: as `select_clip_cov`, and
        round_up: take ceil(ratio * N), computed as int(ratio * N + 0.9999).
    Collectives: 7 all-reduces of at most 512 KiB and some words; every rank must call.
    Raises: as `select_clip_cov`.
    """

    def choose(ranks: AllReduces, scores: TokenScores, n: Tensor, draw: Callable):
        n = torch.minimum(n, scores.num_tokens)
        key = float_key(scores.value)
        threshold, of_tied, _ = radix_select(key, scores.mask, n[None], 32, ranks)
        some = n > 0
        from_tied, _ = draw(scores.mask & (key == threshold) & some, of_tied[0])
        chosen = (scores.mask & (key > threshold) & some) | from_tied
        return chosen, n, torch.where(some, key_to_float(threshold)[0], torch.inf)

    own = {"round_up": round_up}
    return _select("select_largest", group, scores, token_id, ratio, at_least, seed, step, own, None, choose)


def _select(op, group, scores, token_id, ratio, at_least, seed, step, own, check_own, choose) -> Selection:
    """Checks the arguments, lets `choose` select, checks the token ids.

    Args:
        own: further arguments that must be equal on every rank; `check_own` checks them.
        choose: (ranks, scores, number to choose, draw) -> (chosen tokens [T] bool, their number over all ranks,
            threshold), where draw(candidates [T] bool, n) -> (the n with the largest hash, or all if fewer: [T]
            bool; number of candidates).
    """

    def checked() -> None:
        if not isinstance(scores, TokenScores):
            raise TypeError(
                f"scores must be what token_covariance or token_scores returns, got {type(scores).__name__}"
            )
        check.vector("token_id", token_id, (torch.int64,), scores.value)
        check.fraction("ratio", ratio)
        check.integer("at_least", at_least, 0)
        check_counter("seed", seed)
        check_counter("step", step)
        if check_own is not None:
            check_own()

    _, failure = attempt(checked, group)
    call = {}
    if failure is None:
        call = {"ratio": ratio, "at_least": at_least, "seed": seed, "step": step, **own}
        call |= equal_on_all_ranks(scores)
    else:
        scores = no_covariance(device_of(token_id, getattr(scores, "value", None)))
        token_id, ratio, at_least, seed, step = scores.value.long(), 0.0, 0, 0, 0
    ends = _ends(token_id, scores.mask)
    ranks = AllReduces(op, group, token_id.device, call, ends, failure)

    def draw(candidate: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        key = token_hash(token_id, seed, step)
        threshold, _, total = radix_select(key, candidate, n[None], 64, ranks)
        reached = (key ^ SIGN) >= (threshold ^ SIGN)  # unsigned comparison
        return candidate & reached & (n > 0), total

    share = scores.num_tokens.double() * ratio
    if own.get("round_up"):
        share = share + 0.9999
    n = share.long().clamp(min=at_least)  # floor(ratio * N) in float64, as Python's int(ratio * N)
    chosen, expected, threshold = choose(ranks, scores, n, draw)
    selection = _finish(chosen, expected, token_id, scores.mask, threshold, ranks)
    ranks.finish()
    return selection


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
    """Logical shift of int64 by 1 to 63 bits (torch's own copies the sign)."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _ends(token_id: Tensor, mask: Tensor) -> Tensor:
    """The smallest and the largest id under the mask [2]; (largest, smallest int64) if no token is under it."""
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    if len(token_id) == 0:
        return torch.stack([token_id.new_full((), high), token_id.new_full((), low)])
    return torch.stack([token_id.masked_fill(~mask, high).amin(), token_id.masked_fill(~mask, low).amax()])


def _bits_of_ids(token_id: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """[1 + MAP_WORDS]: how many ids are checked, and the map of their bits. `ends` [ranks, 2]: of all ranks."""
    span = (ends[:, 1].amax().double() - ends[:, 0].amin()).clamp(min=0)
    stride = (span / (64 * MAP_WORDS - 2)).long() + 1
    place = token_id.div(stride, rounding_mode="floor")
    checked = mask & (place * stride == token_id)
    bit = torch.bitwise_left_shift(torch.ones_like(place), place & 63)
    bits = torch.zeros(MAP_WORDS, dtype=torch.int64, device=token_id.device)
    bits.scatter_add_(0, (place >> 6) & (MAP_WORDS - 1), torch.where(checked, bit, 0))
    return torch.cat([checked.sum()[None], bits])


def _num_bits(x: Tensor) -> Tensor:
    """The number of bits that are set, of int64."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def _finish(
    chosen: Tensor, expected: Tensor, token_id: Tensor, mask: Tensor, threshold: Tensor | None, ranks: AllReduces
) -> Selection:
    sums = ranks.sum(torch.cat([chosen.sum()[None], _bits_of_ids(token_id, mask, ranks.own)]))
    count = sums[0]
    repeated = sums[1] - _num_bits(sums[2:]).sum()  # at least so many
    if check.readable(sums):
        if repeated > 0 or count != expected:
            raise ValueError(
                "token_id must be different for every unmasked token of the mini-batch, on all ranks: at least "
                f"{max(int(repeated), 1)} tokens have the id of another one; {int(count)} tokens were chosen where "
                f"{int(expected)} were due"
            )
        return Selection(chosen, count, threshold)
    invalid = repeated > 0 if ranks.refused is None else (repeated > 0) | ranks.refused
    if threshold is not None:
        threshold = torch.where(invalid, torch.nan, threshold)
    return Selection((chosen | invalid) & mask, torch.where(invalid, -1, count), threshold)
