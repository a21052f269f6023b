"""Rows and checks for the tests of the clamped entropy, and the kernels that they run on: the C++ ones with each
instruction set that this CPU has, and the CUDA ones, emulated. Judge: a full sort in float64."""

import pytest
import torch

from entcov import _cpu, clamp_rounds
from entcov.stats.token_stats import token_stats
from entcov.verify import reference
from entcov.verify.row_kinds import gradient_bound, value_bound
from tests.conftest import SUPPORTED_ISAS
from tests.emulator import emulated
from tests.support.thread_ranks import ThreadRanks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDS = range(2, 2 + clamp_rounds.MOST_ROUNDS - 1)  # all-gathers: of sketches, and one a round; the last is a reserve
EMULATED = "emulated"


@pytest.fixture(autouse=True, params=(*SUPPORTED_ISAS, EMULATED))
def core(request, monkeypatch):
    """The kernels that the test runs on."""
    if request.param == EMULATED:
        emulated.install(monkeypatch, request.getfixturevalue("kernels"))
        yield request.param
        return
    before = _cpu.isa()
    assert _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def even_split(V, world):
    return [V * i // world for i in range(world + 1)]


def assert_exact(logits, kept, *, monkeypatch, splits=(), temperature=0.8):
    """Value and gradient on one rank, and for every list of shard boundaries in `splits`; all ranks bit-identical, and
    no more collectives than there are rounds."""
    T, V = logits.shape
    target = torch.zeros(T, dtype=torch.int64)
    leaf = logits.double().requires_grad_()
    # Fractional weights for the gradient; the value is also that of any top-k, ties broken by the sort.
    expected = reference.tied_clamped_entropy(leaf, kept, temperature)
    torch.testing.assert_close(expected, reference.clamped_entropy(logits, kept, temperature), rtol=1e-9, atol=1e-12)
    weight = torch.linspace(0.5, 1.5, T)
    (grad,) = torch.autograd.grad(expected, leaf, weight.double())
    kept_log_p = reference.log_probs(logits, temperature).masked_fill(
        reference.clamp_weights(logits, kept) == 0, -torch.inf
    ).log_softmax(-1)  # fmt: skip
    size = reference.where_possible(kept_log_p, kept_log_p).abs() + reference.entropy_of(kept_log_p)[:, None]
    terms = kept_log_p.exp() * size * weight[:, None] / temperature

    def check(value, got, where):
        error = (value.double() - expected.detach()).abs()
        assert (error <= value_bound("clamped_entropy", expected.detach())).all(), (where, value, expected)
        bound = gradient_bound(grad, terms, logits.dtype)
        assert ((got.double() - grad).abs() <= bound).all(), where

    def local(columns, **arguments):
        columns = columns.clone().requires_grad_()
        value = token_stats(columns, target, top_k=kept, temperature=temperature, **arguments).clamped_entropy
        return value.detach(), torch.autograd.grad(value, columns, weight)[0]

    check(*local(logits), "one rank")
    for bounds in splits:
        ranks = ThreadRanks(len(bounds) - 1, monkeypatch)
        results = ranks.run(
            lambda r, bounds=bounds, ranks=ranks: local(
                logits[:, bounds[r] : bounds[r + 1]], group=ranks, vocab_start=bounds[r], vocab_size=V
            )
        )
        assert ranks.collectives in ROUNDS
        assert all(torch.equal(value, results[0][0]) for value, _ in results), bounds
        check(results[0][0], torch.cat([got for _, got in results], dim=1), bounds)


def clamped(ranks, logits, bounds, target=None, **settings):
    """token_stats of every rank."""
    target = torch.zeros(len(logits), dtype=torch.int64) if target is None else target
    settings = {"vocab_size": logits.shape[1], **settings}

    def call(rank):
        columns = logits[:, bounds[rank] : bounds[rank + 1]]
        return token_stats(columns, target, group=ranks, vocab_start=bounds[rank], **settings)

    return ranks.run(call)


def real_looking(T: int, V: int, dtype: torch.dtype, mean: float, seed: int = 0) -> torch.Tensor:
    """Logits that fall with the token id, whose neighbours are alike, and that are Gaussian beyond that."""
    rng = torch.Generator().manual_seed(seed)
    slow = torch.nn.functional.interpolate(torch.randn(T, 1, V // 64 + 2, generator=rng), size=V, mode="linear")[:, 0]
    return (mean + torch.linspace(2, -2, V) + slow + 2.2 * torch.randn(T, V, generator=rng)).to(dtype)


def adversarial(V, seed=0):
    """The rows are shuffled unless the order is the point."""
    rng = torch.Generator().manual_seed(seed)

    def shuffled(values):
        return torch.stack([values[torch.randperm(len(values), generator=rng)] for _ in range(3)])

    spread = torch.linspace(-8, 8, V)
    tied = spread.clone()
    tied[V // 4 : V // 4 + int(0.47 * V)] = spread[V // 4]
    masked = spread.masked_fill(torch.arange(V) % 3 == 1, -torch.inf)
    masked[0] = 0.5
    return {
        "all equal": torch.full((3, V), 1.25),
        "two values": shuffled(torch.where(torch.arange(V) < V // 3, 2.0, -1.0)),
        "ties at the threshold": shuffled(tied),
        "denormals": shuffled(1e-42 * torch.arange(-(V // 2), V - V // 2)),
        "signed zeros": shuffled(torch.where(torch.arange(V) % 2 == 0, 0.0, -0.0)),
        "zeros among others": shuffled(torch.where(torch.arange(V) % 5 == 0, spread, spread * 0.0)),
        "-inf columns": shuffled(masked),
        "one finite": shuffled(torch.where(torch.arange(V) == 0, 3.0, -torch.inf)),
        "descending ids": spread.flip(0).repeat(3, 1),  # the first shard holds the whole top set
        "ascending ids": spread.repeat(3, 1),
        "gaussian": 3 * torch.randn(3, V, generator=rng),
        "nearly equal": 1 + 1e-7 * torch.randn(3, V, generator=rng),
        "far below": -1e4 + 3 * torch.randn(3, V, generator=rng),
    }
