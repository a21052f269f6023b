"""clamped_stats: statistics and clamped entropy of whole rows. csrc/clamp.h describes the algorithm. Rows that are
split over ranks: entcov/stats/sharded_clamp.py."""

import torch
from torch import Tensor

from entcov.ops.core import RowSpec, addresses, check_logits, check_rows, check_spec, define, launch, logits_view
from entcov.ops.row_stats import OUTPUTS, check_values, row_stats

MAX_COLUMNS = 2**24  # per rank, since counts are sent as fp32


def check_clamp(logits: Tensor, target: Tensor, spec: RowSpec) -> None:
    check_logits(logits)
    if logits.shape[1] > MAX_COLUMNS:
        raise ValueError(f"logits must have at most 2^24 columns on a rank for a clamp, got {logits.shape[1]}")
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    check_spec(spec)


def _prepare(logits, target, kept, spec):
    check_clamp(logits, target, spec)
    if spec.vocab_start != 0 or spec.vocab_size > logits.shape[1]:
        raise ValueError(
            f"vocab_start must be 0 and vocab_size in [1, {logits.shape[1]}] (the columns of logits), got "
            f"{spec.vocab_start} and {spec.vocab_size}"
        )
    if not 1 <= kept <= spec.vocab_size:
        raise ValueError(f"kept must be in [1, vocab_size = {spec.vocab_size}], got {kept}")
    T = logits.shape[0]
    shapes = ((T, 4), (T, 4), (T,), (T,), (T,))
    return [logits.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _fill(out, logits, target, kept, spec):
    stats, clamp, logprob, entropy, clamped_entropy = out
    nan = launch(
        "clamped_stats", logits.device, logits_view(logits), target, spec, kept, stats,
        addresses((logprob, entropy), OUTPUTS), clamp, clamped_entropy,
    )  # fmt: skip
    if nan:
        check_values(stats, target, spec, whole=True)


_clamped_stats = define(
    "clamped_stats", "(Tensor logits, Tensor target, SymInt kept, RowSpec spec) -> Tensor[]", _prepare, _fill
)


def clamped_stats(logits: Tensor, target: Tensor, kept: int, spec: RowSpec, moments: bool = False) -> list[Tensor]:
    """Statistics, outputs and the clamp of whole rows.

    Args:
        logits: [T, V] float32, bfloat16 or float16, all columns of the vocabulary.
        target: [T] int64, token ids; rows with ignore_index get zeros.
        kept: number of logits that the clamp keeps, in [1, vocab_size].
        moments: also compute the moments, by a second kernel that reads the logits a second time.

    Returns:
        [stats [T, 4 | 7], clamp [T, 4], logprob, entropy, clamped_entropy[, collision, varentropy, entropy_drift]],
        fp32, outputs [T] in nats. clamp is an argument of `logits_grad`: threshold as a raw logit, weight of the logits
        equal to it, L_K, H_K.

    Raises:
        ValueError: on the CPU, a target is not a token or a row has no finite logit. On CUDA such a row is NaN.
    """
    stats, clamp, logprob, entropy, clamped_entropy = _clamped_stats(logits, target, kept, spec)
    if not moments:
        return [stats, clamp, logprob, entropy, clamped_entropy]
    stats, logprob, entropy, *scaled = row_stats(logits, target, spec, moments=True, whole=True)
    return [stats, clamp, logprob, entropy, clamped_entropy, *scaled]
