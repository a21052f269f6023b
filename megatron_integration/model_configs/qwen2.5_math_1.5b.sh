# shellcheck shell=bash disable=SC2034
# Qwen2.5-Math-1.5B, 1.54 billion parameters, from its config.json. Tensor parallelism: 1 or 2 (2 key-value heads).
MODEL=Qwen/Qwen2.5-Math-1.5B
MODEL_SHAPE_ARGS=(
    model.config.model_type=qwen2
    model.config.num_hidden_layers=28
    model.config.hidden_size=1536
    model.config.intermediate_size=8960
    model.config.num_attention_heads=12
    model.config.num_key_value_heads=2
    model.config.head_dim=128
    model.config.vocab_size=151936
    model.config.max_position_embeddings=4096
    model.config.rms_norm_eps=1e-6
    model.config.rope_parameters.rope_type=default
    model.config.rope_parameters.rope_theta=10000.0
    model.config.tie_word_embeddings=true
)
