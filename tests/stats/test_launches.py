"""How many kernels a call of a public function launches, and how many collectives it enters.

Calls of launchers are counted, on a CPU: both devices have the same launchers. On a GPU a launcher launches one kernel,
and a merge after it where rows are cut into segments; covariance_stats launches that merge wherever it writes outputs.
What torch itself computes is counted by its profiler.
"""

import pytest
import torch

from entcov import linear_token_stats, logit_covariance, token_stats
from entcov.ops import core
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
