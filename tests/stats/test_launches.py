"""How many kernels a call of a public function launches, and how many collectives it enters.

Calls of launchers are counted, on a CPU: both devices have the same launchers. On a GPU a launcher launches one kernel,
and a merge after it where rows are cut into segments; covariance_stats launches that merge wherever it writes outputs
(tests/emulator/test_launch_counts.py counts the launches of the CUDA code itself). What torch itself computes is
counted by its profiler; where values would be read on a CPU and not on a GPU, as dispatched for meta tensors.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from entcov import PolicyLossConfig, Tokens, Totals, linear_token_stats, logit_covariance, policy_loss, token_stats
from entcov.objective.sequences import SequenceIndex
from entcov.ops import core
from entcov.stats import ranks
from tests.support.thread_ranks import ThreadRanks

T, V, WORLD = 5, 48, 3
# Operators of torch that launch no kernel: they allocate, or look at the same memory in another way.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "view_as", "reshape", "alias", "t",
             "as_strided", "transpose", "slice", "select", "unbind", "expand", "result_type", "resolve_conj",
             "resolve_neg", "contiguous", "to", "item", "is_nonzero", "lift_fresh", "numpy_T", "set_"}  # fmt: skip


class Counted:
    """The kernels of the CPU behind a list of the launches. segments: that a row is said to be cut into."""

    def __init__(self, kernels, segments: int):
        self.kernels, self.count, self.launched = kernels, segments, []

    def segments(self, columns: int) -> int:
        return self.count

    def hash_parts(self, num_values: int) -> int:
        return self.kernels.hash_parts(num_values)

    def __getattr__(self, name: str):
        launch = getattr(self.kernels, name)

        def counted(*args):
            self.launched.append(name)
            if name in ("row_stats", "covariance_stats"):
                outputs, workspace, _ = args[-3:]
                if workspace or (name == "covariance_stats" and outputs[0]):
                    self.launched.append("merge")
            return launch(*args)

        return counted

    def take(self) -> list[str]:
        launched, self.launched = self.launched, []
        return launched


@pytest.fixture(params=[1, 2], ids=["whole", "in segments"])
def counted(request, monkeypatch):
    kernels = Counted(core.KERNELS["cpu"], request.param)
    monkeypatch.setitem(core.KERNELS, "cpu", kernels)
    return kernels


@pytest.fixture
def alone(monkeypatch):
    kernels = Counted(core.KERNELS["cpu"], 1)
    monkeypatch.setitem(core.KERNELS, "cpu", kernels)
    return kernels


def inputs():
    rng = torch.Generator().manual_seed(0)  # the same in all threads
    logits = torch.randn(T, V, generator=rng)
    return logits.requires_grad_(), torch.randint(0, V, (T,), generator=rng)


def computed_by_torch(call) -> tuple[object, list[str]]:
    """(what `call` returns, the operators of torch in it that launch a kernel on a GPU)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    names = [event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")]
    return result, [name for name in names if name not in NO_KERNEL]


def test_token_stats(counted):
    logits, target = inputs()
    merge = ["merge"] if counted.count > 1 else []
    for moments in (False, True):
        stats, others = computed_by_torch(lambda moments=moments: token_stats(logits, target, moments=moments))
        assert counted.take() == ["row_stats", *merge] and others == []
        outputs, weights = (stats.logprob, stats.entropy), (torch.ones(T), torch.ones(T))
        _, others = computed_by_torch(lambda y=outputs, w=weights: torch.autograd.grad(y, logits, w))
        assert counted.take() == ["logits_grad"] and others == []


def test_token_stats_with_a_clamp(alone):
    logits, target = inputs()
    stats, others = computed_by_torch(lambda: token_stats(logits, target, clamp_p=0.3))
    assert alone.take() == ["clamped_stats"] and others == []
    token_stats(logits, target, clamp_p=0.3, moments=True)
    assert alone.take() == ["clamped_stats", "row_stats"]  # the pass of the clamp has no moments
    outputs, weight = (stats.logprob, stats.clamped_entropy), torch.ones(T)
    _, others = computed_by_torch(lambda: torch.autograd.grad(outputs, logits, (weight, weight)))
    assert alone.take() == ["logits_grad"] and others == []


def test_logit_covariance(counted):
    logits, _ = inputs()
    old, mask = logits.detach() + 0.1, torch.arange(T) != 2
    change, others = computed_by_torch(lambda: logit_covariance(old, logits, loss_mask=mask))
    assert counted.take() == ["covariance_stats", "merge"] and others == []
    outputs, weight = (change.covariance, change.kl), torch.ones(T)
    _, others = computed_by_torch(lambda: torch.autograd.grad(outputs, logits, (weight, weight)))
    assert counted.take() == ["logit_covariance_grad"] and others == []


def test_linear_token_stats(alone):
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (T, V))
    target = inputs()[1]
    for chunk_size, chunks in ((T, 1), (2, 3)):
        stats = linear_token_stats(hidden, weight, target, chunk_size=chunk_size)
        assert alone.take() == ["row_stats"] * chunks
        torch.autograd.grad(stats.logprob.sum(), (hidden, weight))
        assert alone.take() == ["logits_grad"] * chunks


def over_ranks(monkeypatch, alone, call) -> tuple[list[str], list[str], ThreadRanks]:
    """(launches of all ranks forward, those backward, the group); call(rank, group) returns (output, leaf)."""
    ranks = ThreadRanks(WORLD, monkeypatch)
    found = ranks.run(lambda rank: call(rank, ranks))
    forward = sorted(alone.take())
    for output, leaf in found:
        torch.autograd.grad(output.sum(), leaf)
    return forward, sorted(alone.take()), ranks


def shard(rank: int):
    logits, target = inputs()
    return logits.detach()[:, rank * V // WORLD : (rank + 1) * V // WORLD].clone().requires_grad_(), target


@pytest.mark.parametrize("moments", [False, True])
def test_token_stats_over_ranks(moments, alone, monkeypatch):
    def call(rank, group):
        logits, target = shard(rank)
        return token_stats(logits, target, group=group, moments=moments).entropy, logits

    forward, backward, group = over_ranks(monkeypatch, alone, call)
    assert forward == sorted(["row_stats", "message", "merge_row_stats"] * WORLD)
    assert backward == ["logits_grad"] * WORLD
    assert (group.collectives, group.bytes_sent) == (1, 4 * T * (7 if moments else 4) + 16)


def test_logit_covariance_over_ranks(alone, monkeypatch):
    def call(rank, group):
        logits, _ = shard(rank)
        return logit_covariance(logits.detach() + 0.1, logits, group=group).kl, logits

    forward, backward, group = over_ranks(monkeypatch, alone, call)
    assert forward == sorted(["covariance_stats", "message", "merge_covariance_stats"] * WORLD)
    assert backward == ["logit_covariance_grad"] * WORLD
    assert (group.collectives, group.bytes_sent) == (1, 4 * T * 8 + 16)


def test_a_clamp_over_ranks(alone, monkeypatch):
    """Two collectives: what lies in the bracket is so little that one round settles it."""

    def call(rank, group):
        logits, target = shard(rank)
        return token_stats(logits, target, group=group, clamp_p=0.3).clamped_entropy, logits

    forward, backward, group = over_ranks(monkeypatch, alone, call)
    assert forward == sorted(
        ["clamp_sketch", "clamp_bracket", "clamp_partial", "clamp_refine", "merge_row_stats"] * WORLD
        + ["message"] * 2 * WORLD
    )
    assert backward == ["logits_grad"] * WORLD
    assert (group.collectives, group.bytes_sent) == (2, 4 * T * 64 + 16 + 4 * T * 170 + 16)


# ---- torch's operators, on meta tensors: nothing is read ------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Lists the operators that launch a kernel on a GPU, those of entcov by their full names."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "entcov":
            self.names.append(f"entcov.{name}")
        elif name.removeprefix("_") not in NO_KERNEL:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


class MetaRanks(ThreadRanks):
    """Collectives are no operators."""

    def all_gather_single(self, *args, **kwargs) -> None:
        with _disable_current_modes():
            super().all_gather_single(*args, **kwargs)


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def floats() -> torch.Tensor:
    return meta(T, dtype=torch.float32)


def passes(call, leaf) -> tuple[list[str], list[str]]:
    """(operators forward, backward) of call() -> outputs that have gradients."""
    with Operators() as operators:
        outputs = call()
        forward = operators.take()
        torch.autograd.grad(outputs, leaf, [torch.empty_like(x) for x in outputs])
    return forward, [name for name in operators.take() if name != "ones_like"]


def test_operators_over_ranks(monkeypatch):
    """None of torch's, with one tensor of values (the targets): the message is written and merged by our kernels."""
    monkeypatch.setattr(ranks, "host_may_read", lambda device: False)
    group = MetaRanks(WORLD, monkeypatch)
    logits = [meta(T, V // WORLD).requires_grad_() for _ in range(WORLD)]
    target = meta(T, dtype=torch.int64)

    def call(rank: int):
        return passes(lambda: token_stats(logits[rank], target, group=group)[:2], logits[rank])

    forward, backward = ["entcov.row_stats", "entcov.message", "entcov.merge_row_stats"], ["entcov.logits_grad"]
    assert group.run(call) == [(forward, backward)] * WORLD


def test_operators_of_the_head():
    """The product, and in backward its two and one fill: the gradient of the logits is made in their place."""
    hidden, weight = meta(T, 16).requires_grad_(), meta(V, 16).requires_grad_()
    target = meta(T, dtype=torch.int64)
    forward, backward = passes(lambda: linear_token_stats(hidden, weight, target)[:2], (hidden, weight))
    assert forward == ["mm", "entcov.row_stats"]
    assert sorted(backward) == ["entcov.logits_grad_", "mm", "mm", "zero_"]


# settings -> the most operators forward and backward
LOSSES = {
    "ppo": ({}, 63, 27),
    "ppo, kl, truncated weights": ({"kl_coef": 0.1, "tis_cap": 2.0}, 93, 44),
    "gspo": ({"objective": "gspo", "aggregation": "seq-mean-token-mean"}, 74, 25),
}


@pytest.mark.parametrize("name", LOSSES)
def test_operators_of_the_policy_loss(name):
    settings, forward, backward = LOSSES[name]
    logprob = floats().requires_grad_()
    integers = {x: meta(T, dtype=torch.int64) for x in ("sequence", "sequence_length")}
    tokens = Tokens(logprob, floats(), floats(), meta(T, dtype=torch.bool), ref_logprob=floats(),
                    rollout_logprob=floats(), **integers)  # fmt: skip
    index = SequenceIndex(integers["sequence"], 2)
    config = PolicyLossConfig(**settings)
    found = passes(lambda: (policy_loss(tokens, config, totals=Totals(T, 2), sequences=index)[0],), logprob)
    assert len(found[0]) <= forward and len(found[1]) <= backward, found
