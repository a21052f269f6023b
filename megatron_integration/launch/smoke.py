"""Prints a smoke test's keys, one a line: `python -m megatron_integration.launch.smoke LAYERS RECIPE key=value ...`.

The test makes two short steps with random weights. The model has all widths of the recipe's model, from that model's
config.json, and LAYERS layers. The tokenizer is the recipe's; the weights are not needed.
"""

import json
import sys

from transformers import AutoConfig

from entcov.rl.load_config import load_config

SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
SHORT = (
    "steps=2", "run_dir=runs/smoke", "rollout.prompts_per_step=32", "rollout.filter_zero_variance=false",
    "rollout.max_draws=10", "rollout.on_shortfall=raise", "rollout.max_response_length=256", "eval.prompts=0",
)  # fmt: skip


def keys(layers: int, recipe: str, overrides: list[str]) -> list[str]:
    """The smoke test's keys, as overrides of the recipe with its overrides."""
    path = load_config(recipe, overrides).model.path
    model = AutoConfig.from_pretrained(path)
    shape = {key: getattr(model, key) for key in SHAPE if getattr(model, key, None) is not None}
    shape["num_hidden_layers"] = layers
    return ["model.path=null", f"model.tokenizer={path}", f"model.config={json.dumps(shape)}", *SHORT]


if __name__ == "__main__":
    print("\n".join(keys(int(sys.argv[1]), sys.argv[2], sys.argv[3:])))
