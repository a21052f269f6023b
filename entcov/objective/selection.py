"""Selections of tokens, exact over the optimizer's mini-batch: a draw from an interval, and the largest.

The chosen set is bit-identical for every split of the batch, every order of the tokens and every number of ranks. The
scores are so (entcov/objective/token_covariance.py, token_means.py), a radix search over integers finds the thresholds,
and a 64-bit hash of (seed, step, token_id), one-to-one in token_id, decides draws and ties. The number of collectives
does not depend on the data. The arithmetic is in csrc/token_select.h, one kernel a stage; here are the checks and the
sums over the ranks between the stages.

No two tokens may have the same id. It is checked in a map of 2^22 bits: all ids if they differ by at most 4,194,303,
every s-th one if they differ by up to s times that.

Calls can be captured in a CUDA graph if `step` is a tensor. docs/kernels.md has the cost on an accelerator.

Source: Cui et al., "The Entropy Mechanism of RL for Reasoning Language Models", arXiv 2505.22617.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.objective.stages import run_stages
from entcov.objective.token_covariance import device_of, equal_on_all_ranks, no_covariance
from entcov.objective.token_means import TokenScores
from entcov.ops.token_select import DRAW, LARGEST, Selecting, SelectSpec
from entcov.stats.ranks import attempt


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

    own = {"low": low, "high": high, "strict": strict}
    return _select(
        "select_clip_cov", DRAW, group, scores, token_id, ratio, at_least, seed, step, own, exclude, check_own
    )


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

    own = {"round_up": round_up}
    return _select("select_largest", LARGEST, group, scores, token_id, ratio, at_least, seed, step, own)


def _select(
    op: str,
    kind: int,
    group: dist.ProcessGroup | None,
    scores: TokenScores,
    token_id: Tensor,
    ratio: float,
    at_least: int,
    seed: int | Tensor,
    step: int | Tensor,
    own: dict[str, Any],
    exclude: Tensor | None = None,
    check_own: Callable[[], None] | None = None,
) -> Selection:
    """Checks the arguments, runs the stages, checks the token ids.

    Args:
        own: further members of a SelectSpec, which must be equal on every rank; `check_own` checks them.
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
        token_id, exclude, ratio, at_least, seed, step, own = scores.value.long(), None, 0.0, 0, 0, 0, {}
    counters = {"seed": seed, "step": step}
    tensors = {name: _on(x, token_id.device) for name, x in counters.items() if isinstance(x, Tensor)}
    numbers = {name: _int64(x) for name, x in counters.items() if not isinstance(x, Tensor)}
    selecting = Selecting(
        SelectSpec(kind, ratio=ratio, at_least=at_least, **own, **numbers),
        scores.value,
        scores.mask.contiguous(),
        scores.num_tokens,
        token_id.contiguous(),
        None if exclude is None else exclude.contiguous(),
        **tensors,
    )
    ranks = run_stages(op, group, selecting, call, failure)
    if check.readable(selecting.result):
        count, due, repeated = selecting.result.tolist()
        if repeated > 0 or count != due:
            raise ValueError(
                "token_id must be different for every unmasked token of the mini-batch, on all ranks: at least "
                f"{max(repeated, 1)} tokens have the id of another one; {due} tokens were to be chosen"
            )
    ranks.finish()
    threshold = selecting.threshold[0] if kind == LARGEST else None
    return Selection(selecting.chosen, selecting.result[0], threshold)


def check_counter(name: str, value: object) -> None:
    """`value` is an integer, or a 0-d int64 tensor."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    elif value.dim() or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an integer or a 0-d int64 tensor, got {value.dtype} {tuple(value.shape)}")


def _int64(x: int) -> int:
    """The int64 that equals x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63


def _on(counter: Tensor, device: torch.device) -> Tensor:
    return counter if counter.device == device else counter.to(device)
