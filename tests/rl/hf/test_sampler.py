"""The in-process sampler against the model's own plain forward pass."""

from __future__ import annotations

import pytest
import torch
import transformers

from entcov.rl.batch import pack
from entcov.rl.config import ModelConfig
from entcov.rl.hf.model import batch_token_stats, build_model, forward
from entcov.rl.hf.sampler import InProcessSampler, draw, likeliest
from tests.support.list_batch import said
from tests.support.tiny_run import RECIPE, prompts


@pytest.fixture(scope="module")
def policy():
    config = ModelConfig(config=RECIPE["model"]["config"] | {"tie_word_embeddings": False}, tokenizer="char")
    model, tokenizer = build_model(config, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)  # far from uniform, and sequences of many lengths
    return model, tokenizer


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprob_is_that_of_the_plain_forward_pass(policy, temperature):
    model, tokenizer = policy
    sampler = InProcessSampler(model, tokenizer, batch_size=16)
    rollouts = sampler.generate(prompts(12), group_size=4, temperature=temperature, max_response_length=24, seed=3)
    assert {r.finished for r in rollouts} == {True, False}
    assert [(r.prompt.uid, r.sample) for r in rollouts] == [(i, g) for i in range(12) for g in range(4)]
    for rollout in rollouts:
        ids = [*rollout.prompt.tokens, *rollout.tokens]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0].double()
        logprob = (logits / temperature).log_softmax(-1)[len(rollout.prompt.tokens) - 1 : -1]
        expected = logprob.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprob).double(), expected, atol=2e-5, rtol=1e-5)
        assert rollout.finished == (rollout.tokens[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in rollout.tokens[:-1]
        assert rollout.finished or len(rollout.tokens) == 24


def test_every_prompt_may_have_its_own_temperature(policy):
    model, tokenizer = policy
    sampler, own = InProcessSampler(model, tokenizer, batch_size=16), [0.6, 1.0, 1.4, 1.0, 0.6, 1.2]
    options = {"group_size": 3, "max_response_length": 12, "seed": 3}
    rollouts = sampler.generate(prompts(6), temperature=own, **options)
    for rollout in rollouts:
        ids = [*rollout.prompt.tokens, *rollout.tokens]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0].double()
        logprob = (logits / own[rollout.prompt.uid]).log_softmax(-1)[len(rollout.prompt.tokens) - 1 : -1]
        expected = logprob.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprob).double(), expected, atol=2e-5, rtol=1e-5)
    equal = sampler.generate(prompts(6), temperature=[0.7] * 6, **options)
    again = sampler.generate(prompts(6), temperature=0.7, **options)
    assert [*map(said, equal)] == [*map(said, again)]  # to the last bit
    for bad, why in (([1.0] * 5, "one for each of 6 prompts, got 5"), ([0.0] + [1.0] * 5, "greater than 0, got 0.0")):
        with pytest.raises(ValueError, match=f"temperature: .*{why}"):
            sampler.generate(prompts(6), temperature=bad, **options)


def test_prompt_logprobs_are_those_of_the_plain_forward_pass(policy, monkeypatch):
    model, tokenizer = policy
    sampler, some = InProcessSampler(model, tokenizer, batch_size=16), prompts(9)
    assert 1 in {len(prompt.tokens) for prompt in some}
    for most in (4096, 12):
        monkeypatch.setattr("entcov.rl.hf.sampler._PROMPT_TOKENS", most)
        for prompt, found in zip(some, sampler.prompt_logprobs(some), strict=True):
            with torch.no_grad():
                logp = model.eval()(torch.tensor([prompt.tokens])).logits[0].log_softmax(-1)
            expected = logp[:-1].gather(1, torch.tensor(prompt.tokens[1:]).long()[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found), expected, atol=2e-5, rtol=1e-5)


def test_responses_do_not_depend_on_the_batch_they_are_generated_in(policy):
    options = {"group_size": 2, "temperature": 1.0, "max_response_length": 10, "seed": 5}
    texts = []
    for batch_size in (1, 2, 6, 64):
        rollouts = InProcessSampler(*policy, batch_size=batch_size).generate(prompts(7), **options)
        texts.append([r.tokens.tolist() for r in rollouts])
    assert all(t == texts[0] for t in texts)
    other = InProcessSampler(*policy, batch_size=64).generate(prompts(7), **(options | {"seed": 6}))
    assert [r.tokens.tolist() for r in other] != texts[0]


def test_rollouts_carry_their_weight_version_and_a_text_without_the_end_token(policy):
    model, tokenizer = policy
    sampler = InProcessSampler(model, tokenizer, batch_size=16)
    sampler.sync(7, None)
    rollouts = sampler.generate(prompts(6), group_size=4, temperature=1.0, max_response_length=24, seed=3)
    assert {r.finished for r in rollouts} == {True, False} and {r.weight_version for r in rollouts} == {7}
    for rollout in rollouts:
        kept = [t for t in rollout.tokens if t != tokenizer.eos_token_id]
        assert len(kept) == len(rollout.tokens) - rollout.finished
        assert rollout.text == tokenizer.decode(kept) and tokenizer.eos_token not in rollout.text


def test_greedy_takes_the_likeliest_token(policy):
    model, tokenizer = policy
    sampler = InProcessSampler(model, tokenizer, batch_size=8)
    rollout = sampler.generate(prompts(1), group_size=1, temperature=0.0, max_response_length=6, seed=0)[0]
    ids = list(rollout.prompt.tokens)
    for token in rollout.tokens:
        with torch.no_grad():
            assert int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_draw_follows_the_distribution_and_never_takes_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, 2.0, -torch.inf]])
    n = 40_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token, logprob = draw(logits.expand(n, -1), uniform, 0.5)
    p = (logits[0].double() / 0.5).softmax(-1)
    counts = torch.bincount(token, minlength=6).double() / n
    torch.testing.assert_close(counts, p, atol=1.0 / n, rtol=0)  # a grid of uniforms: exact to one grid step
    torch.testing.assert_close(logprob.double().exp(), p[token], atol=1e-6, rtol=1e-6)
    edge, _ = draw(logits.expand(2, -1), torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), 1.0)
    assert edge.tolist() == [1, 4]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (1.0, 3), (0.7, 4), (1e-6, 0), (1.0, 99)])
def test_truncation_is_that_of_transformers(top_p, top_k):
    """Its generate() takes the k largest first and then top_p of what is left, too."""
    logits = torch.randn((20, 12), generator=torch.Generator().manual_seed(5)) * 2
    wanted = logits.double()
    if top_k:
        wanted = transformers.TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = transformers.TopPLogitsWarper(top_p)(None, wanted)
    kept = likeliest(logits, top_p, top_k)
    assert torch.equal(kept, torch.where(wanted.isfinite(), logits, -torch.inf))
    assert 20 <= int(kept.isfinite().sum()) < 240 or top_k == 99


def test_ties_and_exact_shares_of_a_truncation():
    tied = torch.tensor([[1.0, 0.0, 1.0, 1.0, -1.0]])
    assert likeliest(tied, 1.0, 2).isfinite().tolist() == [[True, False, True, True, False]]  # three share second place
    halves = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert likeliest(halves, 0.74, 0).isfinite().tolist() == [[True, True, False, False]]
    assert likeliest(halves, 0.76, 0).isfinite().tolist() == [[True, True, True, False]]
    assert likeliest(halves, 0.6, 2).isfinite().tolist() == [[True, False, False, False]]  # 2/3 of what two hold


def test_truncated_responses_have_the_truncated_log_probability(policy):
    model, tokenizer = policy
    options = {"group_size": 2, "temperature": 0.6, "max_response_length": 8, "seed": 3}
    sampler = InProcessSampler(model, tokenizer, batch_size=16)
    rollouts = sampler.generate(prompts(6), **options, top_p=0.8, top_k=5)
    assert [r.tokens.tolist() for r in rollouts] != [r.tokens.tolist() for r in sampler.generate(prompts(6), **options)]
    for rollout in rollouts:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])).logits[0]
        logp = likeliest(logits / 0.6, 0.8, 5).double().log_softmax(-1)[len(rollout.prompt.tokens) - 1 : -1]
        expected = logp.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprob).double(), expected, atol=2e-5, rtol=1e-5)


def test_dropout_is_off():
    """GPT-2's configuration asks for 0.1 everywhere; the scores of two passes would differ."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = ModelConfig(config={"model_type": "gpt2", **sizes}, tokenizer="char")
    model, _ = build_model(config, seed=0, device=torch.device("cpu"))
    assert model.training and type(model).__name__ == "GPT2LMHeadModel"
    ids = torch.randint(4, 40, (4, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_with_random_weights_comes_from_the_seed_alone():
    config = ModelConfig(config=RECIPE["model"]["config"], tokenizer="char")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, _ = build_model(config, seed=7, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    b, _ = build_model(config, seed=7, device=torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert isinstance(a, transformers.Qwen3ForCausalLM)


def test_bfloat16_computes_low_and_keeps_float32_weights(policy):
    config = ModelConfig(config=RECIPE["model"]["config"], tokenizer="char", compute_dtype="bfloat16")
    model, tokenizer = build_model(config, seed=0, device=torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    out = forward(model, input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert out.logits.dtype == torch.bfloat16
    rollouts = InProcessSampler(model, tokenizer, batch_size=8).generate(
        prompts(4), group_size=2, temperature=1.0, max_response_length=6, seed=0
    )
    batch = pack(rollouts)
    stats = batch_token_stats(model, batch, packing=False)
    assert (stats.logprob - batch.rollout_logprob[batch.loss_mask]).abs().max() < 0.05  # two paths, rounded to 8 bits
    stats.logprob.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
