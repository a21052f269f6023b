"""Covariance over tokens of log-probability and advantage, exact over the optimizer's mini-batch.

Not the covariance over the vocabulary that entcov/stats/logit_covariance.py computes for each token.

Cov_i = (logprob_i - mean logprob) (advantage_i - mean advantage), means over all unmasked tokens of the mini-batch:
those given to this call and those that the other ranks of `group` give to theirs.

It is bit-identical for every split of the batch, every order of the tokens and every number of ranks:
  - Its means are integer sums (entcov/objective/token_means.py).
  - A token's covariance is computed in float64 from its own values and these means and rounded once to float32, so
    it is a function of the token and the global sums alone. All comparisons are between those float32 values.
Ranks may hold different numbers of tokens, also none. The first all-reduce of each call also carries a hash of the
arguments and whether a rank has failed (entcov/stats/ranks.py). If ranks disagree or one has failed, all of them raise;
on an accelerator all results are NaN instead.

Nothing makes the host wait on an accelerator: values are checked on the CPU only, and elsewhere bad ones become NaN in
the covariance and its summary. Shapes depend on T and the number of ranks alone, so calls can be captured in a CUDA
graph. The bits are the same on every device. docs/kernels.md has the cost.

Source: Cui et al., "The Entropy Mechanism of RL for Reasoning Language Models", arXiv 2505.22617, eq. 10.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from entcov import arguments as check
from entcov.objective.stages import run_stages
from entcov.objective.token_means import TokenScores, sums_over
from entcov.ops.token_scores import token_scores
from entcov.ops.token_select import QUANTILE, Selecting, SelectSpec
from entcov.ops.token_summary import token_summary
from entcov.stats.ranks import AllReduces, attempt


@dataclass(frozen=True)
class TokenCovariance(TokenScores):
    mean_logprob: Tensor  # 0-d float64
    mean_advantage: Tensor  # 0-d float64


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
    device = device_of(logprob, advantage, mask)
    call = {"denominator_eps": denominator_eps, "empty_ok": empty_ok}
    ranks = AllReduces("token_covariance", group, device, call, failure=failure)
    eps, empty_ok = (0.0, True) if failure else (denominator_eps, empty_ok)
    result = covariance_over(ranks, *(tokens or _no_tokens(device)), eps, empty_ok)
    ranks.finish()
    return result


def covariance_over(
    ranks: AllReduces, logprob: Tensor, advantage: Tensor, mask: Tensor, denominator_eps: float, empty_ok: bool
) -> TokenCovariance:
    """`token_covariance` of checked arguments, by the all-reduce of a call that `ranks` has opened."""
    sums = sums_over(ranks, {"logprob": logprob, "advantage": advantage}, mask, empty_ok)
    values = [logprob.contiguous(), advantage.contiguous()]
    value, mean = token_scores(mask.contiguous(), values, sums, denominator_eps, ranks.refused)
    return TokenCovariance(value, mask, sums[-2], mean[0], mean[1])


@torch.no_grad()
def covariance_summary(covariance: TokenCovariance, *, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Mean, largest value and 99.9 percent quantile of the covariance over the whole mini-batch, exact.

    The quantile is the smallest value with at least 99.9 percent of the tokens at or below it.

    Returns: {"actor/cov_mean", "actor/cov_max", "actor/cov_p999"}, 0-d tensors, the same on every rank and split: they
        describe the mini-batch and must not be added up. The mean is the population covariance.
    Collectives: 2 all-reduces of 257 KiB; every rank must call, with the covariance of one `token_covariance`.
    Raises: RuntimeError where ranks do not; on an accelerator all values are NaN there instead.
    """
    _, failure = attempt(lambda: check_covariance(covariance), group)
    if failure is not None:
        covariance = no_covariance(device_of())
    call = equal_on_all_ranks(covariance)
    selecting = Selecting(SelectSpec(QUANTILE), covariance.value, covariance.mask.contiguous(), covariance.num_tokens)
    ranks = run_stages("covariance_summary", group, selecting, call, failure)
    mean, extremes = token_summary(
        selecting.workspace, covariance.num_tokens, ranks.own, covariance.mean_logprob, ranks.refused
    )
    ranks.finish()
    return {"actor/cov_mean": mean[0], "actor/cov_max": extremes[0], "actor/cov_p999": extremes[1]}


def device_of(*values: object) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def _no_tokens(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The logprob, advantage and mask of a rank that has no tokens."""
    nothing = torch.zeros(0, device=device)
    return nothing, nothing, nothing.bool()


def no_covariance(device: torch.device) -> TokenCovariance:
    """The covariance of a rank without tokens, in a mini-batch without any."""
    value, _, mask = _no_tokens(device)
    mean = torch.zeros((), dtype=torch.float64, device=device)
    return TokenCovariance(value, mask, mean.long(), mean, mean)


def check_covariance(covariance: object) -> None:
    if not isinstance(covariance, TokenCovariance):
        raise TypeError(f"covariance must be what token_covariance returns, got {type(covariance).__name__}")


def equal_on_all_ranks(scores: TokenScores) -> dict[str, Tensor]:
    """The fields that are equal on all ranks if these have the scores of one mini-batch."""
    names = [field.name for field in fields(scores) if field.name not in ("value", "mask")]
    return {name: getattr(scores, name) for name in names}
