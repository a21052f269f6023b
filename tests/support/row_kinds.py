"""What the kernel tests share: vocabulary sizes, rows of verify.row_kinds, targets, and a comparison in float64."""

import torch
from torch import Tensor

from entcov.verify.row_kinds import KINDS, make_rows

__all__ = ["KINDS", "VOCAB_SIZES", "assert_close", "rows", "targets"]

VOCAB_SIZES = (1, 7, 8, 1000, 32000, 151936, 152064)  # ends, odd widths, real vocabularies with and without padding


def rows(kind: str, T: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, V] of this kind, the same on every call, rounded to `dtype`."""
    return make_rows(kind, T, V, dtype, seed=1000 * V + T)


def targets(logits: Tensor) -> Tensor:
    """[T] columns: the first row takes its largest logit, the others any finite one."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.isfinite(logits).double()
    target = torch.multinomial(weight, 1, generator=generator)[:, 0] if len(logits) else weight.new_empty(0).long()
    target[:1] = logits[:1].float().argmax(-1)
    return target


def assert_close(actual: Tensor, expected: Tensor, *, absolute: float, relative: float, what: str = "") -> None:
    """|actual - expected| <= absolute + relative |expected|, elementwise in float64, NaN and infinities equal."""
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=absolute, rtol=relative, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
