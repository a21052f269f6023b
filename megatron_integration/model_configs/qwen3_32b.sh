# shellcheck shell=bash disable=SC2034
# Qwen3-32B, 32.76 billion parameters, from its config.json. Tensor parallelism: 1, 2, 4 or 8 (8 key-value heads).
MODEL=Qwen/Qwen3-32B
MODEL_SHAPE_ARGS=(
    model.config.model_type=qwen3
    model.config.num_hidden_layers=64
    model.config.hidden_size=5120
    model.config.intermediate_size=25600
    model.config.num_attention_heads=64
    model.config.num_key_value_heads=8
    model.config.head_dim=128
    model.config.vocab_size=151936
    model.config.max_position_embeddings=40960
    model.config.rms_norm_eps=1e-6
    model.config.rope_parameters.rope_type=default
    model.config.rope_parameters.rope_theta=1000000.0
    model.config.tie_word_embeddings=false
)
