"""Gradients that cannot be differentiated once more, and say so."""

import functools
from collections.abc import Callable

import torch


def first_only(name: str) -> Callable:
    """Decorates the backward of `name`: what it returns has no derivative, and taking one is a RuntimeError and not zero."""

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
    """A gradient as it is, linked to what it depends on."""

    @staticmethod
    def forward(ctx, name, grad, *inputs):
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name} has no second derivative; call backward without create_graph=True")
