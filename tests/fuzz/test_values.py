"""The public ops on random rows, shapes, strides, settings and shards against tests/fuzz/oracle.py: values, gradients.

Each case follows from its seed, which the failure names. A longer run, or one case again:

    ENTCOV_FUZZ_CASES=2000 python -m pytest tests/fuzz
    ENTCOV_FUZZ_SEED=137 ENTCOV_FUZZ_CASES=1 python -m pytest tests/fuzz/test_values.py
"""

import contextlib

import pytest
import torch
from torch import Tensor

from entcov import linear_token_stats, logit_covariance, token_stats
from entcov.verify.row_kinds import ROUNDING, gradient_bound
from tests.conftest import SUPPORTED_ISAS
from tests.emulator import emulated
from tests.fuzz import draws, oracle
from tests.fuzz.draws import Draw
from tests.support.thread_ranks import ThreadRanks

DIFFERENTIABLE = ("logprob", "entropy", "clamped_entropy")
FP32_MAX = torch.finfo(torch.float32).max


@contextlib.contextmanager
def case(seed: int):
    try:
        yield Draw(seed)
    except Exception as error:
        error.add_note(f"ENTCOV_FUZZ_SEED={seed} ENTCOV_FUZZ_CASES=1 makes this case again")
        raise


def value_bound(name: str, expected: Tensor) -> Tensor:
    """What token_stats promises: 1e-5, also relatively for what is a sum of terms of one sign. Beyond 1 a value has the
    rounding of fp32 as well, of (x - max), of its product and of the sum with L."""
    size = expected.abs()
    if name in ("varentropy", "entropy_drift"):
        return 2e-5 * size.clamp(min=1.0)
    return 1e-5 * size.clamp(max=1.0) + 2.4e-7 * size + 1e-12


def close(what: str, got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Within the bound; an expected value beyond the range of `got` is infinite in it."""
    most = torch.finfo(got.dtype).max
    beyond = expected.abs() > most * (1 - 1e-3)  # may round either way
    assert not got.isnan().any(), f"{what}: NaN where {expected[got.isnan()][:4]} is right"
    assert (got[beyond].double() * expected[beyond].sign() > 0.99 * most).all(), f"{what}: {got[beyond][:4]}"
    error = torch.where(beyond, 0.0, got.double() - expected).abs()
    bad = ~(error <= bound) & ~beyond
    assert not bad.any(), f"{what}: {got[bad][:4]}, should be {expected[bad][:4]} to {bound[bad][:4]}"


def settings_of(draw: Draw, V: int) -> tuple[dict, int | None]:
    """Arguments of the clamp, and how many logits it keeps."""
    kind = draw.randrange(3)
    if kind == 0:
        return {}, None
    if kind == 1:
        kept = draw.choice((1, V, draw.randint(1, V)))
        return {"top_k": kept}, kept
    p = draw.choice((0.0, 0.33, 0.99, draw.random()))
    return {"clamp_p": p}, V - int(V * p)


def weights_of(draw: Draw, names: list[str], T: int) -> dict[str, Tensor]:
    """A gradient for some of the outputs, 0 for some of the rows."""
    chosen = [name for name in names if draw.chance(0.7)] or names[:1]
    return {name: draw.normal(T) * (torch.rand(T, generator=draw.torch) < 0.9) for name in chosen}


def over_ranks(call, columns: Tensor, bounds: list[int], monkeypatch) -> tuple:
    """What call(columns of a rank, arguments of its shard) returns: ([outputs], gradient), with the outputs the same
    bits on every rank, and the gradients of all ranks side by side."""
    ranks = ThreadRanks(len(bounds) - 1, monkeypatch)
    results = ranks.run(
        lambda r: call(columns[:, bounds[r] : bounds[r + 1]], {"group": ranks, "vocab_start": bounds[r]})
    )
    for outputs, _ in results:
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0][0], strict=True)), "ranks differ"
    return results[0][0], torch.cat([grad for _, grad in results], dim=1)


def check_token_stats(draw: Draw, monkeypatch, most: int) -> None:
    z = draws.logits(draw, draw.size(6), draw.columns(most), draw.choice(draws.DTYPES))
    check_rows(draw, monkeypatch, z, settings_of(draw, z.shape[1]))


def check_clamp(draw: Draw, monkeypatch, most: int) -> None:
    """Many rows whose threshold has near neighbours, over ranks with a few hundred columns each."""
    z = draws.near_threshold(draw, 24, draw.randint(most // 4, most))
    kept = draw.randint(1, z.shape[1])
    check_rows(draw, monkeypatch, z, ({"top_k": kept}, kept))


def check_rows(draw: Draw, monkeypatch, z: Tensor, clamping: tuple[dict, int | None]) -> None:
    (T, V), dtype, (clamp, kept) = z.shape, z.dtype, clamping
    temperature, padding = draw.temperature(), draw.choice((0, 0, 3))
    columns, target = draws.spread_out(draw, z, padding), draws.target(draw, z)
    ignored = torch.rand(T, generator=draw.torch) < 0.1
    if ignored.any():
        columns[ignored] = torch.nan  # not read
    moments, ignore_index = draw.chance(0.5), draw.choice((-100, -1, -(2**63)))
    expected = oracle.token_stats(z, target, temperature, kept)
    names = [name for name in DIFFERENTIABLE if name in expected]
    weights = weights_of(draw, names, T)
    given = target.masked_fill(ignored, ignore_index)
    settings = dict(temperature=temperature, moments=moments, ignore_index=ignore_index, vocab_size=V, **clamp)

    def call(part: Tensor, shard: dict):
        part = part.detach().requires_grad_()
        leading = draw_shape if not shard else (T,)
        stats = token_stats(part.unflatten(0, leading), given.view(leading), **settings, **shard)
        stats = {name: value.reshape(T) for name, value in stats._asdict().items() if value is not None}
        (grad,) = torch.autograd.grad([stats[n] for n in weights], part, [weights[n] for n in weights])
        return [value.detach() for value in stats.values()], grad, stats.keys()

    draw_shape = draw.choice(((T,), (1, T), (T, 1)))
    outputs, grad, found = call(columns, {})
    wanted, terms = oracle.token_stats_gradient(z, target, temperature, kept, weights)
    bound = gradient_bound(wanted, terms, dtype)
    results = [("one rank", outputs, grad)]
    cut = draws.bounds(draw, V + padding)
    results.append((f"ranks {cut}", *over_ranks(lambda *a: call(*a)[:2], columns, cut, monkeypatch)))
    assert set(found) == (set(expected) if moments else set(names))
    for where, outputs, grad in results:
        for name, value in zip(found, outputs, strict=True):
            truth = expected[name].masked_fill(ignored, 0.0)
            close(f"{where}: {name}", value, truth, value_bound(name, truth))
        assert (grad[:, V:] == 0).all(), f"{where}: padding has a gradient"
        dead = ignored[:, None]
        close(f"{where}: gradient", grad[:, :V], wanted.masked_fill(dead, 0.0), bound)


def check_logit_covariance(draw: Draw, monkeypatch, most: int) -> None:
    T, V, dtype = draw.size(6), draw.columns(most), draw.choice(draws.DTYPES)
    old, temperature, padding = draws.logits(draw, T, V, dtype), draw.temperature(), draw.choice((0, 0, 3))
    if draw.chance(0.3):
        new = draws.logits(draw, T, V, dtype)
    else:  # a step
        new = old.double() + draw.choice((1e-3, 0.1, 3.0)) * draw.normal(T, V) + draw.choice((0.0, 2.0))
        new = new.to(dtype)
    new = torch.where(new.isfinite(), new, torch.where(old.isfinite(), old, torch.zeros_like(old)))
    mask = torch.rand(T, generator=draw.torch) < 0.9
    before, after = draws.spread_out(draw, old, padding), draws.spread_out(draw, new, padding)
    before[~mask] = torch.nan
    expected, sizes, raw_sizes, grads, grad_terms = oracle.logit_covariance(old, new, temperature)
    # What cancels keeps 1e-5 of its terms; the change of a logit is a difference in fp32, rounded once.
    bounds = {n: 1e-5 * (1 + sizes[n]) + 2.4e-7 * (raw_sizes[n] + expected[n].abs()) for n in expected}
    expected["predicted_entropy_change"], bounds["predicted_entropy_change"] = (
        -expected["covariance"],
        bounds["covariance"],
    )
    weights = weights_of(draw, list(grads), T)
    given = None if mask.all() and draw.chance(0.5) else mask

    def call(part: Tensor, shard: dict):
        begin = shard.get("vocab_start", 0)
        part = part.detach().requires_grad_()
        mine = before[:, begin : begin + part.shape[1]]
        change = logit_covariance(mine, part, temperature=temperature, vocab_size=V, loss_mask=given, **shard)._asdict()
        (grad,) = torch.autograd.grad([change[n] for n in weights], part, [weights[n] for n in weights])
        return [change[name].detach() for name in expected], grad

    wanted = sum(weights[n].double()[:, None] * grads[n] for n in weights)
    terms = sum(weights[n].double().abs()[:, None] * grad_terms[n] for n in weights)
    cut = draws.bounds(draw, V + padding)
    for where, (outputs, grad) in {
        "one rank": call(after, {}),
        f"ranks {cut}": over_ranks(call, after, cut, monkeypatch),
    }.items():
        for name, value in zip(expected, outputs, strict=True):
            close(f"{where}: {name}", value, expected[name].masked_fill(~mask, 0.0), bounds[name])
        assert (grad[:, V:] == 0).all(), f"{where}: padding has a gradient"
        dead = ~mask[:, None]
        close(f"{where}: gradient", grad[:, :V], wanted.masked_fill(dead, 0.0), gradient_bound(wanted, terms, dtype))


def check_linear_token_stats(draw: Draw) -> None:
    """Hidden states and weights are small multiples of powers of 2, so that the logits are exact in every dtype."""
    T, V, D, dtype = draw.size(20), draw.size(300), draw.size(8), draw.choice(draws.DTYPES)

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=draw.torch).to(dtype)

    hidden, weight, bias = whole(T, D), 0.25 * whole(V, D), draw.choice((None, whole(V)))
    z = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert torch.equal(z.to(dtype).double(), z)
    padding, temperature = draw.randrange(min(V, 3)), draw.temperature()
    V -= padding
    target = torch.randint(0, V, (T,), generator=draw.torch)
    ignored = torch.rand(T, generator=draw.torch) < 0.2
    clamp, kept = settings_of(draw, V)
    expected = oracle.token_stats(z[:, :V], target, temperature, kept)
    weights = weights_of(draw, [name for name in DIFFERENTIABLE if name in expected], T)
    weights = {name: value.masked_fill(ignored, 0.0) for name, value in weights.items()}
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    stats = linear_token_stats(
        hidden, weight, target.masked_fill(ignored, -100), bias=bias, vocab_size=V, temperature=temperature,
        moments=True, chunk_size=draw.choice((None, 1, 3, T)), **clamp,
    )._asdict()  # fmt: skip
    for name, truth in expected.items():
        close(name, stats[name].detach(), truth.masked_fill(ignored, 0.0), value_bound(name, truth))
    grads = torch.autograd.grad([stats[n] for n in weights], leaves, [weights[n] for n in weights])
    of_logits, terms = oracle.token_stats_gradient(z[:, :V], target, temperature, kept, weights)
    of_logits, terms = (torch.nn.functional.pad(x, (0, padding)) for x in (of_logits, terms))
    wrong = gradient_bound(of_logits, terms, dtype)
    h, w = hidden.detach().double(), weight.detach().double()
    # A gradient is a product of that of the logits, rounded to the dtype, and is itself rounded: once, or once a chunk.
    step, smallest = ROUNDING[dtype]
    for got, want, bound, size in zip(
        grads,
        (of_logits @ w, of_logits.T @ h, of_logits.sum(0)),
        (wrong @ w.abs(), wrong.T @ h.abs(), wrong.sum(0)),
        (of_logits.abs() @ w.abs(), of_logits.abs().T @ h.abs(), of_logits.abs().sum(0)),
        strict=False,
    ):
        close("gradient", got, want, bound + 2 * step * size + (T + 1) * smallest + 1e-5 * size)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("check", [check_token_stats, check_clamp, check_logit_covariance])
def test_random_rows(check, device, isa, monkeypatch, request):
    if device == "emulated":
        if isa != "avx2":
            pytest.skip("the CUDA kernels have one instruction set")
        emulated.install(monkeypatch, request.getfixturevalue("kernels"))
    for seed in draws.seeds(60 if device == "cpu" else 8, run=SUPPORTED_ISAS.index(isa)):
        with case(seed) as draw, monkeypatch.context() as patch:
            check(draw, patch, 2200 if device == "cpu" else 900)


def test_random_heads():
    for seed in draws.seeds(80):
        with case(seed) as draw:
            check_linear_token_stats(draw)
