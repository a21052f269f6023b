# shellcheck shell=bash disable=SC2034
# Qwen2.5-7B, 7.62 billion parameters, from its config.json. Tensor parallelism: 1, 2 or 4 (4 key-value heads).
MODEL=Qwen/Qwen2.5-7B
MODEL_SHAPE_ARGS=(
    model.config.model_type=qwen2
    model.config.num_hidden_layers=28
    model.config.hidden_size=3584
    model.config.intermediate_size=18944
    model.config.num_attention_heads=28
    model.config.num_key_value_heads=4
    model.config.head_dim=128
    model.config.vocab_size=152064
    model.config.max_position_embeddings=131072
    model.config.rms_norm_eps=1e-6
    model.config.rope_parameters.rope_type=default
    model.config.rope_parameters.rope_theta=1000000.0
    model.config.tie_word_embeddings=false
)
