"""Faults of the objectives, the weights and rejection of samples, KL in the reward, the advantages."""

from tests.planted_faults.fault import Fault

OBJECTIVES, TOKENS, LOSSES, MISMATCH, KL_REWARD, ADVANTAGES = (
    f"entcov/objective/{name}.py"
    for name in ("objectives", "tokens", "policy_loss", "mismatch", "kl_in_reward", "advantages")
)
LOOP, COLLECT, BATCH, CONFIG, SCORER = (
    f"entcov/rl/{name}.py" for name in ("loop", "collect", "batch", "config", "rewards/scorer")
)
CONTROLS, KL_COV, CLIP_COV = (f"entcov/controls/{name}.py" for name in ("__init__", "kl_cov", "clip_cov"))

T_OBJECTIVES, T_MISMATCH, T_KL, T_ADVANTAGES, T_LOOP = (
    f"tests/{name}.py::test_"
    for name in (
        "objective/test_objectives", "objective/test_mismatch", "objective/test_kl_in_reward",
        "objective/test_advantages", "rl/test_advantages_in_the_loop",
    )
)  # fmt: skip
WHOLE, RANKS = T_OBJECTIVES + "matches_whole_responses", T_OBJECTIVES + "context_parallel_ranks_change_nothing"
KNOBS = T_OBJECTIVES + "knobs_that_an_objective_does_not_read_are_refused"
NOT_WITH = T_OBJECTIVES + "controls_that_do_not_go_with_the_objective"
WEIGHTS, REJECTION = T_MISMATCH + "weights_by_hand", T_MISMATCH + "rejection_by_hand"
KL_LOOP = T_LOOP + "kl_leaves_the_reward_before_the_advantage"

FAULTS = (
    # ---- objectives --------------------------------------------------------------------------------------------------
    Fault(
        "sums_over_responses_of_one_rank",
        "entcov/objective/sequences.py",
        "        if self.group is not None:\n            dist.all_reduce",
        "        if False:\n            dist.all_reduce",
        [RANKS],
    ),
    Fault(
        "gspo_ratio_of_the_sum",
        OBJECTIVES,
        "(sequences.sum(value) / length.clamp(min=1))",
        "sequences.sum(value)",
        [WHOLE],
    ),
    Fault(
        "gspo_without_its_bound",
        OBJECTIVES,
        ".clamp(max=GSPO_BOUND)",
        "",
        [T_OBJECTIVES + "gspo_bounds_the_mean_log_ratio"],
    ),
    Fault(
        "gspo_has_no_gradient",
        OBJECTIVES,
        "(tokens.logprob - tokens.logprob.detach() + mean)",
        "mean",
        [WHOLE],
    ),
    Fault(
        "geo_mean_clips_both_ways",
        OBJECTIVES,
        "least = sign * torch.minimum(sign * log_ratio, sign * bounded)",
        "least = sign * (sign * bounded)",
        [WHOLE],
    ),
    Fault(
        "cispo_drops_clipped_tokens",
        OBJECTIVES,
        "return -weight * advantage * tokens.logprob, clipped",
        "return -weight * advantage * torch.where(clipped, 0.0, tokens.logprob), clipped",
        [WHOLE, T_OBJECTIVES + "cispo_hand_values"],
    ),
    Fault(
        "cispo_weight_has_a_gradient",
        OBJECTIVES,
        "token_ratio(log_ratio).detach()",
        "token_ratio(log_ratio)",
        [WHOLE],
    ),
    Fault(
        "sapo_temperatures_exchanged",
        OBJECTIVES,
        "masked_fill(advantage > 0, config.tau_pos)",
        "masked_fill(advantage < 0, config.tau_pos)",
        [WHOLE],
    ),
    Fault(
        "sapo_gate_is_not_scaled",
        OBJECTIVES,
        "(token_ratio(log_ratio) - 1)) * 4 / tau",
        "(token_ratio(log_ratio) - 1)) * 4",
        [WHOLE, T_OBJECTIVES + "the_first_update_has_the_same_gradient_under_every_objective"],
    ),
    Fault(
        "dro_pulls_half_as_much",
        OBJECTIVES,
        "0.5 * config.dro_beta * log_ratio.square()",
        "0.25 * config.dro_beta * log_ratio.square()",
        [WHOLE, T_OBJECTIVES + "dro_hand_values"],
    ),
    Fault(
        "dppo_masks_in_both_directions",
        OBJECTIVES,
        "(kl <= config.clip_high) | (new <= old)",
        "(kl <= config.clip_high)",
        [WHOLE, T_OBJECTIVES + "dppo_kl_hand_values"],
    ),
    Fault(
        "dppo_ranges_exchanged",
        OBJECTIVES,
        "moved <= config.clip_high, moved >= -config.clip_low)",
        "moved <= config.clip_low, moved >= -config.clip_high)",
        [WHOLE, T_OBJECTIVES + "dppo_tv_hand_values"],
    ),
    Fault(
        "dppo_ratio_has_no_bound",
        OBJECTIVES,
        "ratio.clamp(max=bound), 0.0)",
        "ratio, 0.0)",
        [WHOLE, T_OBJECTIVES + "dppo_tv_hand_values"],
    ),
    Fault(
        "vespo_weight_is_not_one_at_ratio_one",
        OBJECTIVES,
        "phi = (decay + k * log_w - decay",
        "phi = (k * log_w - decay",
        [WHOLE, T_OBJECTIVES + "vespo_hand_values"],
    ),
    Fault(
        "vespo_signs_exchanged",
        OBJECTIVES,
        "up = advantage >= 0",
        "up = advantage < 0",
        [WHOLE, T_OBJECTIVES + "vespo_hand_values"],
    ),
    Fault(
        "vespo_has_no_smallest_weight",
        OBJECTIVES,
        "clamp(math.log(VESPO_SMALLEST), LOG_RATIO_BOUND)",
        "clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)",
        [T_OBJECTIVES + "vespo_hand_values"],
    ),
    Fault(
        "vespo_has_the_importance_weight_twice",
        LOSSES,
        'if config.objective != "vespo":',
        "if True:",
        [T_OBJECTIVES + "vespo_takes_importance_weights_into_its_own"],
    ),
    Fault(
        "gpg_counts_every_response",
        ADVANTAGES,
        "_group_sum(centred.abs(), group) > 0",
        "centred == centred",
        [T_ADVANTAGES + "gpg_hand_values"],
    ),
    Fault(
        "off_policy_mask_on_positive_advantages",
        MISMATCH,
        "tokens.loss_mask & (tokens.advantage < 0) & (drift",
        "tokens.loss_mask & (drift",
        [T_MISMATCH + "off_policy_mask_by_hand"],
    ),
    Fault(
        "off_policy_mask_by_the_sum",
        MISMATCH,
        "/ sequences.sum(tokens.loss_mask).clamp(min=1)\n    return tokens.loss_mask & (tokens",
        "\n    return tokens.loss_mask & (tokens",
        [T_MISMATCH + "off_policy_mask_by_hand"],
    ),
    Fault(
        "objectives_without_a_form_without_clip",
        OBJECTIVES,
        'UNCLIPPED = ("ppo", "cispo", "gpg", "dro")',
        'UNCLIPPED = ("ppo", "cispo", "gpg", "dro", "gspo", "geo_mean", "sapo")',
        [T_OBJECTIVES + "a_control_without_clip"],
    ),
    Fault(
        "kl_cov_goes_with_every_objective",
        KL_COV,
        'return UNCLIPPED if self.semantics == "reference" else None',
        "return None",
        [NOT_WITH],
    ),
    Fault(
        "sent_goes_with_every_objective",
        "entcov/controls/sent.py",
        'return UNCLIPPED if self.semantics == "reference" else None',
        "return None",
        [NOT_WITH],
    ),
    Fault(
        "clip_cov_goes_with_every_objective",
        CLIP_COV,
        'return ("ppo",) if self.semantics == "reference" else None',
        "return None",
        [NOT_WITH],
    ),
    Fault(
        "unread_knobs_are_accepted",
        TOKENS,
        "        if value != default:\n",
        "        if False:\n",
        [KNOBS],
    ),
    Fault(
        "gspo_takes_any_aggregation",
        TOKENS,
        "published = RESPONSE_AGGREGATIONS.get(self.objective, AGGREGATIONS)",
        "published = AGGREGATIONS",
        [KNOBS],
    ),
    # ---- weights and rejection ---------------------------------------------------------------------------------------
    Fault(
        "weight_of_a_response_is_its_mean",
        MISMATCH,
        "log_ratio = sequences.sum(log_ratio).to(log_ratio.dtype)",
        "log_ratio = (sequences.sum(log_ratio) / sequences.sum(torch.ones_like(log_ratio))).to(log_ratio.dtype)",
        [WEIGHTS],
    ),
    Fault(
        "masked_weights_are_truncated",
        MISMATCH,
        'if config.tis_mode == "mask":',
        "if False:",
        [WEIGHTS],
    ),
    Fault(
        "floor_of_the_weight_is_not_outside",
        MISMATCH,
        " | (ratio < config.tis_floor)",
        "",
        [WEIGHTS],
    ),
    Fault(
        "geometric_rejection_is_by_the_product",
        MISMATCH,
        'if self.level == "geometric":',
        "if False:",
        [REJECTION],
    ),
    Fault(
        "rejection_by_k3_is_of_the_inverse_ratio",
        MISMATCH,
        '"k3": bounded.exp() - 1 - bounded}',
        '"k3": (-bounded).exp() - 1 + bounded}',
        [REJECTION],
    ),
    Fault(
        "rejection_by_the_maximum_is_of_the_token_alone",
        MISMATCH,
        'if self.level == "max":\n            value =',
        'if self.level == "max":\n            _ =',
        [REJECTION],
    ),
    Fault(
        "veto_is_of_the_token_alone",
        MISMATCH,
        "(sequences.sum(tokens.loss_mask & (log_ratio.exp() < self.veto)) > 0)",
        "(tokens.loss_mask & (log_ratio.exp() < self.veto))",
        [REJECTION],
    ),
    Fault(
        "rejected_tokens_stay_in_the_loss",
        LOOP,
        "dropped = dropped | rejected",
        "pass",
        [
            T_LOOP + "rejected_tokens_leave_the_loss",
            T_LOOP + "rejected_responses_leave_the_loss_and_stay_in_their_group",
        ],
    ),
    # ---- KL in the reward --------------------------------------------------------------------------------------------
    Fault(
        "kl_raises_the_reward",
        LOOP,
        "responses.reward - self.kl_reward_coef * total",
        "responses.reward + self.kl_reward_coef * total",
        [KL_LOOP],
    ),
    Fault(
        "kl_in_reward_changes_the_score",
        BATCH,
        "reward=responses.score[sequence]",
        "reward=responses.reward[sequence]",
        [T_LOOP + "tokens_keep_the_score"],
    ),
    Fault(
        "kl_controller_is_not_stored",
        LOOP,
        '            "kl_reward_coef": self.kl_reward_coef,\n',
        "",
        [KL_LOOP],
    ),
    Fault(
        "kl_controller_is_not_bounded",
        KL_REWARD,
        "min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)",
        "kl / self.target - 1",
        [T_KL + "controller_trace"],
    ),
    Fault(
        "kl_mean_is_over_tokens",
        KL_REWARD,
        "float((total / sequences.totals(torch.ones_like(kl))).mean())",
        "float(kl.mean())",
        [T_KL + "sums_and_means_by_hand"],
    ),
    # ---- advantages --------------------------------------------------------------------------------------------------
    Fault(
        "grpo_std_without_bessel",
        ADVANTAGES,
        "_group_sum(centred.square(), group) / (size - 1).clamp(min=1)",
        "_group_sum(centred.square(), group) / size",
        [T_ADVANTAGES + "grpo_hand_values", T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    Fault(
        "grpo_eps_a_hundred_times_larger",
        ADVANTAGES,
        "STD_EPS = 1e-6",
        "STD_EPS = 1e-4",
        [T_ADVANTAGES + "grpo_hand_values"],
    ),
    Fault(
        "grpo_does_not_divide_by_the_std",
        ADVANTAGES,
        "(centred / (_group_std(centred, group, size) + STD_EPS)).float()",
        "centred.float()",
        [T_ADVANTAGES + "grpo_hand_values"],
    ),
    Fault(
        "rloo_baseline_includes_the_response_itself",
        ADVANTAGES,
        " * size / (size - 1).clamp(min=1)).float()",
        ").float()",
        [T_ADVANTAGES + "rloo_hand_values", T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    Fault(
        "a_single_response_gets_nothing",
        ADVANTAGES,
        "torch.where(size > 1, reward - _group_sum(reward, group) / size, reward)",
        "reward - _group_sum(reward, group) / size",
        [T_ADVANTAGES + "singleton_group_keeps_its_reward"],
    ),
    Fault(
        "reinforce_pp_whitens_over_responses",
        ADVANTAGES,
        "weight = response_length.double()",
        "weight = torch.ones_like(x)",
        [T_ADVANTAGES + "whitening_is_over_tokens_not_responses", T_ADVANTAGES + "reinforce_pp_hand_values"],
    ),
    Fault(
        "reinforce_pp_variance_without_bessel",
        ADVANTAGES,
        "(weight * (x - mean).square()).sum() / (tokens - 1)",
        "(weight * (x - mean).square()).sum() / tokens",
        [T_ADVANTAGES + "reinforce_pp_hand_values"],
    ),
    Fault(
        "reinforce_pp_eps_ten_thousand_times_larger",
        ADVANTAGES,
        "VARIANCE_EPS = 1e-8",
        "VARIANCE_EPS = 1e-4",
        [T_ADVANTAGES + "reinforce_pp_hand_values"],
    ),
    Fault(
        "reinforce_pp_baseline_has_no_baseline",
        ADVANTAGES,
        "_whiten_over_tokens(_centred(*_groups(responses)), responses.length)",
        "_whiten_over_tokens(_groups(responses)[0], responses.length)",
        [T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    Fault(
        "opo_weighs_responses_alike",
        ADVANTAGES,
        "length = responses.length.double()",
        "length = torch.ones_like(reward)",
        [T_ADVANTAGES + "opo_hand_values", T_ADVANTAGES + "matches_loop_for_groups_in_any_order"],
    ),
    Fault(
        "grpo_batch_scale_is_the_groups",
        ADVANTAGES,
        "std = reward.std() if len(reward) > 1",
        "std = _group_std(centred, group, size) if len(reward) > 1",
        [T_ADVANTAGES + "grpo_scales"],
    ),
    Fault(
        "passk_rewards_one_of_two_equal_best",
        ADVANTAGES,
        "first & (_group_sum(first.double(), group) == 1)",
        "first",
        [T_ADVANTAGES + "grpo_passk_hand_values"],
    ),
    Fault(
        "gdpo_normalises_the_sum",
        ADVANTAGES,
        "weights[name] * (centred / (_group_std(centred, group, size) + STD_EPS))",
        "weights[name] * centred",
        [T_ADVANTAGES + "gdpo_hand_values"],
    ),
    Fault(
        "maxrl_divides_by_the_std",
        ADVANTAGES,
        "(_group_sum(reward, group) / size + STD_EPS)).float()",
        "(_group_std(_centred(reward, group, size), group, size) + STD_EPS)).float()",
        [T_ADVANTAGES + "maxrl_hand_values"],
    ),
    Fault(
        "psr_keeps_the_incorrect",
        ADVANTAGES,
        "torch.where(correct, reward, 0.0).float(), keep=correct",
        "torch.where(correct, reward, 0.0).float()",
        [
            T_ADVANTAGES + "positive_and_negative_sample_reinforcement",
            T_LOOP + "responses_that_the_estimator_drops_leave_the_denominators",
        ],
    ),
    Fault(
        "w_reinforce_ignores_its_weight",
        ADVANTAGES,
        "torch.where(correct, self.weight * reward, reward - 1)",
        "torch.where(correct, reward, reward - 1)",
        [T_ADVANTAGES + "positive_and_negative_sample_reinforcement"],
    ),
    Fault(
        "other_scores_fall_through",
        ADVANTAGES,
        "other = (responses.score != 0) & (responses.score != 1)",
        "other = responses.score.isnan()",
        [T_ADVANTAGES + "positive_and_negative_sample_reinforcement"],
    ),
    Fault(
        "token_baseline_by_the_energy_of_one_token",
        ADVANTAGES,
        "weight[order] = path - before",
        "weight[order] = energy",
        [T_ADVANTAGES + "optimal_token_baseline_matches_a_loop_in_any_order"],
    ),
    Fault(
        "token_baseline_runs_on_into_the_next_response",
        ADVANTAGES,
        "weight[order] = path - before",
        "weight[order] = path",
        [T_ADVANTAGES + "optimal_token_baseline_matches_a_loop_in_any_order"],
    ),
    # ---- in the loop ----------------------------------------------------------------------------------------------
    Fault(
        "dropped_responses_stay_in_the_loss",
        LOOP,
        "dropped = ~advantages.keep[batch.sequence[batch.loss_mask]]",
        "pass",
        [T_LOOP + "responses_that_the_estimator_drops_leave_the_denominators"],
    ),
    Fault(
        "kl_in_reward_has_no_reference_policy",
        "entcov/rl/backend.py",
        "needed = start.reference or needs_reference",
        "needed = needs_reference",
        ["tests/rl/test_run.py::test_a_resumed_run_continues_bit_for_bit[reference_kl]"],
        slow="a whole run",
    ),
    Fault(
        "evaluation_keeps_the_kl_estimator_without_a_weight",
        "entcov/rl/run.py",
        "kl_coef=0.0, kl_estimator=PolicyLossConfig.kl_estimator",
        "kl_coef=0.0",
        ["tests/rl/test_run.py::test_evaluation_of_a_finished_run"],
        slow="a whole run",
    ),
    Fault(
        "greedy_response_is_drawn",
        COLLECT,
        "group_size=1, temperature=0.0, **options",
        "group_size=1, temperature=config.temperature, **options",
        [T_LOOP + "remax_samples_a_greedy_response_to_each_prompt"],
    ),
    Fault(
        "components_of_the_reward_are_lost",
        SCORER,
        "rollout.components, reward = reward, float",
        "rollout.components, reward = None, float",
        [T_LOOP + "components_of_the_reward_reach_the_estimator"],
    ),
    Fault(
        "packed_rollouts_forget_their_baselines",
        COLLECT,
        '_KEPT = ("components", "baseline", ',
        '_KEPT = ("components", ',
        [T_LOOP + "packed_rollouts_keep_components_and_baselines"],
    ),
)
