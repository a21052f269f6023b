"""clamp_refine: the last step of the clamp over ranks (csrc/clamp.h): partials of all shards -> the clamp, or the next
bracket."""

import torch
from torch import Tensor

from entcov.ops.clamp_partial import PARTIAL
from entcov.ops.core import RowSpec, check_messages, check_rows, check_spec, check_stats, define, launch, messages_view


def _prepare(partials, target, stats, bracket, clamp, kept, *spec):
    T = len(target)
    check_rows(target, "target", torch.int64, (T,), partials)
    check_messages(partials, T, PARTIAL)
    check_stats(stats, T, partials)
    check_rows(bracket, "bracket", torch.int32, (T, 4), partials)
    check_rows(clamp, "clamp", torch.float32, (T, 4), partials)
    check_spec(RowSpec(*spec))
    if not 1 <= kept < 2**25:
        raise ValueError(f"kept must be in [1, 2^25), got {kept}")
    return [torch.empty_like(bracket), torch.empty_like(clamp), clamp.new_empty(T), bracket.new_zeros(1)]


def _fill(out, partials, target, stats, bracket, clamp, kept, *spec):
    view = messages_view(partials, len(target))
    launch(
        "clamp_refine", partials.device, view, target, RowSpec(*spec), stats, stats.shape[1], kept, bracket, clamp, *out
    )


_clamp_refine = define(
    "clamp_refine",
    "(Tensor partials, Tensor target, Tensor stats, Tensor bracket, Tensor clamp, SymInt kept, SymInt vocab_start, "
    "SymInt vocab_size, float temperature, int ignore_index) -> Tensor[]",
    _prepare,
    _fill,
)


def clamp_refine(
    partials: Tensor, target: Tensor, stats: Tensor, bracket: Tensor, clamp: Tensor, kept: int, spec: RowSpec
) -> list[Tensor]:
    """[next brackets [T, 4] int32, clamp [T, 4], clamped_entropy [T], number of rows [1] int32 that want one more round].

    partials: the messages of all ranks, whose rows end in a partial. stats: merged. Rows that were done keep their clamp.
    """
    return _clamp_refine(partials, target, stats, bracket, clamp, kept, *spec)
