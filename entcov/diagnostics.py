"""What spends a policy's entropy, and whether its answers deserve its confidence: pure functions on tensors.

They read statistics that a training step has anyway, so none costs a pass over logits. Token columns are [T], the loss
tokens of a whole rollout in any order; response columns are [B]. Sums are integers (entcov/objective/token_means.py),
so results are the same bits for every order of the tokens and every division into micro-batches. Results of token
columns stay on their device, and `token_metrics` copies all of them to the host at once. docs/diagnostics.md says how
to read the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.objective.token_means import fixed_point, from_fixed_point

TOP_SHARES = (0.0002, 0.002, 0.02, 0.2, 0.5)
CLASSES = ("rewarded_likely", "rewarded_unlikely", "punished_likely", "punished_unlikely")
LIKELY = 0.5
POSITIONS = 10
CONFIDENCE_BINS = 10
# What the trainer logs of `entropy_change`: predicted, measured, and their difference.
ENTROPY_CHANGE = tuple(f"actor/entropy_change{name}" for name in ("_predicted", "", "_error"))
_FLOAT = (torch.float32, torch.float64)


def token_metrics(
    *, logprob: Tensor, entropy: Tensor, entropy_drift: Tensor, advantage: Tensor, covariance: Tensor,
    position: Tensor, length: Tensor,
) -> dict[str, float]:  # fmt: skip
    """The metrics of a rollout's loss tokens: `top_covariance`, `token_classes` and `entropy_by_position` together.

    Args: [T] each; those three have the rest.
    Returns: floats by the metric's name, without those that no token belongs to.
    Raises: as those three. The host waits for an accelerator once.
    """
    found = {f"actor/cov_top_{share}": mean for share, mean in top_covariance(covariance).items()}
    for name, (tokens, change) in token_classes(logprob, entropy_drift, advantage).items():
        found |= {f"token_classes/{name}/tokens": tokens, f"token_classes/{name}/change": change}
    means = entropy_by_position(entropy, position, length)
    found |= {f"entropy_by_position/{number}": mean for number, mean in enumerate(means, start=1)}
    values = torch.stack(list(found.values())).tolist()
    return {name: value for name, value in zip(found, values, strict=True) if math.isfinite(value)}


@torch.no_grad()
def top_covariance(covariance: Tensor) -> dict[float, Tensor]:
    """Mean covariance of the tokens that have the largest one: of the top 0.02, 0.2, 2, 20 and 50 percent.

    Equivalent to `covariance.sort(descending=True).values[:ceil(share * T)].mean()` for every share of TOP_SHARES, so
    that a small rollout's smallest share is its largest token. That of all tokens is actor/cov_mean.

    Args:
        covariance: [T] float32 or float64, nats: that of each token, as `token_covariance` gives it for the rollout.
    Returns: share -> 0-d float64, nats.
    Raises: TypeError, ValueError for the dtype and shape, for no token, and on the CPU for values that are not finite.
    Source: Cui et al., arXiv 2505.22617, table 1 (Qwen2.5-7B at the first step: 5.654, 3.112, 1.385, 0.351, 0.152; all
        tokens 0.003), with the covariance of eq. 10.
    """
    _check_columns(covariance=covariance)
    largest = covariance.sort(descending=True).values
    counts = {share: math.ceil(round(share * len(largest), 6)) for share in TOP_SHARES}  # 0.002 * 500 is above 1
    return {share: _sums(largest[:count]) / count for share, count in counts.items()}


@torch.no_grad()
def token_classes(
    logprob: Tensor, entropy_drift: Tensor, advantage: Tensor, *, likely: float = LIKELY
) -> dict[str, tuple[Tensor, Tensor]]:
    """How many tokens each of four classes has, and which part of the entropy's first-order change it makes.

    Classes are rewarded (advantage > 0) or punished (< 0) tokens that are likely (probability >= `likely`) or not; a
    token of advantage 0 is in none. The change of a token is entropy_drift * advantage: that of the entropy of its own
    distribution by a small policy-gradient step on it. Negative change spends entropy.

    Args:
        logprob: [T] float32 or float64, nats, of the sampled token under the policy that the step begins with.
        entropy_drift: [T], of `token_stats(moments=True)`.
        advantage: [T], as the loss has it.
        likely: in (0, 1].
    Returns: class -> (share of all T tokens, the class's sum of changes over the sum of the four sums' sizes), 0-d
        float64: the sizes of the latter add up to 1, and the sign is that of the class. NaN where nothing changes.
    Raises: TypeError, ValueError for dtypes, shapes and `likely`, and on the CPU for values that are not finite.
    Source: the change: Wang et al., arXiv 2602.03392, theorem 3.3, docs/math.md (9). The classes: Jin et al., arXiv
        2511.05993, find that rewarded tokens spend the entropy, the more the likelier they are. We know of no threshold
        in that paper; 1/2 is ours: above it the token is the likeliest one.
    """
    _check_columns(logprob=logprob, entropy_drift=entropy_drift, advantage=advantage)
    check.positive("likely", likely, 1.0)
    number = 2 * (advantage < 0).long() + (logprob < math.log(likely)).long()
    number = torch.where(advantage == 0, len(CLASSES), number)
    change = entropy_drift.double() * advantage.double()
    counts = _sums(torch.ones_like(change), number, len(CLASSES) + 1)[:-1]
    sums = _sums(change, number, len(CLASSES) + 1)[:-1]
    share, part = counts / len(number), sums / sums.abs().sum()
    return {name: (share[i], part[i]) for i, name in enumerate(CLASSES)}


@torch.no_grad()
def entropy_by_position(entropy: Tensor, position: Tensor, length: Tensor, *, bins: int = POSITIONS) -> Tensor:
    """Mean entropy of the tokens in each part of their responses, from the beginning to the end.

    A token is in the part that the middle of its place falls into: floor(bins * (position + 1/2) / length).

    Args:
        entropy: [T] float32 or float64, nats.
        position: [T] int64, of the token in its response, from 0.
        length: [T] int64, tokens of its response, those outside the loss included.
        bins: parts of a response.
    Returns: [bins] float64, nats; NaN for a part that no token is in.
    Raises: TypeError, ValueError for dtypes, shapes and bins; on the CPU for values that are not finite and positions
        outside [0, length).
    """
    _check_columns(entropy=entropy)
    check.vector("position", position, (torch.int64,), entropy)
    check.vector("length", length, (torch.int64,), entropy)
    check.integer("bins", bins, 1)
    outside = (position < 0) | (position >= length)
    if check.readable(outside) and bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"position must be in [0, length) for every token: {int(outside.sum())} of {len(outside)} are not "
            f"(first: [{first}] is {int(position[first])} of {int(length[first])})"
        )
    number = (bins * (2 * position + 1)).div(2 * length, rounding_mode="floor")
    return _sums(entropy, number, bins) / _sums(torch.ones_like(entropy), number, bins)


@torch.no_grad()
def entropy_change(
    logprob: Tensor, entropy: Tensor, *, old_logprob: Tensor, old_entropy: Tensor, rollout_logprob: Tensor
) -> tuple[Tensor, Tensor]:
    """The entropy change of each token's distribution by an update: predicted to first order, and measured.

    Equivalent to, with d = logprob - old_logprob:

        measured = entropy - old_entropy
        error = (old_logprob + old_entropy - 1) * (exp(d) - 1 - d) + (exp(d) - 1) * d
        predicted = measured + exp(old_logprob - rollout_logprob) * error

    The first-order change of a distribution p by a change dz of its logits is -Cov_{a~p}(log p_a, dz_a) (Cui et al.,
    lemma 1; docs/math.md (13)), which `logit_covariance` computes from the logits before and after. Here only the
    sampled token a is known, and E_{a~p}[error] is exactly that prediction less the measured change; the proof is in
    docs/diagnostics.md. So `predicted` is an unbiased estimate wherever the update does not depend on a, as for tokens
    that the update was not trained on. Its noise is of second order in d; that of the plain estimate, -(log p_a + H) d,
    is of first order, as the change itself is. Means over tokens are meant. The weight exp(old_logprob -
    rollout_logprob) is 1 where the sampler has the old policy's probabilities, and corrects for where it has not.

    Args:
        logprob, entropy: [T] float32 or float64, nats, after the update.
        old_logprob, old_entropy: [T], before it.
        rollout_logprob: [T], of the policy that sampled the tokens.
    Returns: (predicted, measured), [T] float64, nats.
    Raises: TypeError, ValueError for dtypes and shapes.
    Source: Cui et al., arXiv 2505.22617, lemma 1; the estimate from the sampled token alone is ours.
    """
    columns = {"logprob": logprob, "entropy": entropy, "old_logprob": old_logprob, "old_entropy": old_entropy}
    for name, column in (columns | {"rollout_logprob": rollout_logprob}).items():
        check.vector(name, column, _FLOAT, logprob)
    logprob, entropy, old_logprob, old_entropy = (column.double() for column in columns.values())
    d, measured = logprob - old_logprob, entropy - old_entropy
    error = (old_logprob + old_entropy - 1) * (d.expm1() - d) + d.expm1() * d
    return measured + (old_logprob - rollout_logprob.double()).exp() * error, measured


def solved_shares(right: Tensor, group: Tensor) -> dict[str, float]:
    """Shares of the groups of which no response is right, some are, and all are: {"none", "some", "all"}.

    The gradient of a group-relative advantage comes from the second kind alone.

    Args:
        right: [B] bool.
        group: [B] int64, equal for the responses to one prompt.
    Raises: TypeError, ValueError for dtypes and shapes, and for no response.
    """
    number, groups = _groups(right, group)
    count = torch.zeros(groups, dtype=torch.int64).index_add_(0, number, right.long())
    size = torch.zeros(groups, dtype=torch.int64).index_add_(0, number, torch.ones_like(number))
    none, whole = int((count == 0).sum()), int((count == size).sum())
    return {"none": none / groups, "some": (groups - none - whole) / groups, "all": whole / groups}


@dataclass(frozen=True)
class GroupAnswers:
    """What the responses to each of P prompts answer; [P], prompts by rising number of their group."""

    distinct: Tensor  # int64, different answers
    confidence: Tensor  # float64, share of the prompt's responses that give its most common answer
    accuracy: Tensor  # float64, share of those responses that are right


def group_answers(answer: Sequence[Hashable | None], right: Tensor, group: Tensor) -> GroupAnswers:
    """Different answers to each prompt, and its most common one: of equally common ones that which was given first.

    The confidence is the estimate, from the samples, of the probability that the policy gives to the answer which it
    gives most often (Wang et al., arXiv 2203.11171, take that answer). It is the largest of several noisy shares, so on
    average above that probability, the more the fewer responses there are.

    Args:
        answer: [B], what each response answers; None: nothing. Such a response counts in the group's size alone, and a
            group of them has no answer, confidence 0 and accuracy 0.
        right: [B] bool.
        group: [B] int64, equal for the responses to one prompt.
    Raises: TypeError, ValueError for dtypes, shapes and another number of answers, and for no response.
    """
    number, groups = _groups(right, group)
    if len(answer) != len(right):
        raise ValueError(f"answer must have one entry a response, {len(right)}, got {len(answer)}")
    given: list[dict[Hashable, list[bool]]] = [{} for _ in range(groups)]
    sizes = [0] * groups
    for one, verdict, i in zip(answer, right.tolist(), number.tolist(), strict=True):
        sizes[i] += 1
        if one is not None:
            given[i].setdefault(one, []).append(verdict)
    rows = []
    for own, size in zip(given, sizes, strict=True):
        most = max(own.values(), key=len, default=[])  # a dict keeps the order in which answers were given
        rows.append((len(own), len(most) / size, sum(most) / len(most) if most else 0.0))
    distinct, confidence, accuracy = zip(*rows, strict=True)
    return GroupAnswers(torch.tensor(distinct), *(torch.tensor(x).double() for x in (confidence, accuracy)))


@dataclass(frozen=True)
class Calibration:
    """bins: (predictions, their mean confidence, their accuracy) of every bin that has one, by rising confidence."""

    bins: tuple[tuple[int, float, float], ...]

    def __post_init__(self) -> None:
        if not self.bins:
            raise ValueError("bins must hold at least one prediction, got none")

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean of |accuracy - confidence| over bins, weighted by their predictions."""
        return self._mean(lambda confidence, accuracy: abs(accuracy - confidence))

    @property
    def confidence(self) -> float:
        return self._mean(lambda confidence, accuracy: confidence)

    @property
    def accuracy(self) -> float:
        return self._mean(lambda confidence, accuracy: accuracy)

    def _mean(self, value) -> float:
        total = sum(count for count, _, _ in self.bins)
        return math.fsum(count * value(confidence, accuracy) for count, confidence, accuracy in self.bins) / total


def calibration(confidence: Tensor, accuracy: Tensor, *, bins: int = CONFIDENCE_BINS) -> Calibration:
    """Confidence against accuracy in bins of equal width, (0, 1/bins], (1/bins, 2/bins], ...; 0 is in the first one.

    Args:
        confidence: [P] float32 or float64 in [0, 1], of each prediction.
        accuracy: [P], whether it is right: 0, 1 or a share.
    Returns: the reliability curve, with the expected calibration error as `.ece`. Of few predictions the error is above
        that of many: a bin with n of them is off by about sqrt(accuracy (1 - accuracy) / n) by chance alone.
    Raises: TypeError, ValueError for dtypes, shapes and bins, for no prediction, for values outside [0, 1].
    Source: Naeini et al., AAAI 2015 (ECE, 10 bins); Guo et al., arXiv 1706.04599, eq. 2 and 3, figure 1.
    """
    _check_columns(confidence=confidence, accuracy=accuracy)
    check.integer("bins", bins, 1)
    for name, column in (("confidence", confidence), ("accuracy", accuracy)):
        low, high = (float(x) for x in column.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {low:g} to {high:g}")
    # 3 of 30 and the edge 1 / 10 are the same float; their products with 10 need not be.
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    number = torch.bucketize(confidence.double(), edges)
    count, sure, right = (_sums(x, number, bins).tolist() for x in (torch.ones_like(confidence), confidence, accuracy))
    return Calibration(tuple((round(n), s / n, r / n) for n, s, r in zip(count, sure, right, strict=True) if n))


def _check_columns(**columns: Tensor) -> None:
    first = next(iter(columns.values()))
    for name, column in columns.items():
        check.vector(name, column, _FLOAT, first)
        check.finite(name, column)
    if not len(first):
        raise ValueError(f"{next(iter(columns))} must have at least one entry, got none")


def _groups(right: Tensor, group: Tensor) -> tuple[Tensor, int]:
    """(number of each response's group from 0, number of groups)"""
    check.vector("right", right, (torch.bool,))
    check.vector("group", group, (torch.int64,), right)
    if not len(right):
        raise ValueError("right must have at least one entry, got none")
    names, number = group.cpu().unique(return_inverse=True)
    return number, len(names)


def _sums(value: Tensor, number: Tensor | None = None, count: int = 1) -> Tensor:
    """[count] float64: the sum of `value` [T], at most 2^20 in size, over the tokens of each number; None: 0-d, of all.

    A value is off by at most 2^-42. One that is not finite makes all sums NaN.
    """
    parts = fixed_point(value.double())
    if number is None:
        sums = parts.sum(-1)
    else:
        sums = torch.zeros(count, 2, dtype=torch.int64, device=value.device).index_add_(0, number, parts.T)
    return from_fixed_point(sums) + 0.0 * value.sum()
