"""Faults of token_stats and logit_covariance (autograd, shards), and of the plan's arithmetic."""

from tests.planted_faults.fault import Fault

STATS, SHARDS, PLAN, SHAPE, TIME = (
    f"entcov/{name}.py" for name in ("vocab_parallel", "shards", "plan", "plan_model", "plan_time")
)
T_STATS, T_COVARIANCE, T_PLAN, T_RANKS, T_SHARD_OPS, T_REFERENCE = (
    f"tests/test_{name}.py"
    for name in ("token_stats", "logit_covariance", "plan", "vocab_parallel", "shard_ops", "reference")
)
GLOO = "the processes of a gloo group take seconds to start"

FAULTS = (
    Fault("gradients_of_logprob_and_entropy_exchanged", STATS, "for g in (grad_logprob, grad_entropy, grad_clamped)", "for g in (grad_entropy, grad_logprob, grad_clamped)", [T_STATS]),
    Fault("clamped_entropy_has_no_gradient", STATS, "for g in (grad_logprob, grad_entropy, grad_clamped)", "for g in (grad_logprob, grad_entropy, None)", [T_STATS]),
    Fault("logprob_without_the_temperature_in_token_stats", STATS, "outputs = ((picked - top) / temperature - log_total", "outputs = ((picked - top) - log_total", [T_STATS]),
    Fault("gradient_at_temperature_one", STATS, "rows, tokens, stats, clamp, shard.start, shard.vocab_size, float(temperature), ignore_index", "rows, tokens, stats, clamp, shard.start, shard.vocab_size, 1.0, ignore_index", [T_STATS]),
    Fault("varentropy_is_not_centred", STATS, "sum_x2exp / total - mean**2", "sum_x2exp / total", [T_STATS]),
    Fault("entropy_drift_has_the_wrong_sign", STATS, "mean_s - s_target", "s_target - mean_s", [T_STATS]),
    Fault("clamp_takes_percents", STATS, "return vocab_size - int(vocab_size * clamp_p)", "return vocab_size - int(vocab_size * clamp_p / 100)", [T_STATS]),
    Fault("clamp_keeps_one_logit_too_few", STATS, "return vocab_size - int(vocab_size * clamp_p)", "return vocab_size - 1 - int(vocab_size * clamp_p)", [T_STATS]),
    Fault("ignored_rows_have_a_collision", STATS, "collision.masked_fill(target == ignore_index, 0.0)", "collision", [T_STATS]),
    Fault("moments_have_a_graph", STATS, "        with torch.no_grad():\n            scaled", "        if True:\n            scaled", [T_STATS]),
    Fault("predicted_entropy_change_has_the_wrong_sign", STATS, "(covariance, -covariance,", "(covariance, covariance,", [T_COVARIANCE]),
    Fault("kl_without_the_mean_change", STATS, "entropy_change, log_ratio - mean_d", "entropy_change, log_ratio", [T_COVARIANCE]),
    Fault("old_logits_get_the_gradient", STATS, "return None, grad, None, None, None, None, None\n", "return grad, None, None, None, None, None, None\n", [T_COVARIANCE]),
    Fault("every_rank_holds_the_first_columns", SHARDS, "vocab_start = rank * width", "vocab_start = 0", [T_RANKS], slow=GLOO),
    Fault("padding_counts_as_vocabulary", SHARDS, "min(max(self.vocab_size - self.start, 0), self.width)", "self.width", [T_RANKS], slow=GLOO),
    Fault("only_the_own_shard_is_merged", STATS, "ops.merge_row_stats(parts[..., :fields].contiguous()", "ops.merge_row_stats(parts[:1, ..., :fields].contiguous()", [T_RANKS], slow=GLOO),
    Fault("holes_between_shards_are_not_seen", SHARDS, "        if shard.start != at:\n", "        if shard.start < at:\n", [T_RANKS], slow=GLOO),
    Fault("ranks_called_differently_are_not_seen", SHARDS, "for i, (name, value) in enumerate(call.items(), start=4):", "for i, (name, value) in ():", [T_RANKS], slow=GLOO),
    # ---- the plan ----------------------------------------------------------------------------------------------------
    Fault("adam_without_main_weights", PLAN, "parameters * (12 if s.bf16 else 8)", "parameters * 8", [T_PLAN]),
    Fault("gradients_in_bfloat16", PLAN, "gradients=parameters * 4", "gradients=parameters * s.value_bytes", [T_PLAN]),
    Fault("optimizer_is_not_sharded", PLAN, "math.ceil(state / (s.data_parallel * s.context_parallel))", "state", [T_PLAN]),
    Fault("context_parallel_ranks_do_not_share_the_optimizer", PLAN, "(s.data_parallel * s.context_parallel)", "(s.data_parallel)", [T_PLAN]),
    Fault("attention_activations_not_split_over_tensor_ranks", PLAN, "(2 * m.query_width + 2 * m.key_value_width) // t", "(2 * m.query_width + 2 * m.key_value_width)", [T_PLAN]),
    Fault("every_stage_holds_as_many_micro_batches", PLAN, "min(s.pipeline_parallel - stage,", "min(s.pipeline_parallel,", [T_PLAN]),
    Fault("logits_without_their_gradient", PLAN, "(2 * columns * s.value_bytes + 36)", "(columns * s.value_bytes + 36)", [T_PLAN]),
    Fault("engine_weights_not_split", PLAN, "s.shape.parameters * s.value_bytes / s.engine_tensor_parallel)", "s.shape.parameters * s.value_bytes)", [T_PLAN]),
    Fault("sleeping_engine_keeps_its_memory", PLAN, "(0 if self.asleep else self.engine)", "self.engine", [T_PLAN]),
    Fault("reference_is_free", PLAN, "reference=parameters * s.value_bytes if s.reference else 0", "reference=0", [T_PLAN]),
    Fault("layers_not_split_over_tensor_ranks", SHAPE, "layer = divided // t +", "layer = divided +", [T_PLAN]),
    Fault("layers_not_split_over_stages", SHAPE, "self.num_hidden_layers // pipeline_parallel * layer", "self.num_hidden_layers * layer", [T_PLAN]),
    Fault("vocabulary_not_split_over_tensor_ranks", SHAPE, "self.padded_vocab(t) // t * h", "self.padded_vocab(t) * h", [T_PLAN]),
    Fault("tied_embedding_counted_twice", SHAPE, "vocabulary if not self.tie_word_embeddings or pipeline_parallel > 1 else 0", "vocabulary", [T_PLAN]),
    Fault("cache_without_values", SHAPE, "return 2 * self.num_hidden_layers * heads", "return self.num_hidden_layers * heads", [T_PLAN]),
    Fault("one_flop_a_multiply_add", SHAPE, "return 2.0 * tokens *", "return 1.0 * tokens *", [T_PLAN]),
    Fault("no_time_for_recomputation", TIME, '(4 if s.recompute == "full" else 3)', "3", [T_PLAN]),
    Fault("row_statistics_without_the_clamp", TIME, "clamp = 512 if s.clamped_entropy else 0", "clamp = 0", [T_PLAN]),
)  # fmt: skip
