"""Named kinds of logit rows on which careless softmax code goes wrong, and the error that each output may have.

Imported by tests, benchmarks and `python -m entcov check` only.
"""

import math

import torch
from torch import Tensor


def _gaussian(T: int, V: int, rng: torch.Generator) -> Tensor:
    return 2.5 * torch.randn(T, V, generator=rng)


def _set_one(z: Tensor, value: float, rng: torch.Generator) -> Tensor:
    z[torch.arange(len(z)), torch.randint(0, z.shape[1], (len(z),), generator=rng)] = value
    return z


def _peaked(T, V, rng):  # one token has all but about 1e-7 of the mass (at temperature 0.7): entropies around 1e-6
    return _set_one(torch.randn(T, V, generator=rng), 0.7 * (16 + math.log(V)), rng)


def _two_hot(T, V, rng):
    return _set_one(_set_one(torch.full((T, V), -60.0), 3.0, rng), 3.0, rng)


def _minus_infinity(T, V, rng):  # three quarters of the columns masked; never a whole row
    z = _gaussian(T, V, rng)
    return _set_one(z.masked_fill(torch.rand(T, V, generator=rng) < 0.75, -torch.inf), 1.5, rng)


def _ties(T, V, rng):
    return 0.5 * torch.randint(-3, 4, (T, V), generator=rng)


def _one_finite(T, V, rng):
    return _set_one(torch.full((T, V), -torch.inf), 3.0, rng)


def _ascending(T, V, rng):  # the maximum is new in every chunk
    return 0.01 * torch.randn(T, V, generator=rng) + torch.linspace(-30, 30, V)


def _signed_zeros(T, V, rng):
    return torch.where(torch.rand(T, V, generator=rng) < 0.5, 0.0, -0.0)


def _denormals(T, V, rng):
    return 1e-40 * torch.randint(-3, 4, (T, V), generator=rng)


KINDS = {
    "uniform": lambda T, V, rng: torch.full((T, V), 0.75),
    "gaussian": _gaussian,
    "peaked": _peaked,
    "two-hot": _two_hot,
    "offset 1e4": lambda T, V, rng: 1e4 + 8 * _gaussian(T, V, rng),
    "offset -1e4": lambda T, V, rng: -1e4 + 8 * _gaussian(T, V, rng),
    "+-1e4": lambda T, V, rng: torch.where(torch.rand(T, V, generator=rng) < 0.5, 1e4, -1e4),
    "offset -3e4": lambda T, V, rng: -3e4 + torch.randn(T, V, generator=rng),
    "-inf columns": _minus_infinity,
    "one finite": _one_finite,
    "ascending": _ascending,
    "ties": _ties,
    "signed zeros": _signed_zeros,
    "denormals": _denormals,
}


def make_rows(kind: str, T: int, V: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[T, V] logits of that kind, rounded to `dtype`."""
    rng = torch.Generator().manual_seed(seed)
    return KINDS[kind](T, V, rng).to(dtype)


def value_bound(name: str, expected: Tensor) -> Tensor:
    """Largest error allowed for one output of token_stats or logit_covariance, given its float64 value.

    Entropies and log-probabilities keep 1e-5 absolutely and, below 1, relatively: they are sums of terms of one sign.
    A log-probability of -1e4 also carries its own rounding in fp32. The moments and covariances are differences, and
    keep 2e-5 absolutely or relatively, whichever is larger. 1e-12 is what float64 itself loses on such rows.
    """
    size = expected.abs()
    if name in ("logprob", "entropy", "clamped_entropy", "collision"):
        return 1e-5 * size.clamp(max=1.0) + 1.2e-7 * size + 1e-12
    return 2e-5 * size.clamp(min=1.0)


# Unit roundoff of a stored gradient, and half the smallest step.
ROUNDING = {torch.float32: (2**-24, 0.0), torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25)}


def gradient_bound(expected: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error allowed for the gradient of a logit: its rounding to `dtype`, and 1e-5 of the `terms` it is made of
    (the sum of their sizes, which counts where they cancel). 1e-15 is what float64 itself loses."""
    relative, absolute = ROUNDING[dtype]
    return relative * expected.abs() + 1e-5 * terms + absolute + 1e-15
