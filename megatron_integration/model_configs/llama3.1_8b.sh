# shellcheck shell=bash disable=SC2034
# Llama-3.1-8B, 8.03 billion parameters, from its config.json. Tensor parallelism: 1, 2, 4 or 8 (8 key-value heads).
MODEL=meta-llama/Llama-3.1-8B
MODEL_SHAPE_ARGS=(
    model.config.model_type=llama
    model.config.num_hidden_layers=32
    model.config.hidden_size=4096
    model.config.intermediate_size=14336
    model.config.num_attention_heads=32
    model.config.num_key_value_heads=8
    model.config.head_dim=128
    model.config.vocab_size=128256
    model.config.max_position_embeddings=131072
    model.config.rms_norm_eps=1e-5
    model.config.rope_parameters.rope_type=llama3
    model.config.rope_parameters.factor=8.0
    model.config.rope_parameters.low_freq_factor=1.0
    model.config.rope_parameters.high_freq_factor=4.0
    model.config.rope_parameters.original_max_position_embeddings=8192
    model.config.rope_parameters.rope_theta=500000.0
    model.config.tie_word_embeddings=false
)
