"""clamp_partial: step 3 of the clamped entropy over ranks (csrc/clamp.h). One pass over a shard with a bracket."""

import torch
from torch import Tensor

from entcov.ops.clamped_stats import check_clamp
from entcov.ops.core import RowSpec, check_rows, define, launch, logits_view

PARTIAL = 6 + 160  # floats per row: kPartial of csrc/clamp.h


def _prepare(logits, target, bracket, spec):
    check_clamp(logits, target, spec)
    check_rows(bracket, "bracket", torch.int32, (len(target), 4), logits)
    return logits.new_empty((logits.shape[0], 4 + PARTIAL), dtype=torch.float32)


def _fill(out, logits, target, bracket, spec):
    launch("clamp_partial", logits.device, logits_view(logits), target, spec, bracket, out)


_clamp_partial = define(
    "clamp_partial", "(Tensor logits, Tensor target, Tensor bracket, RowSpec spec) -> Tensor", _prepare, _fill
)


def clamp_partial(logits: Tensor, target: Tensor, bracket: Tensor, spec: RowSpec) -> Tensor:
    """The statistics of a shard, and its partial for the clamp.

    Args:
        logits: [T, V_local] float32, bfloat16 or float16, at most 2^24 columns. Rows whose bracket is finished are not
            read and get zeros.
        target: [T] int64, global token ids.
        bracket: [T, 4] int32, from `clamp_bracket` or `clamp_refine`.

    Returns:
        [T, 4 + PARTIAL] fp32: RowStats, 6 sums and counts (PartialField of csrc/clamp.h), and 160 floats: the logits in
        the bracket or their counts.
    """
    return _clamp_partial(logits, target, bracket, spec)
