"""Large vocabularies: statistics from hidden states are those from logits, and only a plain head goes that way."""

from __future__ import annotations

import pytest
import torch

from entcov.rl.config import ModelConfig
from entcov.rl.hf import model as actor_model
from entcov.rl.hf.model import batch_token_stats, build_model
from tests.support.random_batch import QWEN, batch_of

FIELDS = ("logprob", "entropy", "clamped_entropy", "entropy_drift", "collision")


def model_of(changes: dict, **settings):
    config = ModelConfig(config=QWEN | changes, tokenizer="char", **settings)
    return build_model(config, seed=0, device=torch.device("cpu"))[0]


def found_with(limit: float, model, batch, packing: bool, monkeypatch):
    """Statistics, gradients, and the number of tokens of each call of `linear_token_stats`."""
    calls, real = [], actor_model.linear_token_stats
    with monkeypatch.context() as patch:
        patch.setattr(actor_model, "LARGE_LOGITS", limit)
        patch.setattr(actor_model, "linear_token_stats", lambda h, *a, **k: (calls.append(len(h)), real(h, *a, **k))[1])
        stats = batch_token_stats(model, batch, packing=packing, temperature=0.8, clamp_p=0.3, moments=True)
    (stats.logprob.sum() + 0.5 * stats.entropy.sum() - stats.clamped_entropy.sum()).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return torch.stack([getattr(stats, name).detach() for name in FIELDS]), gradient, calls


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("changes", "dtype", "error"),
    [({}, "float32", 2e-5), ({"tie_word_embeddings": False}, "float32", 2e-5), ({}, "bfloat16", 2e-2)],
)
def test_hidden_states_give_the_statistics_and_gradients_of_logits(changes, dtype, error, packing, monkeypatch):
    model, batch = model_of(changes, compute_dtype=dtype), batch_of((9, 3, 14, 1))
    expected, gradient, none = found_with(float("inf"), model, batch, packing, monkeypatch)
    found, own, calls = found_with(-1, model, batch, packing, monkeypatch)
    # Once for all sequences: under autocast each call casts the whole head, and keeps the cast for its backward pass.
    assert none == [] and calls == [batch.num_loss_tokens]
    torch.testing.assert_close(found, expected, atol=error, rtol=error)
    assert float((own - gradient).norm() / gradient.norm()) < error


@pytest.mark.parametrize("packing", [False, True])
def test_the_bytes_of_the_logits_decide(packing, monkeypatch):
    """Padded rows have logits for every column from the first that predicts a response token."""
    model, batch = model_of({}), batch_of((9, 3))
    vocabulary = model.config.vocab_size
    prompt = min(n - m for n, m in zip(batch.lengths, (9, 3), strict=True))
    entries = batch.num_loss_tokens if packing else 2 * (max(batch.lengths) - (prompt - 1))
    for limit, taken in ((entries * vocabulary * 4, False), (entries * vocabulary * 4 - 1, True)):
        assert bool(found_with(limit, model, batch, packing, monkeypatch)[2]) is taken


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, False),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, True),
        ({"model_type": "granite", "logits_scaling": 2.0}, False),
    ],
)
def test_only_a_head_without_more_is_plain(changes, plain, monkeypatch):
    model = model_of(changes)
    assert model.plain_head is plain and model.training
    assert bool(found_with(-1, model, batch_of((5, 2)), True, monkeypatch)[2]) is plain
