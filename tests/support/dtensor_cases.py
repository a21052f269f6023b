"""Cases of logits and LM heads as DTensors, for the two ranks of a gloo group; tests/integrations/test_dtensor.py."""

import json
import re
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from entcov import linear_token_stats, token_stats
from entcov.integrations.dtensor import vocab_shard
from entcov.verify import reference
from tests.support.processes import LIMIT

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def data(vocabulary, tokens=7, width=6):
    """The same on both ranks: hidden [T, D], weight [V, D], target [T]."""
    rng = torch.Generator().manual_seed(vocabulary)
    hidden, weight = torch.randn(tokens, width, generator=rng), torch.randn(vocabulary, width, generator=rng)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=rng)


def loss_of(stats, scale=1.0):
    get = stats.get if isinstance(stats, dict) else lambda name: getattr(stats, name)
    return scale * (-get("logprob") + 0.3 * get("entropy") * torch.arange(1, len(get("entropy")) + 1)).sum()


def expected_of(hidden, weight, target):
    """(statistics, gradients of logits, hidden and weight) of the whole vocabulary in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.T
    stats = reference.token_stats(logits, target)
    return stats, torch.autograd.grad(loss_of(stats), (logits, hidden, weight))


def same(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def refused(call, message):
    try:
        call()
    except (ValueError, TypeError) as error:
        assert re.search(message, str(error)), str(error)
        return
    raise AssertionError(f"no error: {message}")


@case
def logits_of_every_division(rank):
    """Even, uneven, and a vocabulary of one column, of which the second rank has none."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for vocabulary in (10, 11, 1):
        hidden, weight, target = data(vocabulary)
        stats, (wanted, _, _) = expected_of(hidden, weight, target)
        whole = distribute_tensor(hidden @ weight.T, mesh, [Shard(-1)]).requires_grad_()
        local, place = vocab_shard(whole)
        assert place["vocab_size"] == vocabulary and place["vocab_start"] == rank * -(-vocabulary // 2)
        found = token_stats(local, target, **place)
        same(found.logprob, stats["logprob"])
        same(found.entropy, stats["entropy"])
        loss_of(found).backward()
        assert whole.grad.placements == (Shard(1),)
        same(whole.grad.full_tensor(), wanted)


@case
def gradients_go_on_to_what_the_logits_were_made_of(rank):
    """A column-parallel head by DTensor's own operators: the gradients of hidden and weight are those of one rank."""
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, target = data(11)
    _, (_, wanted_hidden, wanted_weight) = expected_of(hidden, weight, target)
    hidden = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    local, place = vocab_shard(torch.nn.functional.linear(hidden, weight))
    loss_of(token_stats(local, target, **place)).backward()
    same(hidden.grad.full_tensor(), wanted_hidden)
    same(weight.grad.full_tensor(), wanted_weight)


@case
def tokens_and_vocabulary_on_a_mesh_of_two_dimensions(rank):
    """One data-parallel rank of two, and two of one: the statistics are those of the rank's own tokens."""
    for shape, tokens in (((1, 2), slice(None)), ((2, 1), slice(4 * rank, 4 * rank + 4))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        hidden, weight, target = data(11)
        stats, (wanted, _, _) = expected_of(hidden, weight, target)
        whole = distribute_tensor(hidden @ weight.T, mesh, [Shard(0), Shard(1)]).requires_grad_()
        local, place = vocab_shard(whole)
        found = token_stats(local, target[tokens], **place)
        same(found.entropy, stats["entropy"][tokens])
        # the loss of both ranks, where each has its own tokens
        scale = torch.arange(1, len(target) + 1)[tokens]
        (-found.logprob + 0.3 * found.entropy * scale).sum().backward()
        same(whole.grad.full_tensor(), wanted)


@case
def padded_columns(rank):
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, target = data(11)
    stats, _ = expected_of(hidden, weight, target)
    logits = torch.nn.functional.pad(hidden @ weight.T, (0, 5), value=9.0)
    local, place = vocab_shard(distribute_tensor(logits, mesh, [Shard(1)]))
    same(token_stats(local, target, **place | {"vocab_size": 11}).entropy, stats["entropy"])


@case
def a_head_that_tensor_parallelism_shards(rank):
    """Shard(0) of the weight, uneven; hidden replicated: its gradient is all-reduced, here or by DTensor. The third
    mesh has one data-parallel rank."""
    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for vocabulary, mesh, others in ((10, line, []), (11, line, []), (11, plane, [Replicate()])):
        values, rows, target = data(vocabulary)
        stats, (_, wanted_hidden, wanted_weight) = expected_of(values, rows, target)
        for here in (True, False):
            hidden = distribute_tensor(values, mesh, [*others, Replicate()]).requires_grad_()
            weight = distribute_tensor(rows, mesh, [*others, Shard(0)]).requires_grad_()
            local, place = vocab_shard(weight, dim=0)
            own = hidden.to_local(grad_placements=[*others, Replicate() if here else Partial()])
            found = linear_token_stats(own, local, target, reduce_hidden_grad=here, **place)
            same(found.logprob, stats["logprob"])
            loss_of(found).backward()
            same(hidden.grad.full_tensor(), wanted_hidden)
            same(weight.grad.full_tensor(), wanted_weight)


class Policy(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.body = torch.nn.Linear(6, 6, bias=False)
        self.head = torch.nn.Linear(6, len(weight), bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(6))
            self.head.weight.copy_(weight)

    def forward(self, hidden, target, weight=None):
        return linear_token_stats(self.body(hidden), self.head.weight if weight is None else weight, target)


@case
def a_head_that_fsdp2_shards(rank):
    """Each rank has half of the tokens, and the loss times 2, since gradients are averaged: they are those of one rank.

    In the forward of the module that holds it the weight is a plain tensor. Where the head is wrapped by itself it is a
    DTensor outside of the head's forward, and gathered with Partial("avg").
    """
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, target = data(11, tokens=8)
    _, (_, wanted_body, wanted_head) = expected_of(hidden, weight, target)
    wanted_body = wanted_body.T @ hidden.double()
    own, scale = slice(4 * rank, 4 * rank + 4), torch.arange(1, 9)
    for alone in (False, True):
        policy = Policy(weight)
        if alone:
            fully_shard(policy.head, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        if alone:
            gathered = policy.head.weight.full_tensor(grad_placements=[Partial("avg")])
        stats = policy(hidden[own], target[own], gathered if alone else None)
        (2 * (-stats.logprob + 0.3 * stats.entropy * scale[own]).sum()).backward()
        same(policy.body.weight.grad.full_tensor(), wanted_body)
        same(policy.head.weight.grad.full_tensor(), wanted_head)


@case
def what_fsdp2_shards_is_no_shard_of_the_vocabulary(rank):
    """It looks like one; the ranks have other tokens, which the collective of the statistics detects."""
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, target = data(10, tokens=8)
    local, place = vocab_shard(distribute_tensor(weight, mesh, [Shard(0)]), dim=0)
    own = slice(4 * rank, 4 * rank + 4)
    try:
        linear_token_stats(hidden[own], local, target[own], **place)
    except RuntimeError as error:
        assert "target" in str(error) or "hidden" in str(error), str(error)
        return
    raise AssertionError("no error")


@case
def other_placements_are_refused_by_name(rank):
    plane = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    logits = torch.randn(4, 10)
    refused(lambda: vocab_shard(logits), "tensor must be a DTensor, got Tensor")
    whole = distribute_tensor(logits, line, [Replicate()])
    refused(lambda: vocab_shard(whole), r"\(4, 10\) must be sharded over dimension 1, .* needs no group, got .* tp: R")
    rows = distribute_tensor(logits, line, [Shard(0)])
    refused(lambda: vocab_shard(rows), r"must be sharded over dimension 1, the vocabulary; .* tp: S\(0\)")
    partial = DTensor.from_local(logits, line, [Partial()])
    refused(lambda: vocab_shard(partial), "must hold values, not partial sums .*redistribute")
    twice = distribute_tensor(logits, plane, [Shard(1), Shard(1)])
    refused(lambda: vocab_shard(twice), r"by one mesh dimension, got the placements dp: S\(1\), tp: S\(1\)")
    weight = distribute_tensor(logits, plane, [Shard(1), Shard(0)])
    refused(lambda: vocab_shard(weight, dim=0), "must be whole along the dimensions after 0")
    weight = distribute_tensor(logits, plane, [Replicate(), Shard(0)])
    refused(lambda: vocab_shard(weight, dim=0), "must be on the mesh of the vocabulary alone: .* dp: R, tp: S")
    refused(lambda: vocab_shard(rows, dim=2), r"dim must be in \[-2, 2\), got 2")


def main(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=LIMIT))
    outcome = {}
    for name, function in CASES.items():
        try:
            outcome[name] = function(rank)
        except BaseException:
            outcome[name] = traceback.format_exc()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(outcome, file)
    dist.destroy_process_group()
