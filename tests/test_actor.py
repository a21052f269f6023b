"""The torch actor: no division of the mini-batch changes an update, and selections see the current policy."""

from __future__ import annotations

import copy

import pytest
import torch

from entcov.controls import make_control
from entcov.losses import PolicyLossConfig
from entcov.rl.actor import TorchActor
from entcov.rl.batch import pack
from entcov.rl.config import ActorConfig, ModelConfig
from entcov.rl.model import batch_token_stats, build_model
from entcov.rl.sampler import InProcessSampler
from tests.test_sampler import prompts
from tests.tiny_run import RECIPE

CONTROLS = {
    "none": [],
    "entropy_bonus": [("entropy_bonus", {"entropy_coef": 0.01})],
    "aent": [("aent", {"entropy_coef": 0.05, "adaptive": False})],
    "clip_cov": [("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 50.0})],
    "kl_cov": [("kl_cov", {"kl_cov_ratio": 0.2})],
    "composed": [("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}), ("entropy_bonus", {"entropy_coef": 0.01})],
}


@pytest.fixture(scope="module")
def rolled_out():
    config = ModelConfig(config=RECIPE["model"]["config"] | {"tie_word_embeddings": False}, tokenizer="char")
    model, tokenizer = build_model(config, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    rollouts = InProcessSampler(model, tokenizer, batch_size=64).generate(
        prompts(6), group_size=4, temperature=1.0, max_response_length=10, seed=0
    )
    generator = torch.Generator().manual_seed(4)
    for rollout in rollouts:
        rollout.advantage = float(torch.randn((), generator=generator))
    return model, pack(rollouts)


def actor_for(model, controls, **settings) -> TorchActor:
    # eps 1e-2 in Adam's place of 1e-8: the first steps' sign-like updates would blow rounding up to the size of lr
    actor = TorchActor(
        copy.deepcopy(model), ActorConfig(lr=1e-2, warmup_steps=0, **settings), PolicyLossConfig(),
        [make_control(name, **knobs) for name, knobs in controls], temperature=0.8,
    )  # fmt: skip
    for group in actor.optimizer.param_groups:
        group["eps"] = 1e-2
    return actor


def two_updates(actor: TorchActor, batch) -> tuple[list[dict], list[torch.Tensor]]:
    scored = actor.score(batch)
    batch = copy.copy(batch)
    batch.old_logprob, batch.scored_version = scored["logprob"], actor.weight_version
    metrics = [actor.update(batch, step=1), actor.update(batch, step=1)]
    return metrics, [p.detach() for p in actor.model.parameters()]


@pytest.mark.parametrize("name", CONTROLS)
def test_no_division_of_the_mini_batch_changes_the_update(rolled_out, name):
    model, batch = rolled_out
    longest = max(batch.lengths)
    reference = None
    for settings in (
        {"micro_batch_tokens": 100_000},
        {"micro_batch_tokens": longest},  # one sequence a micro-batch, or a few short ones
        {"micro_batch_tokens": 3 * longest},
        {"micro_batch_tokens": 100_000, "packing": True},
        {"micro_batch_tokens": 2 * longest, "packing": True},
    ):
        metrics, weights = two_updates(actor_for(model, CONTROLS[name], **settings), batch)
        if reference is None:
            reference = metrics, weights
            assert any(not torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True))
            continue
        for got, want in zip(weights, reference[1], strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
        for got, want in zip(metrics, reference[0], strict=True):
            assert got.keys() == want.keys()
            assert got == pytest.approx(want, rel=2e-4, abs=2e-6), settings
        if "cov" in name or name == "composed":  # the same tokens, not just nearly the same loss
            key = "actor/cov_klfrac" if name == "kl_cov" else "actor/cov_clipfrac"
            assert [m[key] for m in metrics] == pytest.approx([m[key] for m in reference[0]], abs=1e-12)
            assert all(m[key] > 0 for m in metrics)


def test_padded_and_packed_statistics_agree_with_one_sequence_at_a_time(rolled_out):
    model, batch = rolled_out
    with torch.no_grad():
        alone = [batch_token_stats(model, batch.subset([s]), packing=False) for s in range(batch.num_sequences)]
        for packing in (False, True):
            together = batch_token_stats(model, batch, packing=packing, clamp_p=0.3, moments=True)
            for name in ("logprob", "entropy"):
                expected = torch.cat([getattr(a, name) for a in alone])
                torch.testing.assert_close(getattr(together, name), expected, atol=1e-5, rtol=1e-5)
            assert len(together.clamped_entropy) == len(together.collision) == batch.num_loss_tokens


def test_the_second_update_selects_under_the_policy_of_the_second_update(rolled_out):
    """A stale selection would be that of the first update; the control sees other log-probabilities."""
    model, batch = rolled_out
    actor = actor_for(model, CONTROLS["kl_cov"], micro_batch_tokens=10_000)
    seen = []
    control = actor.controls[0]
    original = control.select
    control.select = lambda tokens, **kw: (seen.append(tokens.logprob.clone()), original(tokens, **kw))[1]
    two_updates(actor, batch)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_a_gradient_that_is_not_finite_changes_nothing(rolled_out):
    model, batch = rolled_out
    actor = actor_for(model, [], micro_batch_tokens=10_000)
    batch = copy.copy(batch)
    batch.old_logprob = actor.score(batch)["logprob"]
    before = [p.clone() for p in actor.model.parameters()]
    actor.model.get_output_embeddings().weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(RuntimeError, match="step 5: the gradient norm must be finite, got nan|inf"):
        actor.update(batch, step=5)
    assert actor.weight_version == 0
    assert all(torch.equal(a, b) for a, b in zip(before, actor.model.parameters(), strict=True))


def test_a_reference_model_is_asked_for(rolled_out):
    with pytest.raises(ValueError, match="reference.*kl_coef > 0, got 0.1"):
        TorchActor(rolled_out[0], ActorConfig(), PolicyLossConfig(kl_coef=0.1), [], temperature=1.0)


def test_controls_must_agree_on_one_clamp(rolled_out):
    with pytest.raises(ValueError, match="agree on the clamped entropy"):
        actor_for(rolled_out[0], [("aent", {"clamp_p": 0.3}), ("aent", {"clamp_p": 0.2})])
