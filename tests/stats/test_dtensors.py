"""DTensors are refused by every public function, and the message says what to pass instead. On a mesh of one rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from entcov import PolicyLossConfig, Tokens, linear_token_stats, logit_covariance, policy_loss, token_stats
from entcov.integrations.dtensor import vocab_shard
from tests.support.thread_ranks import ThreadRanks

T, V, D = 5, 12, 4


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g)
    return {"hidden": hidden, "weight": weight, "bias": torch.zeros(V), "target": torch.arange(T),
            "logits": hidden @ weight.T, "logits_old": hidden @ weight.T, "loss_mask": torch.ones(T) > 0}  # fmt: skip


CALLS = {
    "token_stats": (lambda x: token_stats(x["logits"], x["target"]), ("logits", "target")),
    "linear_token_stats": (
        lambda x: linear_token_stats(x["hidden"], x["weight"], x["target"], bias=x["bias"]),
        ("hidden", "weight", "target", "bias"),
    ),
    "logit_covariance": (
        lambda x: logit_covariance(x["logits_old"], x["logits"], loss_mask=x["loss_mask"]),
        ("logits_old", "logits", "loss_mask"),
    ),
}


@pytest.mark.parametrize("name, argument", [(name, x) for name, (_, arguments) in CALLS.items() for x in arguments])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
def test_statistics(name, argument, placement, inputs, mesh):
    call = CALLS[name][0]
    call(inputs)  # of plain tensors it is right
    distributed = inputs | {argument: distribute_tensor(inputs[argument], mesh, [placement])}
    shown = "logits_new" if (name, argument) == ("logit_covariance", "logits") else argument
    with pytest.raises(
        TypeError, match=rf"^{shown} must be a plain tensor, got a DTensor .*{shown}\.to_local\(\).*group="
    ):
        call(distributed)


@pytest.mark.parametrize("field", ["logprob", "old_logprob", "advantage", "loss_mask", "token_id"])
def test_the_policy_loss(field, mesh):
    fields = {name: torch.zeros(T) for name in ("logprob", "old_logprob", "advantage")}
    fields |= {"loss_mask": torch.ones(T) > 0, "token_id": torch.arange(T)}
    policy_loss(Tokens(**fields), PolicyLossConfig())
    fields[field] = distribute_tensor(fields[field], mesh, [Shard(0)])
    with pytest.raises(
        TypeError, match=rf"^{field} must be a plain tensor, .*{field}\.to_local\(\): the loss .*group="
    ):
        policy_loss(Tokens(**fields), PolicyLossConfig())


def test_the_way_out_is_one(inputs, mesh):
    local, place = vocab_shard(distribute_tensor(inputs["logits"], mesh, [Shard(1)]))
    assert not isinstance(local, DTensor)
    expected = token_stats(inputs["logits"], inputs["target"])
    assert torch.equal(token_stats(local, inputs["target"], **place).entropy, expected.entropy)


def test_a_rank_that_passes_one_holds_nobody_up(inputs, mesh, monkeypatch):
    """It enters the collective that the others wait in, and all ranks raise."""
    ranks, half = ThreadRanks(2, monkeypatch), V // 2
    wrong = distribute_tensor(inputs["logits"][:, :half].contiguous(), mesh, [Replicate()])

    def call(rank: int) -> str:
        logits = inputs["logits"][:, half:].contiguous() if rank else wrong
        try:
            token_stats(logits, inputs["target"], group=ranks)
        except (TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    own, others = ranks.run(call)
    assert own.startswith("TypeError: logits must be a plain tensor")
    assert "rank 0 of the group cannot do its part: TypeError: logits must be a plain tensor" in others
