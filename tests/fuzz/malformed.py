"""Calls of the internal ops with arguments that are wrong in random ways; whatever they are, an op returns or raises
ValueError, TypeError or RuntimeError, and touches no memory that is not its own.

    python -m tests.fuzz.malformed FIRST COUNT [--cpu-core EXTENSION] [--cuda EXTENSION]

prints each seed before it makes the calls of that seed, and "done" at the end: for a process of its own, which may
crash. --cpu-core: this build of entcov._cpu (tests/fuzz/sanitized.py). --cuda: the CUDA side of the ops instead, its
kernels from this emulated build.

A call is one that token_stats or logit_covariance would make, on small random rows, with up to three arguments spoiled.
"""

import argparse
import importlib.util
import sys

import torch
from torch import Tensor

FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.5, 1.5, 161.0, 9e4, 2.0**24, 1e10, 1e30, -3e38, 0.0)
INTEGERS = (
    -(2**63),
    2**63 - 1,
    2**62,
    -(2**31),
    2**31,
    2**24 + 1,
    2**25,
    -1000,
    -8,
    -7,
    -3,
    -1,
    0,
    1,
    2,
    3,
    7,
    160,
    10**6,
)
THREADS = (1, 2, 100_000, 2**31 - 1, 0, -5)
ALLOWED = (ValueError, TypeError, RuntimeError)


def valid_calls(draw) -> dict[str, tuple]:
    """{name: (op, arguments)} of one small sharded call of each kind."""
    from entcov.ops.core import RowSpec
    from entcov.ops.message import message
    from tests.fuzz import draws
    from tests.support import local_ops

    ops = torch.ops.entcov
    T, V, dtype = draw.randint(1, 5), draw.choice((draw.size(60), draw.size(1500), 4500)), draw.choice(draws.DTYPES)
    z, new = (draws.spread_out(draw, draws.logits(draw, T, V, dtype), 0) for _ in range(2))
    new = torch.where(z == -torch.inf, z, new).nan_to_num(neginf=0.0)
    target, temperature = draws.target(draw, z), draw.temperature()
    kept, spec = draw.randint(1, V), RowSpec(0, V, temperature, -100)
    mask = torch.rand(T, generator=draw.torch) < 0.8
    moments = draw.chance(0.5)
    whole = ops.row_stats(z, target, *spec, moments, True)[0]
    pair = ops.covariance_stats(z, new, mask, *spec[:3], False)[0]
    gradients = [draw.normal(T) for _ in range(3)]
    clamp = torch.cat((z[:, :1].float(), torch.rand(T, 3, generator=draw.torch)), dim=1)
    grad_arguments = (z, target, whole, clamp, gradients, *spec)

    def sent(payload):
        """By two ranks, one of which has no columns."""
        return torch.stack((message(payload, target, 5, 0, V), message(payload, target, 5, 0, 0)))

    sketches = sent(ops.clamp_sketch(z, target, *spec))
    bracket = ops.clamp_bracket(sketches, target, kept, V // 10, *spec)
    partials = sent(ops.clamp_partial(z, target, bracket, *spec))
    calls = {
        "row_stats": (z, target, *spec, True, True),
        "message": (whole, target, 5, 0, V),
        "merge_row_stats": (sent(whole), target, *spec, moments),
        "logits_grad": grad_arguments,
        "logits_grad_": (z.clone(), *grad_arguments[1:]),
        "covariance_stats": (z, new, mask, *spec[:3], True),
        "merge_covariance_stats": (local_ops.messages_of(pair[None]), mask, T, *spec[:3]),
        "logit_covariance_grad": (z, new, mask, pair, gradients, *spec[:3]),
        "clamped_stats": (z, target, kept, *spec),
        "clamp_sketch": (z, target, *spec),
        "clamp_bracket": (sketches, target, kept, V // 10, *spec),
        "clamp_partial": (z, target, bracket, *spec),
        "clamp_refine": (partials, target, whole, bracket, clamp, kept, *spec),
    }
    return {name: (getattr(ops, name), arguments) for name, arguments in calls.items()}


def spoiled(draw, value, typed: bool):
    """`value` made wrong. typed: with another type, or None, as well."""
    if typed and draw.chance(0.08):
        return draw.choice((None, "1", 2.5, torch.zeros(2), [1], True))
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return draw.choice((*INTEGERS, value - 1, value + 1))
    if isinstance(value, float):
        return draw.choice((*FLOATS, 1e-30, 1e-31, 1e300, 5e-324))
    if isinstance(value, list):  # of gradients
        place = draw.randrange(len(value))
        other = draw.choice((None, spoiled(draw, value[place], False)))
        return draw.choice((value[:place], [*value, other], [*value[:place], other, *value[place + 1 :]]))
    return draw.choice((_values, _values, _values, _shape, _strides, _dtype))(draw, value)


def _values(draw, x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    where = torch.rand(x.shape, generator=draw.torch) < draw.choice((0.02, 0.3, 1.0))
    if x.dim() and x.shape[-1] and draw.chance(0.5):  # one of the first fields of some rows, and nothing else
        where &= torch.arange(x.shape[-1]) == draw.randrange(min(x.shape[-1], 9))
    if x.dtype == torch.bool:
        return x ^ where
    pool = FLOATS if x.is_floating_point() else [n for n in INTEGERS if abs(n) <= torch.iinfo(x.dtype).max]
    wrong = torch.tensor([draw.choice(pool) for _ in range(64)]).to(x.dtype)
    return torch.where(where, wrong[torch.randint(0, 64, x.shape, generator=draw.torch)], x)


def _shape(draw, x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x[None]
    dim = draw.randrange(x.dim())
    return draw.choice(
        (
            lambda: x.narrow(dim, 0, x.shape[dim] // 2),
            lambda: x.narrow(dim, 0, 0),
            lambda: torch.cat((x, x), dim),
            lambda: x[None],
            lambda: x.select(dim, 0) if x.shape[dim] else x,
            lambda: x.flatten(),
        )
    )()


def _strides(draw, x: Tensor) -> Tensor:
    return draw.choice(
        (
            lambda: x.mT if x.dim() > 1 else x.repeat_interleave(2)[::2],
            lambda: x[:1].expand(x.shape) if x.dim() and x.shape[0] else x,
            lambda: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
            lambda: (
                torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) if x.numel() else x
            ),  # another alignment
        )
    )()


def _dtype(draw, x: Tensor) -> Tensor:
    dtype = draw.choice(
        (torch.float64, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.complex64)
    )
    return (
        x.nan_to_num(posinf=0, neginf=0).to(dtype)
        if x.is_floating_point() and not dtype.is_floating_point
        else x.to(dtype)
    )


def run(seed: int, on_cuda: bool) -> None:
    from tests.fuzz.draws import Draw

    draw = Draw(seed)
    calls = valid_calls(draw)
    for _ in range(6):
        name = draw.choice(list(calls))
        op, arguments = calls[name]
        arguments = list(arguments)
        for i in draw.sample(range(len(arguments)), min(len(arguments), draw.choice((1, 1, 2, 3)))):
            arguments[i] = spoiled(draw, arguments[i], typed=not on_cuda)  # on CUDA too the schema sees to types
        if name == "logits_grad_" and isinstance(arguments[0], Tensor):
            arguments[0] = arguments[0].clone() if draw.chance(0.7) else arguments[0]
        if not on_cuda:  # there it is the stream, which is PyTorch's
            torch.get_num_threads = lambda: draw.choice(THREADS)
        try:
            op(*arguments)
        except ALLOWED:
            pass
        except Exception as error:
            error.add_note(f"{name}{[(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in arguments]}")
            raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--cpu-core")
    parser.add_argument("--cuda")
    wanted = parser.parse_args()
    if wanted.cpu_core:
        spec = importlib.util.spec_from_file_location("_cpu", wanted.cpu_core)
        sys.modules["entcov._cpu"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if wanted.cuda:
        import pytest

        from tests.emulator import emulated

        emulated.install(pytest.MonkeyPatch(), emulated.load(wanted.cuda))
    for seed in range(wanted.first, wanted.first + wanted.count):
        print(seed, flush=True)
        run(seed, bool(wanted.cuda))
    print("done")


if __name__ == "__main__":
    main()
