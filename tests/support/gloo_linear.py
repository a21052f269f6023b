"""Cases of linear_token_stats for every rank of a gloo group; tests/support/gloo_cases.py runs them with its own."""

import torch
import torch.distributed as dist

from entcov import linear_token_stats, token_stats
from entcov.verify import reference
from entcov.verify.row_kinds import value_bound

CASES = {}


def case(function):
    CASES[f"linear_{function.__name__}"] = function
    return function


def head(T, V, D=24, dtype=torch.float32, seed=0):
    """The same on every rank: hidden, the whole weight and bias, targets."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=rng) for s in ((T, D), (V, D), (V,)))
    target = torch.randint(0, V, (T,), generator=rng)
    return hidden.to(dtype), (0.5 * weight).to(dtype), bias.to(dtype), target


def collectives():
    return dist.group.WORLD._get_sequence_number_for_group()


def loss_of(outputs, target):
    scale = torch.linspace(0.5, 1.5, len(target))
    loss = (-outputs["logprob"] * scale + 0.3 * outputs["entropy"])[target != -100].sum()
    return loss - 0.2 * outputs["clamped_entropy"][target != -100].sum() if "clamped_entropy" in outputs else loss


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


def compare(bounds, rank, T=17, width=None, chunk_size=None, ignored=(), reduce=True, **settings):
    """Values, gradients of hidden, of this rank's rows of weight and bias, and collectives, against float64."""
    V, world = bounds[-1], dist.get_world_size()
    hidden, weight, bias, target = head(T, V)
    target[list(ignored)] = -100
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    # fp32 products of 24 terms: the logits, of a size up to 15, are off by a few 1e-6.
    expected = reference.token_stats(torch.nn.functional.linear(*exact), target.clamp(min=0), **settings)
    wanted = torch.autograd.grad(loss_of(expected, target), exact)

    start, end = bounds[rank], bounds[rank + 1]
    padding = width - (end - start) if width is not None and end == V else 0
    mine = [torch.cat((x[start:end], x.new_full((padding, *x.shape[1:]), torch.nan))) for x in (weight, bias)]
    leaves = [x.clone().requires_grad_() for x in (hidden, *mine)]
    place = dict(group=dist.group.WORLD, vocab_start=start, vocab_size=V)
    before = collectives()
    out = linear_token_stats(
        leaves[0], leaves[1], target, bias=leaves[2], chunk_size=chunk_size, moments=True, reduce_hidden_grad=reduce,
        **place, **settings,
    )  # fmt: skip
    assert collectives() - before == 1 + bool(settings.get("clamp_p") or settings.get("top_k"))
    for name, value in expected.items():
        value = torch.where(target == -100, 0.0, value.detach())
        error = (getattr(out, name).double() - value).abs()
        assert (error <= value_bound(name, value) + 1e-5).all(), (name, error.max())
        seen = [torch.empty_like(getattr(out, name)) for _ in range(world)]
        dist.all_gather(seen, getattr(out, name).detach())
        assert all(torch.equal(x, seen[0]) for x in seen), name
    before = collectives()
    grads = torch.autograd.grad(loss_of({k: v for k, v in out._asdict().items() if v is not None}, target), leaves)
    assert collectives() - before == int(reduce)
    total = grads[0]
    if not reduce:
        assert world == 1 or (total.double() - wanted[0]).abs().max() > 0.01
        dist.all_reduce(total)
    torch.testing.assert_close(total.double(), wanted[0], rtol=1e-4, atol=1e-5)
    for grad, want in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(grad[: end - start].double(), want[start:end], rtol=1e-4, atol=1e-5)
        assert (grad[end - start :] == 0).all()


def even(V, world):
    return [V * i // world for i in range(world + 1)]


@case
def equal_shards(rank, world):
    for chunk_size in (None, 5):
        compare(even(96, world), rank, chunk_size=chunk_size, temperature=0.7, clamp_p=0.3)
        compare(even(96, world), rank, chunk_size=chunk_size, ignored=(0, 1, 6, 16))
    compare(even(96, world), rank, chunk_size=1, top_k=5, reduce=False)


@case
def uneven_empty_and_padded_shards(rank, world):
    V = 91
    for chunk_size in (None, 4):
        compare([0, 1, *(V - 3 * (world - i) for i in range(2, world)), V], rank, chunk_size=chunk_size, clamp_p=0.4)
        # The last shard is all padding, and its weights are NaN; each rank takes chunks of its own.
        no_columns = [0, *even(V, world - 1)[1:], V]
        compare(no_columns, rank, width=V, chunk_size=chunk_size and chunk_size + rank, clamp_p=0.4, ignored=(3,))


@case
def no_tokens_and_ignored_tokens(rank, world):
    weight = torch.randn(5, 3, requires_grad=True)
    for T, ignore in ((0, 0), (4, 4)):
        hidden = torch.full((T, 3), torch.nan, requires_grad=True)
        target = torch.full((T,), -100)
        out = linear_token_stats(hidden, weight, target, group=dist.group.WORLD, clamp_p=0.3, chunk_size=2)
        assert all(x is None or (x.shape == (T,) and (x == 0).all()) for x in out), ignore
        grads = torch.autograd.grad(out.clamped_entropy.sum() + out.logprob.sum(), (hidden, weight))
        assert all((g == 0).all() for g in grads)


@case
def bf16_equals_token_stats_and_its_hidden_gradient_is_summed_in_fp32(rank, world):
    hidden, weight, _, target = head(33, 64, dtype=torch.bfloat16)
    mine = slice(64 * rank // world, 64 * (rank + 1) // world)
    shard = weight[mine].clone().requires_grad_()
    leaf = hidden.clone().requires_grad_()
    out = linear_token_stats(leaf, shard, target, group=dist.group.WORLD, chunk_size=8)
    alone = token_stats(hidden @ shard.detach().T, target, group=dist.group.WORLD)
    torch.testing.assert_close(out.entropy, alone.entropy, rtol=0, atol=0.05)  # a logit may round the other way
    (grad,) = torch.autograd.grad(loss_of({"logprob": out.logprob, "entropy": out.entropy}, target), leaf)
    exact = hidden.double().requires_grad_()
    expected = reference.token_stats(exact @ weight.double().T, target)
    (wanted,) = torch.autograd.grad(loss_of(expected, target), exact)
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - wanted).norm() / wanted.norm() < 0.02


@case
def without_a_hidden_gradient_backward_enters_no_collective(rank, world):
    hidden, weight, _, target = head(6, 8 * world)
    shard = weight[8 * rank : 8 * rank + 8].clone().requires_grad_()
    out = linear_token_stats(hidden, shard, target, group=dist.group.WORLD)
    before = collectives()
    out.entropy.sum().backward()
    assert collectives() == before and (shard.grad != 0).any()


@case
def ranks_that_disagree_all_get_the_same_error(rank, world):
    hidden, weight, _, target = head(6, 8 * world)
    shard, last = weight[8 * rank : 8 * rank + 8], rank == world - 1
    for change, message in [
        (dict(hidden=hidden.clone().requires_grad_(last)), "with the same reduction of hidden's gradient (0: none)"),
        (dict(target=target.roll(1)), "with the same target: the values on rank"),
        (dict(temperature=0.5), "with the same temperature: rank 0 has 1.0"),
        (dict(target=target.masked_fill(target == target[0], -100)), "with the same target: the values on rank"),
        (dict(hidden=hidden.half(), weight=shard.half()), "with the same dtype: rank 0 has float32"),
    ]:
        call = {**dict(hidden=hidden, weight=shard, target=target, chunk_size=2), **(change if last else {})}
        error = raised(lambda call=call: linear_token_stats(group=dist.group.WORLD, **call))
        assert isinstance(error, RuntimeError) and str(error).startswith("linear_token_stats: "), error
        assert message in str(error), (message, error)
    error = raised(lambda: linear_token_stats(hidden, shard, target + 99, group=dist.group.WORLD))
    assert isinstance(error, ValueError) and "6 of 6 are not" in str(error)
    compare(even(96, world), rank)
