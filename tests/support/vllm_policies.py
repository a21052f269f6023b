"""Random policies, prompts and the plain forward pass that vLLM's log-probabilities are held against."""

from __future__ import annotations

import dataclasses

import torch

from entcov.rl.config import Config, ModelConfig
from entcov.rl.hf.model import build_model
from entcov.rl.load_config import parse_config
from entcov.rl.types import Example, Prompt
from tests.support.tiny_run import recipe

CPU = torch.device("cpu")
SIZES = {  # heads of 32: vLLM's CPU attention has no smaller ones
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "qwen3 untied": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 32},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 32},
}
# Float32 on both sides, a hundred tokens, log-probabilities down to -15: rounding, not a difference of formulas.
TOLERANCE = 5e-5
OPTIONS = {"group_size": 3, "temperature": 0.7, "max_response_length": 24, "seed": 3}


def settings(name: str) -> Config:
    model = {"config": {**MODELS[name], **SIZES}, "tokenizer": "char"}
    rollout = {"sampler": "vllm", "max_response_length": 24, "prompts_per_step": 6, "vllm": {"max_num_seqs": 32}}
    return parse_config(recipe("unused", model=model, rollout=rollout, **{"data.max_prompt_length": 60}))


def policy(name: str, seed: int = 0):
    """A random policy that is far from uniform and still ends some of its responses."""
    model, tokenizer = build_model(ModelConfig(**dataclasses.asdict(settings(name).model)), seed=seed, device=CPU)
    reshuffle(model, seed)
    return model, tokenizer


def vllm_sampler(config: Config, model, tokenizer):
    from entcov.rl.vllm.sampler import build_vllm_sampler

    longest, dtype = config.data.max_prompt_length, getattr(torch, config.model.compute_dtype)
    return build_vllm_sampler(config.rollout, longest, model.config, dtype, tokenizer)


def reshuffle(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (2.0 / weight.shape[1] ** 0.5))
            else:
                weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))


def prompts(n: int) -> list[Prompt]:
    """Of 33 to 50 tokens, so that a block of vLLM's prefix cache (32 tokens) is filled."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(33, 51, (n,), generator=generator).tolist()
    tokens = [torch.randint(4, 40, (k,), generator=generator).tolist() for k in lengths]
    return [Prompt(i, Example("test", (), ""), tuple(t)) for i, t in enumerate(tokens)]


def gap(model, rollouts, temperature: float = 0.7) -> float:
    """Largest difference between the sampler's log-probabilities and those of the model's plain forward pass."""
    worst = 0.0
    for rollout in rollouts:
        ids = [*rollout.prompt.tokens, *rollout.tokens]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0].double()
        logprob = (logits / temperature).log_softmax(-1)[len(rollout.prompt.tokens) - 1 : -1]
        expected = logprob.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(rollout.logprob).double()).abs().max()))
    return worst


def weights(model):
    return lambda: iter([(name, tensor.detach()) for name, tensor in model.state_dict().items()])


def prompt_gap(model, sampler) -> float:
    """The greatest distance of `prompt_logprobs` from the plain forward pass, nats."""
    worst, some = 0.0, prompts(8)
    for prompt, found in zip(some, sampler.prompt_logprobs(some), strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([prompt.tokens])).logits[0].log_softmax(-1)
        expected = logp[:-1].gather(1, torch.tensor(prompt.tokens[1:]).long()[:, None])[:, 0]
        assert len(found) == len(prompt.tokens) - 1
        worst = max([worst, *(torch.tensor(found) - expected).abs().tolist()])
    return worst
