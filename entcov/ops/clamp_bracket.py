"""clamp_bracket: step 2 of the clamped entropy over ranks (csrc/clamp.h). Sketches of all ranks -> first bracket."""

import torch
from torch import Tensor

from entcov.ops.clamp_sketch import SKETCH
from entcov.ops.core import RowSpec, check_messages, check_rows, check_spec, define, launch, messages_view


def _prepare(sketches, target, kept, margin, spec):
    check_rows(target, "target", torch.int64, target.shape[:1], sketches)
    check_messages(sketches, len(target), SKETCH)
    check_spec(spec)
    if not 1 <= kept <= spec.vocab_size < 2**25:  # the kernel counts in units of 1/64 in 32 bits
        raise ValueError(
            f"kept and vocab_size must have 1 <= kept <= vocab_size < 2^25, got {kept} and {spec.vocab_size}"
        )
    if not 0 <= margin <= 2**25:
        raise ValueError(f"margin must be in [0, 2^25] (ranks), got {margin}")
    return sketches.new_empty((len(target), 4), dtype=torch.int32)


def _fill(out, sketches, target, kept, margin, spec):
    view = messages_view(sketches, len(target))
    launch("clamp_bracket", sketches.device, view, target, spec, kept, margin, out)


_clamp_bracket = define(
    "clamp_bracket",
    "(Tensor sketches, Tensor target, SymInt kept, SymInt margin, RowSpec spec) -> Tensor",
    _prepare,
    _fill,
)


def clamp_bracket(sketches: Tensor, target: Tensor, kept: int, margin: int, spec: RowSpec) -> Tensor:
    """The first bracket: by estimate, it extends `margin` ranks beyond the threshold on either side.

    Args:
        sketches: [R, T * SKETCH + 4] fp32, the messages of all ranks with the results of `clamp_sketch`.
        target: [T] int64. Rows with ignore_index get a finished bracket.
        kept: number of logits that the clamp keeps.
        margin: in ranks of the sorted row.

    Returns:
        [T, 4] int32: lowest key, highest key, mode, reserved (Bracket of csrc/clamp.h).
    """
    return _clamp_bracket(sketches, target, kept, margin, spec)
