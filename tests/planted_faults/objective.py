"""Faults of the loss, the token covariance and its selections, the controls."""

from tests.planted_faults.fault import Fault

LOSSES, OBJECTIVES, MISMATCH, COVARIANCE = (
    f"entcov/objective/{name}.py" for name in ("policy_loss", "objectives", "mismatch", "token_covariance")
)
TOKENS, MEANS = "entcov/objective/tokens.py", "entcov/objective/token_means.py"
STAGES = "entcov/objective/stages.py"
SELECTION = "entcov/objective/selection.py"
SELECT, CLIP_COV, KL_COV = (f"entcov/controls/{name}.py" for name in ("__init__", "clip_cov", "kl_cov"))
ADAPTIVE, AENT, BONUS = (f"entcov/controls/{name}.py" for name in ("adaptive_bonus", "aent", "entropy_bonus"))

T_LOSSES, T_COVARIANCE, T_CONTROLS = (
    f"tests/{name}.py::"
    for name in ("objective/test_policy_loss", "objective/test_token_covariance", "controls/test_controls")
)
T_SPLITS = "tests/objective/test_selection_splits.py::test_"
T_MOMENTS = "tests/controls/test_moments.py::test_"
BY_LOOP = T_LOSSES + "test_matches_loop"
ANY_SPLIT = T_LOSSES + "test_any_split_gives_equal_gradients"
KL_BY_HAND = T_LOSSES + "test_kl_hand_values"
TIS_BY_HAND = T_LOSSES + "test_tis_weight_is_capped_and_constant"
METRICS_BY_HAND = T_LOSSES + "test_metrics_hand_values"
ORACLE = T_COVARIANCE + "test_selections_match_oracle"
T_KERNELS = "tests/objective/test_selection_kernels.py::test_"
RANKS = T_SPLITS + "ranks_in_threads"

FAULTS = (
    # ---- the loss ----------------------------------------------------------------------------------------------------
    Fault(
        "the_loss_waits_for_a_value",
        LOSSES,
        "loss = (weight * token_loss).sum()",
        "loss = (weight * token_loss).sum() if mask.any() else 0.0 * tokens.logprob.sum()",
        [
            "tests/objective/test_no_waits.py::test_selection_and_loss_of_every_control",
            "tests/objective/test_no_waits.py::test_every_objective_and_aggregation",
        ],
    ),
    Fault(
        "masked_tokens_reach_the_loss",
        TOKENS,
        "torch.where(self.loss_mask, value, 0.0)",
        "value",
        [T_LOSSES + "test_garbage_outside_the_mask_changes_nothing", BY_LOOP],
    ),
    Fault(
        "token_mean_divides_by_the_micro_batch",
        LOSSES,
        "return one / totals.num_tokens",
        "return one / one.sum().clamp(min=1)",
        [ANY_SPLIT],
    ),
    Fault(
        "token_sum_is_the_mean",
        LOSSES,
        'if config.aggregation == "token-sum":',
        "if False:",
        [BY_LOOP, T_LOSSES + "test_token_sum_by_hand"],
    ),
    Fault(
        "ratio_of_the_kl_is_a_constant",
        LOSSES,
        "kl = kl * token_ratio(log_ratio)",
        "kl = kl * token_ratio(log_ratio).detach()",
        [T_LOSSES + "test_kl_weighted_by_the_ratio"],
    ),
    Fault(
        "sequences_are_averaged_over_tokens",
        LOSSES,
        "weight = one / totals.num_sequences",
        "weight = one / totals.num_tokens",
        [BY_LOOP],
    ),
    Fault(
        "sequence_length_left_out_of_the_weight",
        LOSSES,
        "weight = weight / length.clamp(min=1)",
        "weight = weight / 1",
        [BY_LOOP],
    ),
    Fault(
        "constant_divisor_of_dr_grpo_left_out",
        LOSSES,
        "weight = weight / config.max_response_length",
        "weight = weight / 1",
        [BY_LOOP],
    ),
    Fault(
        "clip_high_used_for_clip_low",
        OBJECTIVES,
        "bounded = -advantage * ratio.clamp(1 - config.clip_low,",
        "bounded = -advantage * ratio.clamp(1 - config.clip_high,",
        [BY_LOOP, T_LOSSES + "test_clip_hand_values"],
    ),
    Fault(
        "clip_takes_the_smaller_loss",
        OBJECTIVES,
        "return torch.maximum(pg, bounded)",
        "return torch.minimum(pg, bounded)",
        [BY_LOOP, T_LOSSES + "test_clip_hand_values"],
    ),
    Fault(
        "dual_clip_on_positive_advantages",
        OBJECTIVES,
        "lower = (pg > ceiling) & (advantage < 0)",
        "lower = (pg > ceiling) & (advantage > 0)",
        [BY_LOOP, T_LOSSES + "test_dual_clip_hand_values"],
    ),
    Fault(
        "dual_clip_on_the_wrong_side",
        OBJECTIVES,
        "lower = (pg > ceiling) & (advantage < 0)",
        "lower = (pg < ceiling) & (advantage < 0)",
        [BY_LOOP, T_LOSSES + "test_dual_clip_hand_values"],
    ),
    Fault(
        "importance_weight_has_no_cap",
        MISMATCH,
        "ratio.clamp(config.tis_floor, config.tis_cap)",
        "ratio.clamp(min=config.tis_floor)",
        [BY_LOOP, TIS_BY_HAND],
    ),
    Fault(
        "importance_weight_has_a_floor_of_a_half",
        MISMATCH,
        "ratio.clamp(config.tis_floor, config.tis_cap)",
        "ratio.clamp(0.5, config.tis_cap)",
        [T_LOSSES + "test_the_importance_weight_has_no_floor"],
    ),
    Fault(
        "importance_weight_has_a_floor_of_a_tenth",
        MISMATCH,
        "ratio.clamp(config.tis_floor, config.tis_cap)",
        "ratio.clamp(0.1, config.tis_cap)",
        [T_LOSSES + "test_the_importance_weight_has_no_floor"],
    ),
    Fault(
        "importance_weight_upside_down",
        MISMATCH,
        'log_ratio = (tokens.old_logprob - tokens.given("rollout_logprob", "tis_cap"))',
        'log_ratio = (tokens.given("rollout_logprob", "tis_cap") - tokens.old_logprob)',
        [BY_LOOP, TIS_BY_HAND],
    ),
    Fault(
        "importance_weight_of_the_current_policy",
        MISMATCH,
        'log_ratio = (tokens.old_logprob - tokens.given("rollout_logprob", "tis_cap"))',
        'log_ratio = (tokens.logprob - tokens.given("rollout_logprob", "tis_cap"))',
        [BY_LOOP],
    ),
    Fault(
        "kl_is_rewarded",
        LOSSES,
        "token_loss = token_loss + config.kl_coef * kl",
        "token_loss = token_loss - config.kl_coef * kl",
        [BY_LOOP],
    ),
    Fault(
        "kl_the_other_way_round",
        LOSSES,
        "    d = ref_logprob - logprob",
        "    d = logprob - ref_logprob",
        [BY_LOOP, KL_BY_HAND],
    ),
    Fault("k1_has_the_wrong_sign", LOSSES, "return -d\n", "return d\n", [BY_LOOP, KL_BY_HAND]),
    Fault("k2_without_its_half", LOSSES, "return 0.5 * d.square()", "return d.square()", [BY_LOOP, KL_BY_HAND]),
    Fault(
        "k3_is_k2",
        LOSSES,
        "return (d.exp() - d - 1).clamp(",
        "return (0.5 * d.square()).clamp(",
        [BY_LOOP, KL_BY_HAND],
    ),
    Fault(
        "k3_without_its_bound",
        LOSSES,
        "(d.exp() - d - 1).clamp(-KL_BOUND, KL_BOUND)",
        "(d.exp() - d - 1)",
        [KL_BY_HAND],
    ),
    Fault(
        "k1_plus_keeps_its_own_gradient_too",
        LOSSES,
        "estimator[:-1]).detach()",
        "estimator[:-1])",
        [T_LOSSES + "test_kl_gradients"],
    ),
    Fault(
        "log_ratio_without_bound",
        OBJECTIVES,
        "return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()",
        "return log_ratio.exp()",
        [T_LOSSES + "test_log_ratio_is_clamped"],
    ),
    Fault(
        "dropped_tokens_stay_in_the_loss",
        LOSSES,
        "pg = torch.where(effect.keep, pg, 0.0)",
        "pg = pg * 1",
        [
            T_LOSSES + "test_dropped_token_has_no_value_and_no_gradient_but_counts",
            T_CONTROLS + "test_clip_cov_hand_values",
        ],
    ),
    Fault(
        "multiplier_has_a_gradient",
        LOSSES,
        "effect.multiplier.detach()",
        "effect.multiplier",
        [T_LOSSES + "test_multiplier_is_a_constant"],
    ),
    Fault(
        "clip_stays_where_a_control_drops_it",
        LOSSES,
        "without_clip(config) if unclipped else config",
        "config",
        [T_CONTROLS + "test_kl_cov_has_no_ppo_clip_in_reference_semantics", T_LOSSES + "test_composition"],
    ),
    Fault(
        "mismatch_metric_cancels",
        LOSSES,
        "(tokens.old_logprob - tokens.rollout_logprob).abs()",
        "(tokens.old_logprob - tokens.rollout_logprob)",
        [METRICS_BY_HAND],
    ),
    Fault(
        "sampled_entropy_metric_has_the_wrong_sign",
        LOSSES,
        '"actor/sampled_entropy", -tokens.old_logprob',
        '"actor/sampled_entropy", tokens.old_logprob',
        [METRICS_BY_HAND],
    ),
    Fault(
        "ppo_kl_metric_has_the_wrong_sign",
        LOSSES,
        '"actor/ppo_kl", -log_ratio',
        '"actor/ppo_kl", log_ratio',
        [METRICS_BY_HAND],
    ),
    # ---- covariance and selections -----------------------------------------------------------------------------------
    Fault(
        "means_of_one_rank",
        MEANS,
        "    sums = ranks.sum(own[:at])\n",
        "    sums = own[:at]\n    ranks.sum(sums.clone())\n",
        [RANKS],
    ),
    Fault(
        "ranks_select_by_their_own_counts",
        STAGES,
        "            total = ranks.sum(part)\n",
        "            total = part\n            ranks.sum(part.clone())\n",
        [RANKS],
    ),
    Fault(
        "the_sum_with_the_words_of_all_ranks_is_not_put_back",
        STAGES,
        "                part.copy_(total)\n",
        "                pass\n",
        [RANKS],
    ),
    # The arithmetic is in C++: tests/objective/test_selection_faults.py plants faults there.
    Fault(
        "the_means_ignore_eps",
        COVARIANCE,
        "values, sums, denominator_eps, ranks.refused)",
        "values, sums, 0.0, ranks.refused)",
        [T_COVARIANCE + "test_denominator_eps_is_masked_means"],
    ),
    Fault(
        "a_counter_beyond_64_bits_is_cut_off",
        SELECTION,
        "return (x + 2**63) % 2**64 - 2**63",
        "return max(min(x, 2**63 - 1), -(2**63))",
        [T_KERNELS + "draws_go_by_the_hash_of_seed_step_and_id"],
    ),
    Fault(
        "strict_is_not_passed_on",
        SELECTION,
        '"low": low, "high": high, "strict": strict}',
        '"low": low, "high": high, "strict": False}',
        [T_COVARIANCE + "test_interval_closed_and_open"],
    ),
    Fault(
        "excluded_tokens_are_drawn",
        SELECTION,
        "None if exclude is None else exclude.contiguous()",
        "None",
        [T_CONTROLS + "test_reference_clip_cov_excludes_ppo_clipped_tokens"],
    ),
    # ---- controls ----------------------------------------------------------------------------------------------------
    Fault(
        "bonuses_are_multiplied",
        SELECT,
        "            advantage = advantage * shaping.multiplier\n",
        "            advantage, bonus = advantage * shaping.multiplier, bonus * shaping.multiplier\n",
        [T_MOMENTS + "shapings_compose_in_any_order"],
    ),
    Fault(
        "a_later_control_undoes_a_drop",
        SELECT,
        "shaped.drop = shaping.drop if shaped.drop is None else shaped.drop | shaping.drop",
        "shaped.drop = shaping.drop",
        [T_MOMENTS + "shapings_compose_in_any_order"],
    ),
    Fault(
        "rollout_scope_draws_alike_in_every_rollout",
        "entcov/controls/base.py",
        "step=progress.update, config=PolicyLossConfig()",
        "step=0, config=PolicyLossConfig()",
        [T_MOMENTS + "rollout_scope_chooses_what_the_global_scope_chooses_on_the_whole_rollout"],
    ),
    Fault(
        "rollout_scope_forgets_what_it_drops",
        "entcov/controls/base.py",
        "Shaping(selected=chosen.mask, drop=chosen.drop, metrics=metrics)",
        "Shaping(selected=chosen.mask, metrics=metrics)",
        [T_MOMENTS + "a_control_of_scope_rollout_chooses_and_drops_by_its_select"],
    ),
    Fault(
        "fields_that_a_selection_reads_are_not_checked",
        "entcov/controls/base.py",
        "        for name in self.reads:\n",
        "        for name in ():\n",
        [T_MOMENTS + "a_field_that_a_selection_reads_is_named"],
    ),
    Fault(
        "tokens_that_selections_drop_stay_in_the_loss",
        "entcov/controls/base.py",
        "mask = mask & ~selection.drop",
        "pass",
        [T_MOMENTS + "a_dropped_token_is_as_if_it_were_not_there"],
    ),
    Fault(
        "lengths_with_dropped_tokens",
        "entcov/objective/policy_loss.py",
        "length = sequence_index(tokens, sequences).sum(mask).long()",
        "pass",
        [T_MOMENTS + "a_dropped_token_is_as_if_it_were_not_there"],
    ),
    Fault(
        "packages_are_imported_to_list_them",
        "entcov/registry.py",
        "return name in self._classes or name in self._entry_points()",
        "return name in self._classes or self[name] is not None",
        [T_MOMENTS + "a_package_is_imported_when_its_control_is_asked_for"],
    ),
    Fault(
        "selections_go_to_the_wrong_micro_batches",
        SELECT,
        "columns.append([chosen.at(slice(a, b)) for a, b in pairwise(ends)])",
        "columns.append([chosen.at(slice(a, b)) for a, b in pairwise(ends)][::-1])",
        [T_SPLITS + "one_process_any_split"],
    ),
    Fault(
        "controls_of_micro_batch_scope_see_the_mini_batch",
        SELECT,
        'elif control.scope == "micro_batch":',
        'elif control.scope == "one":',
        [T_CONTROLS + "test_micro_batch_scope_is_select_on_each_alone"],
    ),
    Fault(
        "clip_cov_keeps_only_the_selected",
        CLIP_COV,
        "keep=~selection.mask",
        "keep=selection.mask",
        [T_CONTROLS + "test_clip_cov_hand_values"],
    ),
    Fault(
        "clip_cov_draws_alike_in_every_step",
        CLIP_COV,
        "step=step,",
        "step=0,",
        [T_SPLITS + "one_process_any_split"],
    ),
    Fault(
        "clip_cov_ignores_its_seed",
        CLIP_COV,
        "seed=self.seed,",
        "seed=0,",
        [T_SPLITS + "one_process_any_split"],
    ),
    Fault(
        "clip_cov_of_the_paper_drops_one_token_at_least",
        CLIP_COV,
        "at_least=1 if reference else 0",
        "at_least=1",
        [T_CONTROLS + "test_clip_cov_ratio_zero"],
    ),
    Fault(
        "clip_cov_draws_on_each_rank_alone",
        CLIP_COV,
        "if reference else None,\n            group=group,",
        "if reference else None,\n            group=None,",
        [RANKS],
    ),
    Fault(
        "kl_cov_settles_ties_alike_in_every_step",
        KL_COV,
        "step=step,",
        "step=0,",
        [T_CONTROLS + "test_kl_cov_settles_ties_by_seed_and_step"],
    ),
    Fault(
        "kl_cov_penalises_one_direction_only",
        KL_COV,
        "penalty = log_ratio.abs()",
        "penalty = log_ratio.clamp(min=0)",
        [T_CONTROLS + "test_kl_cov_hand_values"],
    ),
    Fault(
        "kl_cov_penalises_all_tokens",
        KL_COV,
        "torch.where(selection.mask, tokens.logprob - tokens.old_logprob, 0.0)",
        "(tokens.logprob - tokens.old_logprob)",
        [T_CONTROLS + "test_kl_cov_hand_values"],
    ),
    Fault(
        "kl_cov_penalty_of_the_paper_is_k1",
        KL_COV,
        "penalty = log_ratio.exp() - 1 - log_ratio",
        "penalty = log_ratio",
        [T_CONTROLS + "test_kl_cov_paper_penalty_is_the_kl_estimate"],
    ),
    Fault(
        "entropy_bonus_is_a_penalty",
        BONUS,
        "penalty=-self.entropy_coef * tokens.entropy",
        "penalty=self.entropy_coef * tokens.entropy",
        [T_CONTROLS + "test_bonuses_subtract_the_mean_entropy"],
    ),
    Fault(
        "adaptive_bonus_moves_the_wrong_way",
        ADAPTIVE,
        "self.delta if self.enabled else -self.delta",
        "-self.delta if self.enabled else self.delta",
        [T_CONTROLS + "test_skywork_trace", T_CONTROLS + "test_trl_trace"],
    ),
    Fault(
        "adaptive_bonus_stays_on_above_the_target",
        ADAPTIVE,
        "return self.coef if self.enabled else 0.0",
        "return self.coef",
        [T_CONTROLS + "test_skywork_trace", T_CONTROLS + "test_trl_trace"],
    ),
    Fault(
        "adaptive_bonus_counts_the_target_as_below",
        ADAPTIVE,
        '"skywork": (False,',
        '"skywork": (True,',
        [T_CONTROLS + "test_trl_trace"],
    ),
    Fault(
        "skywork_rule_watches_the_analytic_entropy",
        ADAPTIVE,
        'means, "scored/sampled_entropy")',
        'means, "updated/entropy")',
        [T_CONTROLS + "test_skywork_trace"],
    ),
    Fault(
        "adaptive_bonus_forgets_whether_it_is_on",
        ADAPTIVE,
        '= ("coef", "enabled")',
        '= ("coef",)',
        [T_CONTROLS + "test_state_survives_json_and_continues_alike[adaptive_bonus]"],
    ),
    Fault(
        "adaptive_bonus_leaves_its_box",
        ADAPTIVE,
        "min(max(moved, self.coef_min), self.coef_max)",
        "max(moved, self.coef_min)",
        [T_CONTROLS + "test_adaptive_bonus_stays_in_its_box"],
    ),
    Fault(
        "aent_coefficient_moves_the_wrong_way",
        AENT,
        "self.coef - self.coef_lr * outside",
        "self.coef + self.coef_lr * outside",
        [T_CONTROLS + "test_aent_trace"],
    ),
    Fault(
        "aent_warmup_one_step_short",
        AENT,
        "self.steps > self.warmup",
        "self.steps >= self.warmup",
        [T_CONTROLS + "test_aent_warmup_counts_steps_that_leave_the_coefficient_alone"],
    ),
    Fault(
        "aent_band_is_a_point",
        AENT,
        "max(0.0, entropy - self.entropy_high)",
        "max(0.0, entropy - self.entropy_low)",
        [T_CONTROLS + "test_aent_trace"],
    ),
    Fault(
        "aent_has_no_lower_bound",
        AENT,
        "outside, self.coef_min)",
        "outside, 0.0)",
        [T_CONTROLS + "test_aent_stays_in_its_box_and_fixed_when_not_adaptive"],
    ),
    Fault(
        "aent_clamps_percents",
        AENT,
        '{"clamp_p": self.clamp_p}',
        '{"clamp_p": self.clamp_p / 100}',
        [T_CONTROLS + "test_needs_and_clamp_arguments"],
    ),
    Fault(
        "aent_takes_percents",
        AENT,
        'check.fraction("clamp_p", self.clamp_p)',
        'check.number("clamp_p", self.clamp_p, 0.0, 100.0)',
        [T_CONTROLS + "test_knob_errors_name_key_rule_and_value"],
    ),
    Fault(
        "aent_forgets_its_steps",
        AENT,
        '= ("coef", "steps")',
        '= ("coef",)',
        [T_CONTROLS + "test_state_survives_json_and_continues_alike[aent]"],
    ),
    Fault(
        "aent_rewards_the_plain_entropy",
        AENT,
        "penalty=-self.coef * tokens.clamped_entropy",
        "penalty=-self.coef * tokens.entropy",
        [T_CONTROLS + "test_bonuses_subtract_the_mean_entropy"],
    ),
)
