"""Faults of the loss, the token covariance and its selections, the advantages, the controls."""

from tests.planted_faults.fault import Fault

LOSSES, COVARIANCE, ADVANTAGES = "entcov/losses.py", "entcov/covariance.py", "entcov/advantages.py"
SELECT, CLIP_COV, KL_COV = (f"entcov/controls/{name}.py" for name in ("__init__", "clip_cov", "kl_cov"))
ADAPTIVE, AENT, BONUS = (f"entcov/controls/{name}.py" for name in ("adaptive_bonus", "aent", "entropy_bonus"))

T_LOSSES, T_COVARIANCE, T_CONTROLS = (f"tests/test_{name}.py::" for name in ("losses", "covariance", "controls"))
T_ADVANTAGES, T_SPLITS = "tests/test_advantages.py::test_", "tests/test_selection_splits.py::test_"
BY_LOOP = T_LOSSES + "test_matches_loop"
ANY_SPLIT = T_LOSSES + "test_any_split_gives_equal_gradients"
KL_BY_HAND = T_LOSSES + "test_kl_hand_values"
TIS_BY_HAND = T_LOSSES + "test_tis_weight_is_capped_and_constant"
METRICS_BY_HAND = T_LOSSES + "test_metrics_hand_values"
ORACLE = T_COVARIANCE + "test_selections_match_oracle"
HASH = T_COVARIANCE + "test_token_hash_matches_python"
RANKS = T_SPLITS + "ranks_in_threads"

FAULTS = (
    # ---- the loss ----------------------------------------------------------------------------------------------------
    Fault(
        "masked_tokens_reach_the_loss", LOSSES,
        "torch.where(self.loss_mask, value, 0.0)", "value",
        [T_LOSSES + "test_garbage_outside_the_mask_changes_nothing", BY_LOOP],
    ),
    Fault(
        "token_mean_divides_by_the_micro_batch", LOSSES,
        "return one / totals.num_tokens", "return one / one.sum().clamp(min=1)",
        [ANY_SPLIT],
    ),
    Fault(
        "sequences_are_averaged_over_tokens", LOSSES,
        "weight = one / totals.num_sequences", "weight = one / totals.num_tokens",
        [BY_LOOP, ANY_SPLIT],
    ),
    Fault(
        "sequence_length_left_out_of_the_weight", LOSSES,
        "weight = weight / length.clamp(min=1)", "weight = weight / 1",
        [BY_LOOP],
    ),
    Fault(
        "constant_divisor_of_dr_grpo_left_out", LOSSES,
        "weight = weight / config.max_response_length", "weight = weight / 1",
        [BY_LOOP],
    ),
    Fault(
        "clip_high_used_for_clip_low", LOSSES,
        "bounded = -advantage * ratio.clamp(1 - config.clip_low,", "bounded = -advantage * ratio.clamp(1 - config.clip_high,",
        [BY_LOOP, T_LOSSES + "test_clip_hand_values"],
    ),
    Fault(
        "clip_takes_the_smaller_loss", LOSSES,
        "pg = torch.maximum(pg, bounded)", "pg = torch.minimum(pg, bounded)",
        [BY_LOOP, T_LOSSES + "test_clip_hand_values"],
    ),
    Fault(
        "dual_clip_on_positive_advantages", LOSSES,
        "lower = (pg > ceiling) & (advantage < 0)", "lower = (pg > ceiling) & (advantage > 0)",
        [BY_LOOP, T_LOSSES + "test_dual_clip_hand_values"],
    ),
    Fault(
        "dual_clip_on_the_wrong_side", LOSSES,
        "lower = (pg > ceiling) & (advantage < 0)", "lower = (pg < ceiling) & (advantage < 0)",
        [BY_LOOP, T_LOSSES + "test_dual_clip_hand_values"],
    ),
    Fault(
        "importance_weight_has_no_cap", LOSSES,
        "raw.clamp(max=config.tis_cap)", "raw",
        [BY_LOOP, TIS_BY_HAND],
    ),
    Fault(
        "importance_weight_has_a_floor_of_a_half", LOSSES,
        "raw.clamp(max=config.tis_cap)", "raw.clamp(min=0.5, max=config.tis_cap)",
        [T_LOSSES + "test_the_importance_weight_has_no_floor"],
    ),
    Fault(
        "importance_weight_has_a_floor_of_a_tenth", LOSSES,
        "raw.clamp(max=config.tis_cap)", "raw.clamp(min=0.1, max=config.tis_cap)",
        [T_LOSSES + "test_the_importance_weight_has_no_floor"],
    ),
    Fault(
        "importance_weight_upside_down", LOSSES,
        "raw = (tokens.old_logprob - rollout_logprob)", "raw = (rollout_logprob - tokens.old_logprob)",
        [BY_LOOP, TIS_BY_HAND],
    ),
    Fault(
        "importance_weight_of_the_current_policy", LOSSES,
        "raw = (tokens.old_logprob - rollout_logprob)", "raw = (tokens.logprob - rollout_logprob)",
        [BY_LOOP],
    ),
    Fault(
        "kl_is_rewarded", LOSSES,
        "token_loss = token_loss + config.kl_coef * kl", "token_loss = token_loss - config.kl_coef * kl",
        [BY_LOOP],
    ),
    Fault(
        "kl_the_other_way_round", LOSSES,
        "    d = ref_logprob - logprob", "    d = logprob - ref_logprob",
        [BY_LOOP, KL_BY_HAND],
    ),
    Fault("k1_has_the_wrong_sign", LOSSES, "return -d\n", "return d\n", [BY_LOOP, KL_BY_HAND]),
    Fault("k2_without_its_half", LOSSES, "return 0.5 * d.square()", "return d.square()", [BY_LOOP, KL_BY_HAND]),
    Fault(
        "k3_is_k2", LOSSES,
        "return (d.exp() - d - 1).clamp(", "return (0.5 * d.square()).clamp(",
        [BY_LOOP, KL_BY_HAND],
    ),
    Fault(
        "k3_without_its_bound", LOSSES,
        "(d.exp() - d - 1).clamp(-KL_BOUND, KL_BOUND)", "(d.exp() - d - 1)",
        [KL_BY_HAND],
    ),
    Fault(
        "k1_plus_keeps_its_own_gradient_too", LOSSES,
        "estimator[:-1]).detach()", "estimator[:-1])",
        [T_LOSSES + "test_kl_gradients"],
    ),
    Fault(
        "log_ratio_without_bound", LOSSES,
        "log_ratio = (tokens.logprob - tokens.old_logprob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)",
        "log_ratio = tokens.logprob - tokens.old_logprob",
        [T_LOSSES + "test_log_ratio_is_clamped"],
    ),
    Fault(
        "dropped_tokens_stay_in_the_loss", LOSSES,
        "pg = torch.where(effect.keep, pg, 0.0)", "pg = pg * 1",
        [T_LOSSES + "test_dropped_token_has_no_value_and_no_gradient_but_counts", T_CONTROLS + "test_clip_cov_hand_values"],
    ),
    Fault(
        "multiplier_has_a_gradient", LOSSES,
        "effect.multiplier.detach()", "effect.multiplier",
        [T_LOSSES + "test_multiplier_is_a_constant"],
    ),
    Fault(
        "clip_stays_where_a_control_drops_it", LOSSES,
        "if not any(effect.unclipped for effect in effects):", "if True:",
        [T_CONTROLS + "test_kl_cov_has_no_ppo_clip_in_reference_semantics", T_LOSSES + "test_composition"],
    ),
    Fault(
        "mismatch_metric_cancels", LOSSES,
        "(tokens.old_logprob - tokens.rollout_logprob).abs()", "(tokens.old_logprob - tokens.rollout_logprob)",
        [METRICS_BY_HAND],
    ),
    Fault(
        "sampled_entropy_metric_has_the_wrong_sign", LOSSES,
        '"actor/sampled_entropy", -tokens.old_logprob', '"actor/sampled_entropy", tokens.old_logprob',
        [METRICS_BY_HAND],
    ),
    Fault("ppo_kl_metric_has_the_wrong_sign", LOSSES, '"actor/ppo_kl", -log_ratio', '"actor/ppo_kl", log_ratio', [METRICS_BY_HAND]),
    # ---- covariance and selections -----------------------------------------------------------------------------------
    Fault(
        "means_of_one_rank", COVARIANCE,
        "    sums = _sum_over_ranks(sums, group)\n", "",
        [RANKS],
    ),
    Fault(
        "ranks_select_by_their_own_counts", COVARIANCE,
        "_sum_over_ranks(histogram, group).view", "histogram.view",
        [RANKS],
    ),
    Fault(
        "advantage_is_not_centred", COVARIANCE,
        "centred[0] * centred[1]", "centred[0] * values[1]",
        [T_COVARIANCE + "test_covariance_hand_values", T_COVARIANCE + "test_covariance_equals_rational_arithmetic"],
    ),
    Fault(
        "masked_tokens_count_in_the_means", COVARIANCE,
        "torch.stack([mask.sum(), bad.sum()])", "torch.stack([torch.ones_like(mask).sum(), bad.sum()])",
        [T_COVARIANCE + "test_covariance_hand_values"],
    ),
    Fault(
        "denominator_eps_ignored", COVARIANCE,
        "/ (num_tokens + denominator_eps)", "/ num_tokens",
        [T_COVARIANCE + "test_denominator_eps_is_masked_means"],
    ),
    Fault(
        "count_is_rounded", COVARIANCE,
        "(covariance.num_tokens.double() * ratio).long()", "(covariance.num_tokens.double() * ratio).round().long()",
        [ORACLE],
    ),
    Fault(
        "count_is_one_more", COVARIANCE,
        "(covariance.num_tokens.double() * ratio).long()", "((covariance.num_tokens.double() * ratio).long() + 1)",
        [ORACLE, T_CONTROLS + "test_reference_counts_depend_on_the_split_and_ours_do_not"],
    ),
    Fault(
        "at_least_one_token_always", COVARIANCE,
        ".clamp(min=at_least)", ".clamp(min=1)",
        [T_COVARIANCE + "test_at_least_one_token", T_CONTROLS + "test_clip_cov_ratio_zero"],
    ),
    Fault(
        "open_and_closed_interval_exchanged", COVARIANCE,
        "(value < high) if strict else", "(value < high) if not strict else",
        [T_COVARIANCE + "test_interval_closed_and_open"],
    ),
    Fault(
        "excluded_tokens_are_drawn", COVARIANCE,
        "candidate = candidate & ~exclude", "candidate = candidate & candidate",
        [T_CONTROLS + "test_reference_clip_cov_excludes_ppo_clipped_tokens"],
    ),
    Fault(
        "masked_tokens_are_candidates", COVARIANCE,
        "candidate = inside & covariance.mask", "candidate = inside",
        [ORACLE],
    ),
    Fault(
        "the_draw_ignores_the_step", COVARIANCE,
        "return _mix(h + _spread(step))", "return _mix(h)",
        [HASH, T_COVARIANCE + "test_draw_is_uniform_and_changes_with_seed_and_step"],
    ),
    Fault(
        "the_draw_ignores_the_seed", COVARIANCE,
        "h = _mix(h + _spread(seed))", "h = _mix(h)",
        [HASH, T_COVARIANCE + "test_draw_is_uniform_and_changes_with_seed_and_step"],
    ),
    Fault(
        "the_draw_goes_by_place_instead_of_token_id", COVARIANCE,
        "h = _mix(_spread(token_id))", "h = _mix(_spread(torch.arange(len(token_id), device=token_id.device)))",
        [HASH, ORACLE],
    ),
    Fault(
        "hashes_compared_as_signed_numbers", COVARIANCE,
        "(key ^ SIGN) >= (threshold ^ SIGN)", "key >= threshold",
        [ORACLE],
    ),
    Fault(
        "all_tied_tokens_are_taken", COVARIANCE,
        "(key > threshold) & some", "(key >= threshold) & some",
        [T_COVARIANCE + "test_ties_are_settled_by_the_hash"],
    ),
    Fault(
        "quantile_one_rank_off", COVARIANCE,
        "n - (999 * n + 999) // 1000 + 1", "n - (999 * n + 999) // 1000 + 2",
        [T_COVARIANCE + "test_summary_matches_numpy"],
    ),
    Fault(
        "negative_numbers_sort_backwards", COVARIANCE,
        "torch.where(bits >= 0, bits + 2**31, -1 - bits)", "torch.where(bits >= 0, bits + 2**31, bits + 2**31)",
        [T_COVARIANCE + "test_float_key_sorts_as_numbers_do"],
    ),
    # ---- advantages --------------------------------------------------------------------------------------------------
    Fault(
        "grpo_std_without_bessel", ADVANTAGES,
        "_group_sum(centred.square(), group) / (size - 1).clamp(min=1)", "_group_sum(centred.square(), group) / size",
        [T_ADVANTAGES + "grpo_hand_values", T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    Fault("grpo_eps_a_hundred_times_larger", ADVANTAGES, "STD_EPS = 1e-6", "STD_EPS = 1e-4", [T_ADVANTAGES + "grpo_hand_values"]),
    Fault(
        "grpo_does_not_divide_by_the_std", ADVANTAGES,
        "(centred / (std + STD_EPS)).float()", "centred.float()",
        [T_ADVANTAGES + "grpo_hand_values"],
    ),
    Fault(
        "rloo_baseline_includes_the_response_itself", ADVANTAGES,
        " * size / (size - 1).clamp(min=1)).float()", ").float()",
        [T_ADVANTAGES + "rloo_hand_values", T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    Fault(
        "a_single_response_gets_nothing", ADVANTAGES,
        "torch.where(size > 1, reward - _group_sum(reward, group) / size, reward)", "reward - _group_sum(reward, group) / size",
        [T_ADVANTAGES + "singleton_group_keeps_its_reward"],
    ),
    Fault(
        "reinforce_pp_whitens_over_responses", ADVANTAGES,
        "weight = response_length.double()", "weight = torch.ones_like(x)",
        [T_ADVANTAGES + "whitening_is_over_tokens_not_responses", T_ADVANTAGES + "reinforce_pp_hand_values"],
    ),
    Fault(
        "reinforce_pp_variance_without_bessel", ADVANTAGES,
        "(weight * (x - mean).square()).sum() / (tokens - 1)", "(weight * (x - mean).square()).sum() / tokens",
        [T_ADVANTAGES + "reinforce_pp_hand_values"],
    ),
    Fault(
        "reinforce_pp_eps_ten_thousand_times_larger", ADVANTAGES,
        "VARIANCE_EPS = 1e-8", "VARIANCE_EPS = 1e-4",
        [T_ADVANTAGES + "reinforce_pp_hand_values"],
    ),
    Fault(
        "reinforce_pp_baseline_has_no_baseline", ADVANTAGES,
        "_whiten_over_tokens(_centred(*_groups(reward, group_id, response_length)), response_length)",
        "_whiten_over_tokens(_groups(reward, group_id, response_length)[0], response_length)",
        [T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    # ---- controls ----------------------------------------------------------------------------------------------------
    Fault(
        "selections_go_to_the_wrong_micro_batches", SELECT,
        "columns.append(mask.split(sizes))", "columns.append(mask.flip(0).split(sizes))",
        [T_CONTROLS + "test_clip_cov_hand_values", T_SPLITS + "one_process_any_split"],
    ),
    Fault(
        "controls_of_micro_batch_scope_see_the_mini_batch", SELECT,
        'elif control.scope == "micro_batch":', 'elif control.scope == "one":',
        [T_CONTROLS + "test_micro_batch_scope_is_select_on_each_alone"],
    ),
    Fault(
        "clip_cov_keeps_only_the_selected", CLIP_COV,
        "keep=~selected", "keep=selected",
        [T_CONTROLS + "test_clip_cov_hand_values"],
    ),
    Fault(
        "clip_cov_draws_alike_in_every_step", CLIP_COV,
        "step=step,", "step=0,",
        ["tests/test_controls.py"],
    ),
    Fault(
        "clip_cov_ignores_its_seed", CLIP_COV,
        "seed=self.seed,", "seed=0,",
        ["tests/test_controls.py"],
    ),
    Fault(
        "clip_cov_of_the_paper_drops_one_token_at_least", CLIP_COV,
        "at_least=1 if reference else 0", "at_least=1",
        [T_CONTROLS + "test_clip_cov_ratio_zero"],
    ),
    Fault(
        "clip_cov_draws_on_each_rank_alone", CLIP_COV,
        "if reference else None,\n            group=group,", "if reference else None,\n            group=None,",
        [RANKS],
    ),
    Fault(
        "kl_cov_settles_ties_alike_in_every_step", KL_COV,
        "step=step,", "step=0,",
        ["tests/test_controls.py"],
    ),
    Fault(
        "kl_cov_penalises_one_direction_only", KL_COV,
        "penalty = log_ratio.abs()", "penalty = log_ratio.clamp(min=0)",
        ["tests/test_controls.py"],
    ),
    Fault(
        "kl_cov_penalises_all_tokens", KL_COV,
        "torch.where(selected, tokens.logprob - tokens.old_logprob, 0.0)", "(tokens.logprob - tokens.old_logprob)",
        [T_CONTROLS + "test_kl_cov_hand_values"],
    ),
    Fault(
        "kl_cov_penalty_of_the_paper_is_k1", KL_COV,
        "penalty = log_ratio.exp() - 1 - log_ratio", "penalty = log_ratio",
        [T_CONTROLS + "test_kl_cov_paper_penalty_is_the_kl_estimate"],
    ),
    Fault(
        "entropy_bonus_is_a_penalty", BONUS,
        "penalty=-self.entropy_coef * tokens.entropy", "penalty=self.entropy_coef * tokens.entropy",
        [T_CONTROLS + "test_bonuses_subtract_the_mean_entropy"],
    ),
    Fault(
        "adaptive_bonus_moves_the_wrong_way", ADAPTIVE,
        "self.delta if self.enabled else -self.delta", "-self.delta if self.enabled else self.delta",
        [T_CONTROLS + "test_skywork_trace", T_CONTROLS + "test_trl_trace"],
    ),
    Fault(
        "adaptive_bonus_stays_on_above_the_target", ADAPTIVE,
        "return self.coef if self.enabled else 0.0", "return self.coef",
        [T_CONTROLS + "test_skywork_trace", T_CONTROLS + "test_trl_trace"],
    ),
    Fault(
        "adaptive_bonus_counts_the_target_as_below", ADAPTIVE,
        '("sampled_entropy", False,', '("sampled_entropy", True,',
        [T_CONTROLS + "test_trl_trace"],
    ),
    Fault(
        "skywork_rule_watches_the_analytic_entropy", ADAPTIVE,
        '("sampled_entropy", False,', '("entropy", False,',
        [T_CONTROLS + "test_skywork_trace"],
    ),
    Fault(
        "adaptive_bonus_forgets_whether_it_is_on", ADAPTIVE,
        '= ("coef", "enabled")', '= ("coef",)',
        [T_CONTROLS + "test_state_survives_json_and_continues_alike[adaptive_bonus]"],
    ),
    Fault(
        "adaptive_bonus_leaves_its_box", ADAPTIVE,
        "min(max(moved, self.coef_min), self.coef_max)", "max(moved, self.coef_min)",
        [T_CONTROLS + "test_adaptive_bonus_stays_in_its_box"],
    ),
    Fault(
        "aent_coefficient_moves_the_wrong_way", AENT,
        "self.coef - self.coef_lr * outside", "self.coef + self.coef_lr * outside",
        [T_CONTROLS + "test_aent_trace"],
    ),
    Fault(
        "aent_warmup_one_step_short", AENT,
        "self.steps > self.warmup", "self.steps >= self.warmup",
        [T_CONTROLS + "test_aent_warmup_counts_steps_that_leave_the_coefficient_alone"],
    ),
    Fault(
        "aent_band_is_a_point", AENT,
        "max(0.0, entropy - self.entropy_high)", "max(0.0, entropy - self.entropy_low)",
        [T_CONTROLS + "test_aent_trace"],
    ),
    Fault(
        "aent_has_no_lower_bound", AENT,
        "outside, self.coef_min)", "outside, 0.0)",
        [T_CONTROLS + "test_aent_stays_in_its_box_and_fixed_when_not_adaptive"],
    ),
    Fault(
        "aent_clamps_percents", AENT,
        '{"clamp_p": self.clamp_p}', '{"clamp_p": self.clamp_p / 100}',
        [T_CONTROLS + "test_needs_and_clamp_arguments"],
    ),
    Fault(
        "aent_takes_percents", AENT,
        'check.fraction("clamp_p", self.clamp_p)', 'check.number("clamp_p", self.clamp_p, 0.0, 100.0)',
        [T_CONTROLS + "test_knob_errors_name_key_rule_and_value"],
    ),
    Fault(
        "aent_forgets_its_steps", AENT,
        '= ("coef", "steps")', '= ("coef",)',
        [T_CONTROLS + "test_state_survives_json_and_continues_alike[aent]"],
    ),
    Fault(
        "aent_rewards_the_plain_entropy", AENT,
        "penalty=-self.coef * tokens.clamped_entropy", "penalty=-self.coef * tokens.entropy",
        [T_CONTROLS + "test_bonuses_subtract_the_mean_entropy"],
    ),
)  # fmt: skip
