"""clamp_partial: the third step of the clamp over ranks (csrc/clamp.h): one pass over a shard with a bracket."""

import torch
from torch import Tensor

from entcov.ops.clamped_stats import check_clamp
from entcov.ops.core import RowSpec, check_rows, define, launch, logits_view

PARTIAL = 6 + 160  # floats a row: kPartial of csrc/clamp.h


def _prepare(logits, target, bracket, *spec):
    check_clamp(logits, target, RowSpec(*spec))
    check_rows(bracket, "bracket", torch.int32, (len(target), 4), logits)
    return logits.new_empty((logits.shape[0], 4 + PARTIAL), dtype=torch.float32)


def _fill(out, logits, target, bracket, *spec):
    launch("clamp_partial", logits.device, logits_view(logits), target, RowSpec(*spec), bracket, out)


_clamp_partial = define(
    "clamp_partial",
    "(Tensor logits, Tensor target, Tensor bracket, SymInt vocab_start, SymInt vocab_size, float temperature, "
    "int ignore_index) -> Tensor",
    _prepare,
    _fill,
)


def clamp_partial(logits: Tensor, target: Tensor, bracket: Tensor, spec: RowSpec) -> Tensor:
    """[T, 4 + PARTIAL]: the shard's row statistics, its sums above the bracket [T, 4], and what lies in it."""
    return _clamp_partial(logits, target, bracket, *spec)
