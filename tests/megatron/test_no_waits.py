"""What the actor does between Megatron's forward and backward reads nothing from the device: on meta tensors, which
have no values. Which rows of a micro-batch are in the loss is read once, where its inputs are built, before the passes.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("mbridge")

from entcov import PolicyLossConfig, Totals  # noqa: E402
from entcov.controls import Selection, make_control  # noqa: E402
from entcov.rl.batch import pack  # noqa: E402
from entcov.rl.types import Example, Prompt, Rollout  # noqa: E402
from megatron_integration import adaptors  # noqa: E402
from megatron_integration.actor import MegatronActor  # noqa: E402
from megatron_integration.micro_batches import build_inputs  # noqa: E402

V = 16


@pytest.fixture
def batch():
    prompt = Prompt(0, Example("test", (), "1"), (5, 6, 7))
    rollouts = [Rollout(prompt, i, [7] * n, [-1.0] * n, True, 0, reward=float(i)) for i, n in enumerate((2, 5, 3))]
    found = pack(rollouts)
    found.assign_scores({name: torch.zeros(len(found.tokens)) for name in ("logprob", "entropy", "entropy_drift")}, 0)
    return found


@pytest.fixture
def actor(monkeypatch):
    monkeypatch.setattr(adaptors.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(adaptors.dist, "get_world_size", lambda group: 1)
    made = object.__new__(MegatronActor)
    made.__dict__.update(
        clamp={"clamp_p": 0.3}, temperature=1.0, controls=[make_control("clip_cov")],
        loss=PolicyLossConfig(objective="gspo", aggregation="seq-mean-token-mean"),
        bridge=SimpleNamespace(hf_config=SimpleNamespace(vocab_size=V)),
    )  # fmt: skip
    return made


def on_meta(micro):
    parts = {name: getattr(micro, name).to("meta") for name in ("target", "places", "rows")}
    return replace(micro, sequences=micro.sequences.to("meta"), **parts)


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_a_micro_batch(packing, batch, actor):
    micro = on_meta(build_inputs(batch, unit=4, packing=packing, context_parallel=2, context_rank=0))
    logits = torch.empty(*micro.target.shape, V, dtype=torch.bfloat16, device="meta", requires_grad=True)
    chosen = torch.empty(batch.num_loss_tokens, dtype=torch.bool, device="meta")
    loss, count, metrics = actor._logits_loss(micro, [Selection(chosen)], logits, totals=Totals(10, 3))
    loss.backward()
    assert logits.grad.shape == logits.shape and count.shape == ()
    assert all(value.device.type == "meta" for value in metrics.values())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("context_parallel", [1, 2])
def test_places_and_rows_are_the_same_tokens(packing, context_parallel, batch):
    seen = []
    for rank in range(context_parallel):
        micro = build_inputs(batch, unit=4, packing=packing, context_parallel=context_parallel, context_rank=rank)
        assert torch.equal(micro.target.flatten()[micro.places], batch.target[micro.rows])
        assert torch.equal(micro.inputs["position_ids"].flatten()[micro.places], batch.position[micro.rows])
        own = micro.local(Selection(batch.token_id[batch.loss_mask] % 3 == 0))
        assert torch.equal(own.mask, batch.token_id[micro.rows] % 3 == 0)
        seen += micro.rows.tolist()
    assert sorted(seen) == batch.loss_mask.nonzero()[:, 0].tolist()
