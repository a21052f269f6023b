"""The supervised warm start: its learning rate by hand, its loss against plain forward passes."""

from __future__ import annotations

import math

import pytest
import torch

from entcov.rl.config import ActorConfig, ModelConfig, WarmStartConfig
from entcov.rl.data.stream import PromptStream
from entcov.rl.data.tokenizer import encode
from entcov.rl.hf.model import build_model
from entcov.rl.hf.warm_start import warm_start
from entcov.rl.load_config import parse_config
from tests.support.tiny_run import RECIPE, recipe


def test_rates_and_losses(monkeypatch):
    """The optimizer is stopped, so that every loss is that of the weights at hand: nats a token of the solutions, the
    end-of-sequence token included, over the whole batch although it is divided into micro-batches."""
    model, tokenizer = build_model(
        ModelConfig(config=RECIPE["model"]["config"], tokenizer="char"), seed=0, device=torch.device("cpu")
    )
    stream = PromptStream.from_config(parse_config(recipe("unused")).data, tokenizer, seed=0)
    rates, losses, norms = [], [], []

    def stopped(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, "step", stopped)
    warm_start(
        model, stream, WarmStartConfig(steps=4, batch_size=6, lr=1e-2, warmup_steps=2),
        ActorConfig(micro_batch_tokens=40, max_grad_norm=0.25), on_step=lambda done, loss: losses.append(loss),
    )  # fmt: skip
    cosine = math.cos(math.pi / 4)
    assert rates == pytest.approx([0.5e-2, 0.5e-2 * (1 + cosine), 0.5e-2, 0.5e-2 * (1 - cosine)], rel=1e-12)
    assert norms == pytest.approx([0.25] * 4, rel=1e-3)
    for step, loss in enumerate(losses):
        total, count = 0.0, 0
        for prompt in stream.take(6 * step, 6):
            solution = encode(tokenizer, prompt.example.solution) + [tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt.tokens, *solution]])).logits[0].double()
            log_p = logits.log_softmax(-1)[len(prompt.tokens) - 1 : -1]
            total -= log_p.gather(1, torch.tensor(solution)[:, None]).sum().item()
            count += len(solution)
        assert loss == pytest.approx(total / count, rel=1e-5)
