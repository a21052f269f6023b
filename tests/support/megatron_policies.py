"""The policies that the Megatron tests train: small models of every kind, and one batch of rollouts."""

import pytest
import torch

from entcov.rl.batch import pack
from entcov.rl.config import ModelConfig
from entcov.rl.hf.model import build_model, save_model
from entcov.rl.hf.sampler import InProcessSampler
from tests.support.tiny_run import prompts

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# Llama 3.1's scaling; with theta 10 every kind of wavelength that it treats apart occurs.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {
        "model_type": "llama", "head_dim": 16, "tie_word_embeddings": False, "rope_parameters": LLAMA3,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A folder with the models, a batch of rollouts, and what the torch actor makes of them, as it is asked for."""
    from tests.support.megatron_cases import oracle_file, torch_updates  # needs Megatron-Core

    folder = tmp_path_factory.mktemp("policies")
    models, batch = {}, None
    for name, kind in MODELS.items():
        model, tokenizer = build_model(
            ModelConfig(config=SHAPE | kind, tokenizer="char"), seed=0, device=torch.device("cpu")
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(15)  # far from uniform
            for key, weight in model.named_parameters():
                if "norm" in key or "bias" in key:  # 1 and 0 would hide what happens to them
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        if batch is None:
            rollouts = InProcessSampler(model, tokenizer, batch_size=64).generate(
                prompts(6), group_size=4, temperature=1.0, max_response_length=10, seed=0
            )
            batch = pack(rollouts)
            batch.assign_advantages(torch.tensor([float(torch.randn((), generator=generator)) for _ in rollouts]))
            batch.temperatures = (None, None, 1.3) * (len(rollouts) // 3)  # a third has a temperature of its own
            torch.save(batch, folder / "batch.pt")
        save_model(model, tokenizer, folder / name)
        models[name] = model

    def add_oracles(cases: list[dict]) -> None:
        for case in cases:
            if "control" in case and not (stored := folder / oracle_file(case)).exists():
                setting = case.get("setting", "all")
                torch.save(torch_updates(models[case["model"]], batch, case["control"], setting), stored)

    folder_and_oracles = (folder, add_oracles)
    return folder_and_oracles
