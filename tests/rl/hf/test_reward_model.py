"""PRIME's reward model on transformers: its gradient, its moments, divisions of the batch, and that it learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from entcov.rl.batch import pack
from entcov.rl.config import ActorConfig, ModelConfig, PrimeConfig
from entcov.rl.hf.actor import TransformersRewardModel
from entcov.rl.hf.model import build_model
from entcov.rl.hf.sampler import InProcessSampler
from tests.support.tiny_run import RECIPE, prompts

BETA = 0.5


@pytest.fixture(scope="module")
def rolled_out():
    config = ModelConfig(config=RECIPE["model"]["config"] | {"tie_word_embeddings": False}, tokenizer="char")
    model, tokenizer = build_model(config, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    rollouts = InProcessSampler(model, tokenizer, batch_size=64).generate(
        prompts(6), group_size=4, temperature=1.0, max_response_length=10, seed=0
    )
    for rollout in rollouts:  # what can be learned: whether the first token has an even number
        rollout.reward = float(rollout.tokens[0] % 2 == 0)
        rollout.temperature = 1.3 if rollout.sample % 2 else None  # of the policy alone: the reward model is at 1
    return model, pack(rollouts)


def reward_model(model, prime: dict | None = None, moved: float = 0.0, **settings) -> TransformersRewardModel:
    """`moved`: by how much its weights differ from the reference's."""
    own, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in own.parameters():
            weight.add_(moved * torch.randn(weight.shape, generator=generator))
    knobs = {"beta_train": BETA, "lr": 1e-2} | (prime or {})
    made = TransformersRewardModel(own, ActorConfig(**settings), PrimeConfig(**knobs), reference=copy.deepcopy(model))
    for group in made.optimizer.param_groups:
        group["eps"] = 1e-2  # else the first steps would blow rounding up to the size of lr
    return made


def logprobs(model, batch):
    """Of each response's tokens, one sequence at a time, at temperature 1."""
    for tokens, target in zip(batch.tokens.split(batch.lengths), batch.target.split(batch.lengths), strict=True):
        logp = model(tokens[None]).logits[0].log_softmax(-1)
        yield logp.gather(-1, target.clamp(min=0)[:, None])[target != -100, 0]


def test_one_step_is_that_of_the_cross_entropy_of_whole_responses(rolled_out):
    model, batch = rolled_out
    made = reward_model(model, moved=0.02)
    moved = copy.deepcopy(made.model)
    with torch.no_grad():
        reference = list(logprobs(model, batch))
    logit = BETA * torch.stack([(p - q).sum() for p, q in zip(logprobs(moved, batch), reference, strict=True)])
    loss = F.binary_cross_entropy_with_logits(logit, batch.responses.score)
    loss.backward()
    wanted = torch.cat([weight.grad.flatten() for weight in moved.parameters()])
    _, metrics = made.token_rewards(batch, step=1)
    found = torch.cat([weight.grad.flatten() for weight in made.model.parameters()])
    assert metrics["reward_model/grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-4)
    assert wanted.norm() > 10  # and so it was clipped to prime.max_grad_norm
    wanted *= 10 / wanted.norm()
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert metrics["reward_model/dpo_loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = (logit > 0) == (batch.responses.score > 0.5)
    assert metrics["reward_model/dpo_acc_abs_before"] == pytest.approx(float(right.double().mean()))
    assert metrics["reward_model/lr"] == 1e-2
    assert reward_model(model, {"weight_decay": 0.3}).optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("update", ["before", "after", "none"])
def test_the_step_precedes_the_rewards_or_follows_them(rolled_out, update):
    model, batch = rolled_out
    made = reward_model(model, {"update": update}, moved=0.02)
    before = copy.deepcopy(made.model)
    rewards, metrics = made.token_rewards(batch, step=1)
    changed = not torch.equal(made.model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert changed == (update != "none") == (made.weight_version == 1) == ("reward_model/dpo_loss" in metrics)
    with torch.no_grad():
        scored = logprobs(made.model if update == "before" else before, batch)
        ratio = [p - q for p, q in zip(scored, logprobs(model, batch), strict=True)]
    expected = torch.cat([torch.cat([BETA * x[:-1], torch.zeros(1)]) for x in ratio])
    assert torch.allclose(rewards[batch.loss_mask], expected, atol=1e-5)
    assert not rewards[~batch.loss_mask].any()
    assert metrics["reward_model/reward"] == pytest.approx(float(expected.sum()) / 24, abs=1e-5)
    raw = torch.stack([x.sum() for x in ratio])
    assert metrics["reward_model/raw_reward"] == pytest.approx(float(raw.mean()), abs=1e-5)
    right = (raw > 0) == (batch.responses.score > 0.5)
    assert metrics["reward_model/dpo_acc_abs"] == pytest.approx(float(right.double().mean()))


def test_no_division_of_the_batch_changes_the_rewards_or_the_step(rolled_out):
    model, batch = rolled_out
    longest, wanted = max(batch.lengths), None
    for settings in (
        {"micro_batch_tokens": 100_000},
        {"micro_batch_tokens": longest},
        {"micro_batch_tokens": 3 * longest, "packing": True},
    ):
        made = reward_model(model, {"updates_per_rollout": 2}, **settings)
        rewards, metrics = made.token_rewards(batch, step=1)
        rewards, metrics = made.token_rewards(batch, step=2)
        weights = torch.cat([weight.detach().flatten() for weight in made.model.parameters()])
        assert made.weight_version == 4
        if wanted is None:
            wanted = rewards, weights
            first = metrics
        assert torch.allclose(rewards, wanted[0], atol=5e-5)
        assert torch.allclose(weights, wanted[1], atol=2e-6)
        assert metrics == pytest.approx(first, rel=1e-3, abs=1e-5)


def test_it_learns_which_responses_are_correct(rolled_out):
    model, batch = rolled_out
    made = reward_model(model, {"lr": 3e-4, "update": "after"})
    found = [made.token_rewards(batch, step=step)[1] for step in range(12)]
    losses = [metrics["reward_model/dpo_loss"] for metrics in found]
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.3 * losses[0]
    pairs = [len(set(own.tolist())) > 1 for own in batch.responses.score.view(6, 4)]
    best = (sum(pairs) + 0.5 * (6 - sum(pairs))) / 6  # a group of equal outcomes counts half
    assert found[0]["reward_model/dpo_acc"] == 0.5 < found[-1]["reward_model/dpo_acc"] == best
    assert found[0]["reward_model/dpo_acc_abs"] < 0.7 < found[-1]["reward_model/dpo_acc_abs"] == 1.0


def test_a_score_that_is_no_probability_is_refused_before_anything_changes(rolled_out):
    model, batch = rolled_out
    batch = copy.deepcopy(batch)
    batch.responses.score[3] = 1.5
    made = reward_model(model)
    with pytest.raises(ValueError, match=r"outcome must be in \[0, 1\], for PRIME's reward model .*; got 1.5"):
        made.token_rewards(batch, step=1)
    assert made.weight_version == 0
