"""What the contenders compute, on which inputs and shapes, and the expected results in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops_benchmark import ENTROPY_COEF
from entcov.verify import reference

# Weights of the outputs in the loss.
WEIGHTS = {
    "logprob": -1.0, "entropy": -ENTROPY_COEF, "clamped_entropy": -ENTROPY_COEF, "covariance": 1.0, "kl": 0.5,
}  # fmt: skip
VOCABS = (152064, 19008, 38016)  # a whole vocabulary, and its shards at 8 and 4 ranks; none a multiple of 1024
CLAMP_P = 1 / 3  # of the vocabulary that the clamped entropy leaves out
HIDDEN = 4096  # of an 8B model; at this width and above, the matrix products take most of the time

Inputs = tuple[Tensor, ...]
Function = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Workload:
    name: str
    make: Callable[[int, int, torch.dtype, str, int], Inputs]  # (tokens, columns, dtype, device, seed)
    gradient_of: tuple[int, ...]  # which inputs get one
    by_row: tuple[int, ...]  # which inputs have a row a token
    expected: Function  # all outputs in float64, differentiable
    shapes: tuple[tuple[str, int], ...]  # dtype, columns; the first matter most

    def bytes_of_one(self, inputs: Inputs) -> int:
        return sum(x.nbytes for x in inputs)

    def first_rows(self, inputs: Inputs, rows: int) -> Inputs:
        return tuple(x[:rows].clone() if i in self.by_row else x for i, x in enumerate(inputs))


def normal(rows: int, columns: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """2.5 N(0, 1), made in pieces, so that there is no fp32 copy of the whole tensor."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    for part in out.split(1024):
        part.copy_(2.5 * torch.randn(part.shape, device=device, generator=generator))
    return out


def _generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _logits_and_target(tokens: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = _generator(device, seed)
    logits = normal(tokens, columns, dtype, device, generator)
    return logits, torch.randint(0, columns, (tokens,), device=device, generator=generator)


def _two_logits(tokens: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = _generator(device, seed)
    old = normal(tokens, columns, dtype, device, generator)
    new = torch.empty_like(old)
    for before, after in zip(old.split(1024), new.split(1024), strict=True):
        after.copy_(before + 0.25 * torch.randn(before.shape, device=device, generator=generator))
    return old, new


def _head(tokens: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = _generator(device, seed)
    width = HIDDEN if device == "cuda" else 128
    hidden, weight = (normal(n, width, dtype, device, generator) for n in (tokens, columns))
    weight.mul_(0.4 / width**0.5)  # logits of about N(0, 2.5)
    return hidden, weight, torch.randint(0, columns, (tokens,), device=device, generator=generator)


def _expected_head(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    return reference.token_stats(hidden.double() @ weight.double().T, target)


SHAPES = tuple((dtype, columns) for dtype in ("bf16", "fp32") for columns in VOCABS)
TOKEN_STATS = Workload("token_stats", _logits_and_target, (0,), (0, 1), reference.token_stats, SHAPES)
COVARIANCE = Workload("logit_covariance", _two_logits, (1,), (0, 1), reference.logit_covariance, SHAPES)
HEAD = Workload("lm_head", _head, (0, 1), (0, 2), _expected_head, (("bf16", 152064),))
CLAMPED = Workload(
    "clamped_entropy", _logits_and_target, (0,), (0, 1), partial(reference.token_stats, clamp_p=CLAMP_P),
    (("bf16", 152064), ("bf16", 19008)),
)  # fmt: skip
WORKLOADS = {w.name: w for w in (TOKEN_STATS, COVARIANCE, HEAD, CLAMPED)}


def forward(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return function(*inputs)


def backward(workload: Workload, function: Function, inputs: Inputs) -> list[Tensor]:
    """Forward and backward: the gradients of the weighted sum of all outputs."""
    leaves = {i: inputs[i].detach().requires_grad_() for i in workload.gradient_of}
    outputs = function(*(leaves.get(i, x) for i, x in enumerate(inputs)))
    return list(torch.autograd.grad(loss_of(outputs), list(leaves.values())))


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    return sum(WEIGHTS[name] * value.sum() for name, value in outputs.items())


def errors(workload: Workload, function: Function, inputs: Inputs) -> dict[str, float]:
    """Largest absolute error of every output and of the first gradient against float64; NaN where one side is NaN.

    The gradient is that of the loss of the outputs that the function has. `inputs`: few rows, which may be overwritten.
    """
    kept = tuple(x.clone() for x in inputs)
    outputs = {name: value.detach().double().clone() for name, value in forward(function, inputs).items()}
    for x, original in zip(inputs, kept, strict=True):
        x.copy_(original)
    gradient = backward(workload, function, inputs)[0].detach().double()
    first = workload.gradient_of[0]
    leaf = kept[first].double().requires_grad_()
    expected = workload.expected(*(leaf if i == first else x for i, x in enumerate(kept)))
    wanted = {name: expected[name] for name in outputs}
    (expected_gradient,) = torch.autograd.grad(loss_of(wanted), leaf)
    found = {name: largest(value, wanted[name].detach()) for name, value in outputs.items()}
    return {**found, "gradient": largest(gradient, expected_gradient)}


def largest(got: Tensor, wanted: Tensor) -> float:
    difference = torch.where(got == wanted, 0.0, (got - wanted).abs())  # infinities agree
    return float(difference.max())
