"""Named kinds of rows that the kernels are checked on, and what a float64 oracle may ask of fp32 kernels."""

import torch
from torch import Tensor

VOCAB_SIZES = (1, 7, 8, 1000, 32000, 151936, 152064)  # ends, odd widths, real vocabularies with and without padding


def _peaked(noise: Tensor) -> Tensor:
    """From a nearly certain row (H about 1e-6 at 32,000 columns) to a flat one."""
    rows = noise.clone()
    rows[:, -1] = torch.linspace(28.0, 8.0, len(rows))
    return rows


def _two_hot(noise: Tensor) -> Tensor:
    rows = noise.clone()
    rows[:, 0] = rows[:, -1] = 40.0
    return rows


def _some_infinite(noise: Tensor) -> Tensor:
    rows = noise * 3
    rows[:, 1::3] = -torch.inf
    return rows


def _one_finite(noise: Tensor) -> Tensor:
    rows = torch.full_like(noise, -torch.inf)
    rows[:, noise.shape[1] // 2] = 3.0
    return rows


def _ascending(noise: Tensor) -> Tensor:
    """The maximum is new in every chunk."""
    return (noise * 0.01 + torch.linspace(-30, 30, noise.shape[1])).contiguous()


KINDS = {
    "uniform": lambda noise: torch.full_like(noise, 2.5),
    "gaussian": lambda noise: noise * 3,
    "peaked": _peaked,
    "two-hot": _two_hot,
    "huge offset": lambda noise: noise * 3 + 1e4,
    "+-1e4": lambda noise: torch.where(noise > 0, 1e4, -1e4),
    "very negative": lambda noise: noise - 3e4,
    "-inf columns": _some_infinite,
    "one finite": _one_finite,
    "ties": lambda noise: noise.round(),
    "ascending": _ascending,
}


def rows(kind: str, T: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, V] of this kind, the same on every call, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(1000 * V + T)
    return KINDS[kind](torch.randn(T, V, generator=generator)).to(dtype)


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
