"""What every rank of a gloo group runs for stats/test_vocab_parallel.py: each function is one case, run in order.

A case gets (rank, world) and asserts. `main` reports the outcome of each case of its rank as JSON.
"""

import json
import os
import re
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from entcov.verify import reference
from entcov.verify.row_kinds import gradient_bound, make_rows, value_bound
from tests.support import disagreements, gloo_linear
from tests.support.processes import LIMIT

CASES = dict(gloo_linear.CASES)


def case(function):
    CASES[function.__name__] = function
    return function


def same_on_all_ranks(*values):
    """Bit for bit."""
    for value in values:
        seen = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(seen, value.detach().contiguous())
        assert all(torch.equal(x.view(torch.int32), seen[0].view(torch.int32)) for x in seen)


def collectives():
    return dist.group.WORLD._get_sequence_number_for_group()


def batch(T, V, dtype=torch.float32, kind="gaussian", seed=0):
    logits = make_rows(kind, T, V, dtype, seed)
    target = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed))
    return logits, torch.where(logits.gather(1, target[:, None])[:, 0] == -torch.inf, logits.float().argmax(-1), target)


def compare(logits, target, bounds, rank, order=None, width=None, **settings):
    """token_stats of shard `order[rank]` between `bounds` against the unsharded oracle. `width`: with columns of NaN
    after the end of the vocabulary, where padding is."""
    V = logits.shape[1]
    at = rank if order is None else order[rank]
    start, end = bounds[at], bounds[at + 1]
    columns = logits[:, start:end]
    if width is not None and end == V:
        columns = torch.cat((columns, columns.new_full((len(logits), width - (end - start)), torch.nan)), dim=1)
    leaf = columns.clone().requires_grad_()
    out = token_stats(leaf, target, group=dist.group.WORLD, vocab_start=start, vocab_size=V, moments=True, **settings)
    whole = logits.double().requires_grad_()
    expected = reference.token_stats(whole, target, **settings)
    for name, value in expected.items():
        error, bound = (getattr(out, name).double() - value).abs(), value_bound(name, value.detach())
        assert (error <= bound).all(), (name, error.max())
    same_on_all_ranks(*(x for x in out if x is not None))
    names = [name for name in ("logprob", "entropy", "clamped_entropy") if name in expected]
    for i, name in enumerate(names):
        weight = torch.linspace(0.5, 2.0, len(target)).roll(i)
        before = collectives()
        (grad,) = torch.autograd.grad(getattr(out, name), leaf, weight, retain_graph=True)
        assert collectives() == before, "backward entered a collective"
        (wanted,) = torch.autograd.grad(expected[name], whole, weight.double(), retain_graph=True)
        bound = gradient_bound(wanted, wanted.abs().amax(-1, keepdim=True).expand_as(wanted), logits.dtype)
        assert ((grad[:, : end - start].double() - wanted[:, start:end]).abs() <= bound[:, start:end]).all(), name
        assert (grad[:, end - start :] == 0).all()


def even(V, world):
    return [V * i // world for i in range(world + 1)]


@case
def equal_shards(rank, world):
    V = 1200
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, kind in enumerate(("gaussian", "peaked", "-inf columns", "ties", "offset 1e4", "signed zeros")):
        compare(*batch(9, V, dtypes[i % 3], kind), even(V, world), rank, temperature=0.7, clamp_p=0.3)
    compare(*batch(9, V), even(V, world), rank)
    compare(*batch(9, V), even(V, world), rank, top_k=5)


@case
def uneven_empty_and_padded_shards_in_any_order(rank, world):
    V = 901
    bounds = [0, 1, *(V - 3 * (world - i) for i in range(2, world)), V]
    compare(*batch(7, V), bounds, rank, clamp_p=0.4)
    compare(*batch(7, V), bounds, rank, order=list(reversed(range(world))), width=V, clamp_p=0.4)
    no_columns = [0, *even(V, world - 1)[1:], V]  # the last shard lies at vocab_size, all padding
    compare(*batch(7, V), no_columns, rank, width=V, clamp_p=0.4, temperature=2.0)


@case
def a_shard_beyond_the_vocabulary(rank, world):
    """Megatron pads the vocabulary to equal shards: here the last one starts beyond vocab_size, by default placing."""
    width, V = 40, 40 * (world - 1) - 7
    logits, target = batch(6, V)
    padded = torch.cat((logits, torch.full((6, width * world - V), 77.0)), dim=1)
    leaf = padded[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    out = token_stats(leaf, target, group=dist.group.WORLD, vocab_size=V, clamp_p=0.5)
    alone = token_stats(logits, target, clamp_p=0.5)
    for value, wanted in zip(out[:3], alone[:3], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    out.entropy.sum().backward()
    exists = torch.arange(rank * width, (rank + 1) * width) < V
    assert (leaf.grad[:, ~exists] == 0).all() and (leaf.grad[:, exists] != 0).any() == exists.any()


@case
def a_shard_of_minus_infinity(rank, world):
    logits, target = batch(5, 64)
    logits[:, 64 - 64 // world :] = -torch.inf
    compare(logits, target % 8, even(64, world), rank, top_k=3)


@case
def whole_top_set_on_one_shard(rank, world):
    logits, _ = batch(5, 4000)
    logits = logits.sort(-1, descending=True).values
    compare(logits, torch.zeros(5, dtype=torch.int64), even(4000, world), rank, top_k=100)


@case
def one_collective_two_with_a_clamp(rank, world):
    logits, target = batch(6, 32 * world)
    shard = logits[:, 32 * rank : 32 * rank + 32].clone().requires_grad_()
    group = dist.group.WORLD
    calls = [({}, 1), ({"moments": True}, 1), ({"clamp_p": 0.2}, 2), ({"top_k": 3, "moments": True}, 2)]
    for settings, expected in calls:
        before = collectives()
        out = token_stats(shard, target, group=group, **settings)
        assert collectives() - before == expected, settings
        sum(x.sum() for x in out[:3] if x is not None).backward()
        assert collectives() - before == expected, "backward entered a collective"
    before = collectives()
    changed = logit_covariance(shard.detach(), shard, group=group)
    changed.kl.sum().backward()
    assert collectives() - before == 1


@case
def covariance_over_shards(rank, world):
    V = 700
    old, _ = batch(8, V, kind="-inf columns")
    new = old + 0.3 * torch.randn(8, V, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([True] * 6 + [False] * 2)
    bounds = [0, 5, *(V - 2 * (world - i) for i in range(2, world)), V]
    mine = slice(bounds[rank], bounds[rank + 1])
    leaf, whole = new[:, mine].clone().requires_grad_(), new.double().requires_grad_()
    place = dict(group=dist.group.WORLD, vocab_start=bounds[rank], vocab_size=V)
    out = logit_covariance(old[:, mine], leaf, temperature=0.8, loss_mask=mask, **place)
    expected = reference.logit_covariance(old, whole, temperature=0.8)
    for name, value in expected.items():
        got = getattr(out, name)
        assert (got[~mask] == 0).all()
        torch.testing.assert_close(got[mask].double(), value.detach()[mask], rtol=1e-5, atol=2e-5)
    same_on_all_ranks(*out)
    for name in ("covariance", "predicted_entropy_change", "entropy_change", "kl"):
        (grad,) = torch.autograd.grad(getattr(out, name).sum(), leaf, retain_graph=True)
        (wanted,) = torch.autograd.grad((expected[name] * mask).sum(), whole, retain_graph=True)
        torch.testing.assert_close(grad.double(), wanted[:, mine], rtol=1e-4, atol=1e-6)


@case
def no_tokens_and_ignored_tokens(rank, world):
    group = dist.group.WORLD
    empty = token_stats(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), group=group, clamp_p=0.3)
    assert all(x is None or x.shape == (0,) for x in empty)
    logits = torch.full((3, 5), torch.nan, requires_grad=True)
    out = token_stats(logits, torch.full((3,), -100), group=group, top_k=2, moments=True)
    assert all((x == 0).all() for x in out)
    out.clamped_entropy.sum().backward()
    assert (logits.grad == 0).all()


@case
def a_subgroup(rank, world):
    """Tensor parallelism within pairs: each pair has its own tokens."""
    pairs = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
    logits, target = batch(4, 60, seed=rank // 2)
    half = rank % 2
    out = token_stats(logits[:, 30 * half : 30 * half + 30], target, group=pairs[rank // 2], clamp_p=0.3)
    alone = token_stats(logits, target, clamp_p=0.3)
    torch.testing.assert_close(out.clamped_entropy, alone.clamped_entropy, rtol=1e-6, atol=1e-6)
    if world > 2:
        error = raised(lambda: token_stats(logits, target, group=pairs[1 - rank // 2]))
        assert isinstance(error, ValueError) and "group must contain the calling rank" in str(error)


@case
def compiled_around_a_group(rank, world):
    """The collectives break the graph and stay eager; values and gradients are the eager ones."""
    if world > 2:
        return  # compiling takes seconds, and the number of ranks does not matter to it
    logits, target = batch(4, 60)
    shard = logits[:, 30 * rank : 30 * rank + 30].clone().requires_grad_()

    def loss(x):
        stats = token_stats(x * 1.5, target, group=dist.group.WORLD, top_k=7)
        return stats.logprob.sum() - stats.clamped_entropy.sum()

    expected = torch.autograd.grad(loss(shard), shard)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, backend="aot_eager")(shard), shard), expected)


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


# What the last rank does differently, and the error that every rank must get.
MISMATCHES = {
    "temperature": (dict(temperature=0.7), r"with the same temperature: rank 0 has 1.0, rank \d has 0.7"),
    "targets": (dict(target=torch.arange(5).flip(0)), "with the same target: the values on rank"),
    "vocab_size": (dict(vocab_size=31), r"with the same vocab_size: rank 0 has \d+, rank \d has 31"),
    "overlap": (dict(vocab_start=15), r"cover the vocabulary exactly once; rank \d starts at 15, overlapping"),
    "hole": (dict(vocab_start=17), r"cover the vocabulary exactly once; "),
    "dtype": (dict(dtype=torch.bfloat16), r"with the same dtype: rank 0 has float32, rank \d has bfloat16"),
    "clamp": (dict(clamp_p=0.3), r"with the same number of logits kept \(clamp_p, top_k\): rank 0 has"),
    "ignore_index": (dict(ignore_index=-1), "with the same ignore_index: rank 0 has -100, rank . has -1"),
}


@case
def mismatched_ranks_all_get_the_same_error(rank, world):
    group, V = dist.group.WORLD, 16 * world
    for name, (change, message) in MISMATCHES.items():
        call = dict(target=torch.arange(5), clamp_p=0.2, vocab_start=16 * rank, vocab_size=V)
        logits = torch.randn(5, 16)
        if rank == world - 1:
            change = dict(change)
            if "vocab_start" in change:
                change["vocab_start"] += 16 * (world - 2)
            logits = logits.to(change.pop("dtype", torch.float32))
            call.update(change)
        error = raised(lambda logits=logits, call=call: token_stats(logits, group=group, **call))
        errors = [None] * world
        dist.all_gather_object(errors, (type(error).__name__, str(error)))
        expected = message.replace("starts at 15", f"starts at {15 + 16 * (world - 2)}")
        assert all(e == errors[0] for e in errors), (name, errors)
        assert errors[0][0] == "RuntimeError" and re.search(expected, errors[0][1]), (name, errors[0])
    # Values that are wrong everywhere: each rank's own error, and the group goes on.
    error = raised(lambda: token_stats(torch.randn(2, 4), torch.tensor([0, 10**6]), group=group))
    assert isinstance(error, ValueError) and "1 of 2 are not, first 1000000 at row 1" in str(error)
    error = raised(lambda: token_stats(torch.full((2, 4), -torch.inf), torch.tensor([0, 1]), group=group))
    assert isinstance(error, ValueError) and "2 rows have no finite logit" in str(error)
    error = raised(lambda: token_stats(torch.randn(2, 4), torch.tensor([0, 1]), group=group, vocab_start=4 * rank))
    assert isinstance(error, ValueError) and "vocab_size must be given with vocab_start" in str(error)
    compare(*batch(4, V), even(V, world), rank)


@case
def covariance_mismatches(rank, world):
    group, logits = dist.group.WORLD, torch.randn(5, 16)
    masks = torch.tensor([True, False, True, True, True]), torch.tensor([False, True, True, True, True])
    last = rank == world - 1
    for call, message in [
        (dict(loss_mask=masks[last]), "with the same loss_mask: the values on rank"),
        (dict(loss_mask=None if last else masks[0]), "with the same loss_mask: rank 0 has given, rank"),
        (dict(temperature=0.5 if last else 1.0), "with the same temperature: rank 0 has 1.0"),
    ]:
        error = raised(lambda call=call: logit_covariance(logits, logits + 0.1, group=group, **call))
        assert isinstance(error, RuntimeError) and message in str(error), error


def what_each_rank_gets(call, rank, world):
    """[(type of error, message)] of all ranks where the last one is the odd one."""
    error = raised(lambda: call(dist.group.WORLD, rank, world, rank == world - 1))
    errors = [None] * world
    dist.all_gather_object(errors, (type(error).__name__, str(error)))
    return errors


@case
def a_rank_that_fails_alone_raises_its_error_and_the_others_name_it(rank, world):
    for name, (call, message) in disagreements.FAILURES.items():
        *others, (kind, own) = what_each_rank_gets(call, rank, world)
        assert kind in ("ValueError", "TypeError") and re.search(message, own), (name, kind, own)
        told = f"rank {world - 1} of the group cannot do its part: {kind}: {own}"
        assert all(kind == "RuntimeError" and text.endswith(told) for kind, text in others), (name, others)


@case
def ranks_that_disagree_all_get_the_same_error_from_every_call(rank, world):
    for name, (call, message) in disagreements.DISAGREEMENTS.items():
        errors = what_each_rank_gets(call, rank, world)
        assert all(e == errors[0] for e in errors) and errors[0][0] == "RuntimeError", (name, errors)
        assert re.search(message, errors[0][1]), (name, errors)


@case
def token_ids_that_ranks_have_in_common_are_an_error_on_all(rank, world):
    for name, (call, message) in disagreements.REPEATED.items():
        errors = what_each_rank_gets(call, rank, world)
        assert all(e == errors[0] for e in errors) and errors[0][0] == "ValueError", (name, errors)
        assert re.search(message, errors[0][1]), (name, errors)


@case
def after_all_those_errors_the_group_goes_on(rank, world):
    for call, _ in disagreements.DISAGREEMENTS.values():
        call(dist.group.WORLD, rank, world, False)


def different_tokens(rank, world):
    """Not among CASES: gloo may end the process. Prints the error it gets."""
    T = 4 + 60 * rank
    began = time.monotonic()
    error = raised(lambda: token_stats(torch.randn(T, 8), torch.zeros(T, dtype=torch.int64), group=dist.group.WORLD))
    assert time.monotonic() - began < 25  # the group's timeout is 30 s
    print(f"{type(error).__name__}: {error}", flush=True)


def main(rank, world, rendezvous, report, only=None):
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=LIMIT))
    if only is not None:
        globals()[only](rank, world)
        os._exit(0)  # the group is broken: no orderly end
    outcome = {}
    for name, function in CASES.items():
        try:
            function(rank, world)
            outcome[name] = None
        except BaseException:
            outcome[name] = traceback.format_exc()
    Path(report).write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
