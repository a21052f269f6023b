"""first_only: makes a second derivative an error."""

import functools
from collections.abc import Callable

import torch


def first_only(name: str) -> Callable:
    """Decorates the backward of the function `name`: differentiating its result is a RuntimeError, not zero."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *grads):
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # no create_graph=True
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            inputs = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
            return tuple(None if x is None else _NoDerivative.apply(name, x, *inputs) for x in found)

        return run

    return decorate


class _NoDerivative(torch.autograd.Function):
    """Returns `grad` unchanged, with an autograd edge to `inputs` whose backward raises."""

    @staticmethod
    def forward(ctx, name, grad, *inputs):
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name} has no second derivative; call backward without create_graph=True")
