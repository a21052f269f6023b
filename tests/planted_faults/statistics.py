"""Faults of token_stats and logit_covariance (autograd, shards, what ranks agree on), and of the plan's arithmetic."""

from tests.planted_faults.fault import Fault

STATS, SHARDS, PLAN, SHAPE, TIME = (
    f"entcov/{name}.py"
    for name in ("stats/token_stats", "stats/shards", "plan/memory", "plan/model_shapes", "plan/traffic")
)
LOGIT_COVARIANCE, ROUNDS = "entcov/stats/logit_covariance.py", "entcov/stats/sharded_clamp.py"
CORE, DERIVATIVE = "entcov/ops/core.py", "entcov/stats/derivative.py"
T_STATS, T_CLAMP, T_ROUNDS, T_COVARIANCE, T_RANKS, T_BAD_INPUT, T_PLAN = (
    f"tests/{name}.py::test_"
    for name in (
        "stats/test_token_stats",
        "stats/test_clamped_entropy",
        "stats/test_sharded_clamp",
        "stats/test_logit_covariance",
        "stats/test_vocab_parallel",
        "test_bad_input",
        "plan/test_plan",
    )
)
AGREEMENT = "entcov/stats/ranks.py"
FAILS = "tests/stats/test_ranks.py::test_a_rank_that_fails_raises_its_error_and_the_others_name_it"
DISAGREE = "tests/stats/test_ranks.py::test_ranks_that_disagree_all_raise_the_same_error"
BLIND = "tests/stats/test_sharded_without_waiting.py::test_"  # the host does not look, as on a GPU
FAILS_BLIND = BLIND + "a_rank_that_fails_in_any_call_raises_and_the_others_get_nan"
DISAGREE_BLIND = BLIND + "ranks_that_disagree_in_anything_all_get_nan"

FAULTS = (
    # ---- token_stats and logit_covariance ----------------------------------------------------------------------------
    Fault(
        "gradients_of_logprob_and_entropy_exchanged",
        STATS,
        "for g in grads[: 2 + clamped]]",
        "for g in (grads[1], grads[0], *grads[2 : 2 + clamped])]",
        [T_STATS + "values_and_gradients_on_small_rows"],
    ),
    Fault(
        "clamped_entropy_has_no_gradient",
        STATS,
        "return given if clamped else [*given, None]",
        "return [*given[:2], None]",
        [T_STATS + "values_and_gradients_on_small_rows"],
    ),
    Fault(
        "statistics_at_temperature_one",
        STATS,
        "found = row_statistics(logits, target, spec, kept, moments)",
        "found = row_statistics(logits, target, spec._replace(temperature=1.0), kept, moments)",
        [T_STATS + "leading_dims_vocab_size_and_temperature"],
    ),
    Fault(
        "gradient_at_temperature_one",
        STATS,
        "ctx.spec, ctx.clamped = spec, kept is not None",
        "ctx.spec, ctx.clamped = spec._replace(temperature=1.0), kept is not None",
        [T_STATS + "values_and_gradients_on_small_rows"],
    ),
    Fault(
        "clamp_takes_percents",
        STATS,
        "return vocab_size - int(vocab_size * clamp_p)",
        "return vocab_size - int(vocab_size * clamp_p / 100)",
        [T_STATS + "values_and_gradients_on_small_rows"],
    ),
    Fault(
        "clamp_keeps_one_logit_too_few",
        STATS,
        "return vocab_size - int(vocab_size * clamp_p)",
        "return vocab_size - 1 - int(vocab_size * clamp_p)",
        [T_STATS + "values_and_gradients_on_small_rows"],
    ),
    Fault(
        "old_logits_get_the_gradient",
        LOGIT_COVARIANCE,
        "return None, logit_covariance_grad(old, new, mask, stats, grads, ctx.spec), *[None] * 5",
        "return logit_covariance_grad(old, new, mask, stats, grads, ctx.spec), None, *[None] * 5",
        [T_COVARIANCE + "values_and_gradients_against_float64"],
    ),
    Fault(
        "every_rank_holds_the_first_columns",
        SHARDS,
        "vocab_start = rank * width",
        "vocab_start = 0",
        [T_RANKS + "ranks_in_threads_get_the_values_of_whole_rows"],
    ),
    Fault(
        "padding_counts_as_vocabulary",
        SHARDS,
        "min(max(self.vocab_size - self.start, 0), self.width)",
        "self.width",
        [T_RANKS + "ranks_in_threads_get_the_values_of_whole_rows"],
    ),
    Fault(
        "only_the_own_shard_is_merged",
        STATS,
        "merge_row_stats(messages, rows.target",
        "merge_row_stats(messages[:1], rows.target",
        [T_ROUNDS + "moments_beside_the_clamp_are_those_without_it[baseline]"],
    ),
    Fault(
        "only_the_own_shard_is_merged_beside_a_clamp",
        ROUNDS,
        "merge_row_stats(partials, target, spec, moments)",
        "merge_row_stats(partials[:1], target, spec, moments)",
        [T_RANKS + "ranks_in_threads_get_the_values_of_whole_rows"],
    ),
    Fault(
        "shards_that_end_early_are_not_seen",
        SHARDS,
        "    if at != vocab_size:\n",
        "    if False:\n",
        [T_RANKS + "shards_in_threads_that_do_not_cover_the_vocabulary_once"],
    ),
    Fault(
        "ranks_called_differently_are_not_seen",
        SHARDS,
        "word != seen[0][0] or word == 0",
        "word == 0",
        [T_BAD_INPUT + "ranks_that_call_differently"],
    ),
    Fault(
        "predicted_change_gets_no_gradient",
        LOGIT_COVARIANCE,
        "        if grad_predicted is not None:",
        "        if False:",
        [T_COVARIANCE + "the_predicted_change_has_the_gradient_of_the_covariance_negated"],
    ),
    Fault(
        "moments_require_a_gradient",
        STATS,
        "ctx.mark_non_differentiable(*outputs[2 + clamped :])",
        "pass",
        [T_STATS + "moments_are_detached_and_unused_outputs_cost_nothing"],
    ),
    Fault(
        "second_derivative_is_zero",
        DERIVATIVE,
        "if not torch.is_grad_enabled() or torch.compiler.is_compiling():",
        "if True:",
        [T_STATS + "a_second_derivative_is_an_error"],
    ),
    # ---- the ops -----------------------------------------------------------------------------------------------------
    Fault(
        "modes_do_not_see_the_ops",
        CORE,
        "        or torch._C._len_torch_dispatch_stack()\n",
        "",
        ["tests/ops/test_contract.py::test_the_way_around_the_dispatcher_gives_the_same_bits"],
    ),
    Fault(
        "an_op_that_is_dispatched_loses_its_temperature",
        CORE,
        "RowSpec(*args[at : at + count])",
        "RowSpec(*args[at : at + 2])",
        ["tests/ops/test_contract.py::test_the_way_around_the_dispatcher_gives_the_same_bits"],
    ),
    Fault(
        "ops_drop_gradients_silently",
        CORE,
        "if torch.is_grad_enabled() and any(",
        "if False and any(",
        ["tests/ops/test_contract.py::test_an_op_on_tensors_that_need_a_gradient_is_an_error_that_says_what_has_one"],
    ),
    Fault(
        "bad_targets_are_not_looked_for",
        "entcov/ops/row_stats.py",
        "    if nan:\n",
        "    if False:\n",
        ["tests/ops/test_contract.py::test_errors_name_argument_rule_and_value"],
    ),
    Fault(
        "statistics_take_dtensors",
        "entcov/stats/token_stats.py",
        "    check_local(logits=logits, target=target)\n",
        "",
        [
            "tests/stats/test_dtensors.py::test_statistics",
            "tests/stats/test_dtensors.py::test_a_rank_that_passes_one_holds_nobody_up",
        ],
    ),
    Fault(
        "the_loss_takes_dtensors",
        "entcov/arguments.py",
        "        if isinstance(tensor, module.DTensor):",
        "        if False and isinstance(tensor, module.DTensor):",
        ["tests/stats/test_dtensors.py::test_the_policy_loss"],
    ),
    # ---- the clamp over ranks (faults of csrc/*.h: tests/stats/test_header_faults.py) ------------------------------
    Fault(
        "bracket_without_a_margin",
        ROUNDS,
        "return math.ceil(4.5 * deviation) + 1",
        "return 0",
        [T_ROUNDS + "two_collectives_one_kilobyte_and_one_read[baseline]"],
    ),
    Fault(
        "rows_that_want_another_round_do_not_get_it",
        ROUNDS,
        "int(unfinished) == 0",
        "int(unfinished) >= 0",
        [
            T_ROUNDS + "fp32_with_all_its_bits_takes_three_collectives[baseline]",
            T_CLAMP + "random_small_rows[baseline]",
        ],
    ),
    Fault(
        "partials_do_not_say_how_their_rank_was_called",
        ROUNDS,
        "per_row=(bracket,)), shard, *alike)",
        "per_row=(bracket,)), shard, {}, {})",
        [T_ROUNDS + "ranks_that_disagree_get_nan_and_one_that_fails_holds_nobody_up[baseline]"],
    ),
    Fault(
        "whole_clamped_rows_may_have_no_finite_logit",
        "entcov/ops/clamped_stats.py",
        "        check_values(stats, target, spec, whole=True)\n",
        "        pass\n",
        [T_CLAMP + "rows_without_a_finite_logit_and_bad_targets[baseline]"],
    ),
    # ---- what ranks must agree on ------------------------------------------------------------------------------------
    Fault(
        "rank_that_failed_looks_like_one_that_agrees",
        AGREEMENT,
        "            if failure is None:\n                self._words",
        "            if True:\n                self._words",
        [FAILS + "[token_covariance dtype]", FAILS_BLIND + "[token_covariance dtype]"],
    ),
    Fault(
        "rank_that_failed_returns_a_result",
        AGREEMENT,
        "        if self.failure is not None:\n",
        "        if False:\n",
        [FAILS_BLIND + "[select_largest seed]"],
    ),
    Fault(
        "rank_that_failed_in_a_gather_blames_another",
        SHARDS,
        "ranks.raise_together(op, group, failure, call",
        "ranks.raise_together(op, group, None, call",
        [FAILS + "[linear bias]"],
    ),
    Fault(
        "host_does_not_look_at_what_ranks_say",
        AGREEMENT,
        "        elif differ:\n",
        "        elif False:\n",
        [DISAGREE + "[token_covariance eps]", FAILS + "[token_covariance dtype]"],
    ),
    Fault(
        "results_of_ranks_that_disagree_look_good",
        AGREEMENT,
        "self.refused = differ",
        "self.refused = differ & False",
        [DISAGREE_BLIND + "[select_clip_cov step]", FAILS_BLIND + "[token_covariance dtype]"],
    ),
    Fault(
        "digest_ignores_the_call",
        AGREEMENT,
        "repr((op, list(call.items())))",
        "repr(op)",
        [DISAGREE + "[token_stats temperature]", DISAGREE + "[select_clip_cov low]"],
    ),
    Fault(
        "values_of_tensors_are_not_compared",
        AGREEMENT,
        "        if not tensors:\n",
        "        if True:\n",
        [DISAGREE + "[covariance_summary]", DISAGREE_BLIND + "[covariance_summary]"],
    ),
    Fault(
        "rank_that_failed_is_not_named",
        AGREEMENT,
        "        if theirs is not None:\n",
        "        if False:\n",
        [FAILS],
    ),
    Fault(
        "checksums_that_differ_are_not_named",
        AGREEMENT,
        "            if theirs.get(name) != value:\n",
        "            if False:\n",
        [DISAGREE + "[linear hidden]"],
    ),
    Fault(
        "token_ids_may_repeat",
        "entcov/objective/selection.py",
        "        if repeated > 0 or count != due:\n",
        "        if False:\n",
        [DISAGREE + "[select_largest one id]"],
    ),
    # ---- the plan ----------------------------------------------------------------------------------------------------
    Fault(
        "adam_without_main_weights",
        PLAN,
        "parameters * (12 if s.bf16 else 8)",
        "parameters * 8",
        [T_PLAN + "weights_gradients_and_optimizer_by_hand"],
    ),
    Fault(
        "gradients_in_bfloat16",
        PLAN,
        "weights, gradients = parameters * s.value_bytes, parameters * 4",
        "weights, gradients = parameters * s.value_bytes, parameters * s.value_bytes",
        [T_PLAN + "weights_gradients_and_optimizer_by_hand"],
    ),
    Fault(
        "optimizer_is_not_sharded",
        PLAN,
        "math.ceil(state / (s.data_parallel * s.context_parallel))",
        "state",
        [T_PLAN + "weights_gradients_and_optimizer_by_hand"],
    ),
    Fault(
        "context_parallel_ranks_do_not_share_the_optimizer",
        PLAN,
        "(s.data_parallel * s.context_parallel)",
        "(s.data_parallel)",
        [T_PLAN + "weights_gradients_and_optimizer_by_hand"],
    ),
    Fault(
        "attention_activations_not_split_over_tensor_ranks",
        PLAN,
        "(2 * m.query_width + 2 * m.key_value_width) // t",
        "(2 * m.query_width + 2 * m.key_value_width)",
        [T_PLAN + "activations_by_hand"],
    ),
    Fault(
        "every_stage_holds_as_many_micro_batches",
        PLAN,
        "min(s.pipeline_parallel - stage,",
        "min(s.pipeline_parallel,",
        [T_PLAN + "activations_by_hand"],
    ),
    Fault(
        "logits_without_their_gradient",
        PLAN,
        "(2 * columns * s.value_bytes + 36)",
        "(columns * s.value_bytes + 36)",
        [T_PLAN + "the_last_stage_holds_logits_their_gradient_and_36_bytes_a_row"],
    ),
    Fault(
        "engine_weights_not_split",
        PLAN,
        "s.shape.parameters * s.value_bytes / s.engine_tensor_parallel)",
        "s.shape.parameters * s.value_bytes)",
        [T_PLAN + "the_engine"],
    ),
    Fault(
        "sleeping_engine_keeps_its_memory",
        PLAN,
        "(0 if self.asleep else self.engine)",
        "self.engine",
        [T_PLAN + "the_engine"],
    ),
    Fault(
        "reference_is_free",
        PLAN,
        "reference=weights * s.references",
        "reference=0",
        [T_PLAN + "weights_gradients_and_optimizer_by_hand"],
    ),
    Fault(
        "layers_not_split_over_tensor_ranks",
        SHAPE,
        "layer = divided // t +",
        "layer = divided +",
        [T_PLAN + "parameters_on_a_rank_by_hand"],
    ),
    Fault(
        "layers_not_split_over_stages",
        SHAPE,
        "self.num_hidden_layers // pipeline_parallel * layer",
        "self.num_hidden_layers * layer",
        [T_PLAN + "parameters_on_a_rank_by_hand"],
    ),
    Fault(
        "vocabulary_not_split_over_tensor_ranks",
        SHAPE,
        "self.padded_vocab(t) // t * h",
        "self.padded_vocab(t) * h",
        [T_PLAN + "parameters_on_a_rank_by_hand"],
    ),
    Fault(
        "tied_embedding_counted_twice",
        SHAPE,
        "vocabulary if not self.tie_word_embeddings or pipeline_parallel > 1 else 0",
        "vocabulary",
        [T_PLAN + "parameters_on_a_rank_by_hand"],
    ),
    Fault(
        "cache_without_values",
        SHAPE,
        "return 2 * self.num_hidden_layers * heads",
        "return self.num_hidden_layers * heads",
        [T_PLAN + "the_engine"],
    ),
    Fault(
        "one_flop_a_multiply_add",
        SHAPE,
        "return 2.0 * tokens *",
        "return 1.0 * tokens *",
        [T_PLAN + "work_is_six_flops_a_weight_and_token"],
    ),
    Fault(
        "no_time_for_recomputation",
        TIME,
        '(4 if s.recompute == "full" else 3)',
        "3",
        [T_PLAN + "time_scales_as_the_hardware_does"],
    ),
    Fault(
        "row_statistics_without_the_clamp",
        TIME,
        "CLAMP_SKETCH, CLAMP_PART = 256, 664",
        "CLAMP_SKETCH, CLAMP_PART = 256, 0",
        [T_PLAN + "tensor_parallel_traffic_by_hand"],
    ),
    Fault(
        "float32_clamp_in_one_round",
        TIME,
        "rounds, moments, plain = 1 if s.bf16 else 2,",
        "rounds, moments, plain = 1,",
        [T_PLAN + "tensor_parallel_traffic_by_hand"],
    ),
    Fault(
        "gradients_between_stages_are_free",
        TIME,
        "n.selecting + 2 * n.forward, edge",
        "n.selecting + n.forward, edge",
        [T_PLAN + "pipeline_and_context_traffic_by_hand"],
    ),
)
