"""clamp_sketch: step 1 of the clamped entropy over ranks (csrc/clamp.h). Quantiles of a sample of a shard."""

import torch
from torch import Tensor

from entcov.ops.clamped_stats import check_clamp
from entcov.ops.core import RowSpec, define, launch, logits_view

SKETCH = 64  # floats per row: kSketch of csrc/clamp.h


def _prepare(logits, target, spec):
    check_clamp(logits, target, spec)
    return logits.new_empty((logits.shape[0], SKETCH), dtype=torch.float32)


def _fill(out, logits, target, spec):
    launch("clamp_sketch", logits.device, logits_view(logits), target, spec, out)


_clamp_sketch = define("clamp_sketch", "(Tensor logits, Tensor target, RowSpec spec) -> Tensor", _prepare, _fill)


def clamp_sketch(logits: Tensor, target: Tensor, spec: RowSpec) -> Tensor:
    """[T, SKETCH] fp32: descending quantiles of a sample of every row of this shard; -inf for a shard without columns.

    logits: [T, V_local] float32, bfloat16 or float16, at most 2^24 columns. target: [T] int64; ignored rows get zeros.
    """
    return _clamp_sketch(logits, target, spec)
