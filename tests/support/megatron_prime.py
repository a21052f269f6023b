"""What tests/megatron/test_parity.py runs of PRIME's reward model: over a layout, against one process; and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from entcov.rl.config import ModelConfig, PrimeConfig
from entcov.rl.hf.actor import TransformersRewardModel
from entcov.rl.hf.model import build_model as build_hf_model
from megatron_integration.actor import MegatronRewardModel
from megatron_integration.bridge import build_model, load_hf_weights, make_bridge
from megatron_integration.checkpoint import load_sharded, save_sharded
from tests.support.megatron_cases import ADAM_EPS, actor_config, laid_out, load

CONFIG = PrimeConfig(beta_train=0.5, lr=1e-3, updates_per_rollout=2)


def prime(folder: Path, case: dict[str, Any]) -> str | None:
    """Two rollouts' rewards and steps as one process computes them; the second again, bit for bit, after a resume."""
    batch = load(folder / "batch.pt")
    prompts = torch.tensor(batch.lengths) - batch.responses.length
    first = batch.position == (prompts - 1)[batch.sequence]
    batch.responses.score = (batch.target[first] % 2 == 0).float()
    source = folder / case["model"]
    model, _ = build_hf_model(ModelConfig(path=str(source)), seed=0, device=torch.device("cpu"))
    alone = TransformersRewardModel(copy.deepcopy(model), actor_config(), CONFIG, reference=model)
    for group in alone.optimizer.param_groups:
        group["eps"] = ADAM_EPS
    want = [alone.token_rewards(batch, step=step) for step in (1, 2)]

    for number, layout_of in enumerate(case["layouts"]):
        with laid_out(**layout_of) as (megatron, layout):
            config = actor_config(packing=megatron.context_parallel > 1)

            def start(megatron=megatron, layout=layout, config=config) -> MegatronRewardModel:
                bridge = make_bridge(str(source), megatron, layout, dtype=torch.float32)
                models = [build_model(bridge, layout) for _ in range(2)]
                for one in models:
                    load_hf_weights(bridge, one, str(source), layout)
                own, reference = models
                return MegatronRewardModel(
                    own, bridge, layout, config, megatron, CONFIG, reference=reference, adam_eps=ADAM_EPS
                )

            made, stored = start(), folder / f"sharded_prime_{number}"
            got = [made.token_rewards(batch, step=1)]
            save_sharded(made, stored)
            got.append(made.token_rewards(batch, step=2))
            weights = {name: weight.clone() for name, weight in made.named_weights()}
            resumed = start()
            load_sharded(resumed, stored)
            rewards, metrics = resumed.token_rewards(batch, step=2)
            if not torch.equal(rewards, got[1][0]) or metrics != got[1][1]:
                return f"{layout_of}: the resumed model's rewards or metrics differ: {metrics} instead of {got[1][1]}"
        for step, ((rewards, metrics), (rewards_alone, metrics_alone)) in enumerate(zip(got, want, strict=True), 1):
            worst = (rewards - rewards_alone).abs().max().item()
            if not worst < 2e-5:
                return f"{layout_of}: rewards of step {step} are off by {worst}"
            if metrics.keys() != metrics_alone.keys():
                return f"{layout_of}: metrics differ by {metrics.keys() ^ metrics_alone.keys()}"
            for name, value in metrics_alone.items():
                if step == 1 and name == "reward_model/dpo_acc_abs_before":
                    continue  # the sign of rounding: the model is still its reference
                if not abs(metrics[name] - value) <= 2e-5 + 2e-4 * abs(value):
                    return f"{layout_of}: {name} of step {step} is {metrics[name]} instead of {value}"
        for name, weight in alone.model.named_parameters():
            worst = (weights[name] - weight).abs().max().item()
            if not worst < 1e-6:
                return f"{layout_of}: {name} is off by {worst}"
    return None
