"""clamp_refine: step 4 of the clamped entropy over ranks (csrc/clamp.h). Partials of all shards -> the clamp, or the
next bracket."""

import torch
from torch import Tensor

from entcov.ops.clamp_partial import PARTIAL
from entcov.ops.core import RowSpec, check_messages, check_rows, check_spec, check_stats, define, launch, messages_view


def _prepare(partials, target, stats, bracket, clamp, kept, spec):
    T = len(target)
    check_rows(target, "target", torch.int64, (T,), partials)
    check_messages(partials, T, PARTIAL)
    check_stats(stats, T, partials)
    check_rows(bracket, "bracket", torch.int32, (T, 4), partials)
    check_rows(clamp, "clamp", torch.float32, (T, 4), partials)
    check_spec(spec)
    if not 1 <= kept < 2**25:
        raise ValueError(f"kept must be in [1, 2^25), got {kept}")
    return [torch.empty_like(bracket), torch.empty_like(clamp), clamp.new_empty(T), bracket.new_zeros(1)]


def _fill(out, partials, target, stats, bracket, clamp, kept, spec):
    view = messages_view(partials, len(target))
    launch("clamp_refine", partials.device, view, target, spec, stats, stats.shape[1], kept, bracket, clamp, *out)


_clamp_refine = define(
    "clamp_refine",
    "(Tensor partials, Tensor target, Tensor stats, Tensor bracket, Tensor clamp, SymInt kept, RowSpec spec) "
    "-> Tensor[]",
    _prepare,
    _fill,
)


def clamp_refine(
    partials: Tensor, target: Tensor, stats: Tensor, bracket: Tensor, clamp: Tensor, kept: int, spec: RowSpec
) -> list[Tensor]:
    """Finishes the rows whose threshold the partials determine, and narrows the brackets of the others.

    Args:
        partials: [R, T * width + 4] fp32, the messages of all ranks; the last PARTIAL floats of every row are the
            result of `clamp_partial`.
        target: [T] int64.
        stats: [T, 4 | 7] fp32, the merged statistics of the whole rows.
        bracket: [T, 4] int32, the bracket that the partials were computed with.
        clamp: [T, 4] fp32, the result of the round before; finished rows keep it.
        kept: number of logits that the clamp keeps.

    Returns:
        [next bracket [T, 4] int32, clamp [T, 4] fp32, clamped_entropy [T] fp32, number of unfinished rows [1] int32].
    """
    return _clamp_refine(partials, target, stats, bracket, clamp, kept, spec)
