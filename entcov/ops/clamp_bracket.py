"""clamp_bracket: the second step of the clamp over ranks (csrc/clamp.h): sketches of all shards -> the first bracket."""

import torch
from torch import Tensor

from entcov.ops.clamp_sketch import SKETCH
from entcov.ops.core import RowSpec, check_messages, check_rows, check_spec, define, launch, messages_view


def _prepare(sketches, target, kept, margin, *spec):
    spec = RowSpec(*spec)
    check_rows(target, "target", torch.int64, target.shape[:1], sketches)
    check_messages(sketches, len(target), SKETCH)
    check_spec(spec)
    if not 1 <= kept <= spec.vocab_size < 2**25:  # 64 times that is counted in 32 bits
        raise ValueError(
            f"kept and vocab_size must have 1 <= kept <= vocab_size < 2^25, got {kept} and {spec.vocab_size}"
        )
    if not 0 <= margin <= 2**25:
        raise ValueError(f"margin must be in [0, 2^25] (ranks), got {margin}")
    return sketches.new_empty((len(target), 4), dtype=torch.int32)


def _fill(out, sketches, target, kept, margin, *spec):
    view = messages_view(sketches, len(target))
    launch("clamp_bracket", sketches.device, view, target, RowSpec(*spec), kept, margin, out)


_clamp_bracket = define(
    "clamp_bracket",
    "(Tensor sketches, Tensor target, SymInt kept, SymInt margin, SymInt vocab_start, SymInt vocab_size, "
    "float temperature, int ignore_index) -> Tensor",
    _prepare,
    _fill,
)


def clamp_bracket(sketches: Tensor, target: Tensor, kept: int, margin: int, spec: RowSpec) -> Tensor:
    """[T, 4] int32: a bracket of keys that reaches `margin` ranks beyond the kept-th logit on either side, by estimate.

    sketches: the messages of all ranks [R, T * SKETCH + 4].
    """
    return _clamp_bracket(sketches, target, kept, margin, *spec)
