"""Faults of prompt policies, reward shaping, temperatures of prompts, and rankings of a data set."""

from tests.planted_faults.fault import Fault

POLICY, RANK, KMEANS, DATA, SHAPING, RULES, LOOP, COLLECT, BATCH, ACTOR, SAMPLER = (
    f"entcov/rl/{name}.py"
    for name in (
        "data/prompt_policy", "data/rank", "data/kmeans", "data/stream", "rewards/shaping", "rewards/rules", "loop",
        "collect", "batch", "actor", "hf/sampler",
    )
)  # fmt: skip
T_POLICY, T_RANK, T_DATA, T_SHAPING, T_RULES, T_LOOP, T_BATCH, T_ACTOR, T_SAMPLER = (
    f"tests/rl/{name}.py::test_"
    for name in (
        "data/test_prompt_policy", "data/test_rank", "data/test_stream", "rewards/test_shaping", "rewards/test_rules",
        "test_loop", "test_batch", "hf/test_actor", "hf/test_sampler",
    )
)  # fmt: skip
OTHERS = "the ordinary suite tries others of these files"

FAULTS = (
    # ---- prompt policies ---------------------------------------------------------------------------------------------
    Fault(
        "prepo_sums_log_probabilities",
        POLICY,
        "math.exp(-math.fsum(logprob) / len(logprob))",
        "math.exp(-math.fsum(logprob))",
        [T_POLICY + "prepo_moves_its_window_from_low_to_high_perplexity", T_POLICY + "perplexity_by_hand"],
        slow=OTHERS,
    ),
    Fault(
        "prepo_never_comes_to_the_end",
        POLICY,
        "(progress.step - 1) / max(1, progress.steps - 1)",
        "(progress.step - 1) / progress.steps",
        [T_POLICY + "prepo_moves_its_window_from_low_to_high_perplexity"],
    ),
    Fault(
        "erpo_has_no_greatest_temperature",
        POLICY,
        "min(self.max_temperature, base + self.increment",
        "max(0.0, base + self.increment",
        [T_POLICY + "erpo_raises_the_temperature_of_prompts_that_were_all_right"],
    ),
    Fault(
        "erpo_counts_groups_that_are_all_wrong",
        POLICY,
        "        return min(self.scores) >= RIGHT\n",
        "        return min(self.scores) >= RIGHT or max(self.scores) < RIGHT\n",
        [T_POLICY + "erpo_raises_the_temperature_of_prompts_that_were_all_right"],
        slow=OTHERS,
    ),
    Fault(
        "greso_forgets_the_floor",
        POLICY,
        "1.0 - max(p ** abs(streak), self.p_floor)",
        "1.0 - p ** abs(streak)",
        [T_POLICY + "greso_skips_by_the_last_groups_of_a_prompt"],
        slow=OTHERS,
    ),
    Fault(
        "greso_adapts_in_the_first_epoch",
        POLICY,
        "progress.epoch > 1",
        "progress.epoch > 0",
        [T_POLICY + "greso_adapts_from_the_second_epoch_on"],
    ),
    Fault(
        "greso_s_probabilities_are_not_stored",
        POLICY,
        'self._now = dict(state["now"])',
        "pass",
        [T_POLICY + "state_is_json_and_brings_everything_back[greso]"],
        slow=OTHERS,
    ),
    # ---- the loop and the collector ----------------------------------------------------------------------------------
    Fault(
        "prompt_policy_observes_its_copy",
        LOOP,
        "self.prompt_policy.observe(collected.outcomes",
        "copy.deepcopy(self.prompt_policy).observe(collected.outcomes",
        [T_LOOP + "a_prompt_policy_is_resumed_bit_for_bit"],
    ),
    Fault(
        "prompt_policy_is_not_restored",
        LOOP,
        'self.prompt_policy.load_state_dict(state["prompt_policy"])',
        "pass",
        [T_LOOP + "a_prompt_policy_is_resumed_bit_for_bit"],
    ),
    Fault(
        "state_of_the_prompt_policy_is_not_copied",
        LOOP,
        "None if self.prompt_policy is None else copy.deepcopy(self.prompt_policy.state_dict())",
        "None if self.prompt_policy is None else self.prompt_policy.state_dict()",
        [T_LOOP + "the_state_before_a_step_is_a_copy"],
        slow=OTHERS,
    ),
    Fault(
        "progress_of_a_step_ahead_is_that_of_the_current_one",
        LOOP,
        "self._progress(step, self.position)",
        "self._progress()",
        [T_LOOP + "a_prompt_policy_chooses_and_heats_prompts"],
    ),
    Fault(
        "outcomes_of_what_was_kept_alone",
        COLLECT,
        "metrics, _outcomes(drawn))",
        "metrics, _outcomes(kept))",
        [T_LOOP + "a_prompt_policy_hears_of_groups_that_the_filter_drops"],
    ),
    Fault(
        "candidates_are_seen_again",
        COLLECT,
        "position += len(candidates)",
        "position += missing",
        [T_LOOP + "a_prompt_policy_chooses_and_heats_prompts"],
        slow=OTHERS,
    ),
    Fault(
        "stored_rollouts_lose_their_temperature",
        COLLECT,
        '_KEPT = ("components", "baseline", "temperature")',
        '_KEPT = ("components", "baseline")',
        [T_LOOP + "kept_rollouts_are_the_same_rollouts"],
        slow=OTHERS,
    ),
    Fault(
        "rollouts_have_the_temperature_of_the_recipe",
        COLLECT,
        "rollout.temperature = own.get(rollout.prompt.uid)",
        "rollout.temperature = config.temperature",
        [T_LOOP + "a_prompt_policy_chooses_and_heats_prompts"],
    ),
    Fault(
        "advantage_from_raw_scores",
        LOOP,
        "table = with_pseudo(self.shapings, responses)",
        "table = replace(responses, reward=responses.score)",
        [T_LOOP + "the_advantage_is_computed_from_shaped_rewards_and_the_score_stays"],
    ),
    # ---- temperatures ------------------------------------------------------------------------------------------------
    Fault(
        "micro_batches_mix_temperatures",
        BATCH,
        "(kinds := dict.fromkeys(temperatures)) > 1",
        "(kinds := dict.fromkeys(temperatures)) > 99",
        [T_BATCH + "a_micro_batch_has_one_temperature"],
    ),
    Fault(
        "actor_has_one_temperature",
        ACTOR,
        "return self.temperature if micro.temperature is None else micro.temperature",
        "return self.temperature",
        [T_ACTOR + "sequences_of_several_temperatures_are_scored_and_trained_at_their_own"],
    ),
    Fault(
        "reward_model_has_the_temperature_of_the_policy",
        "entcov/rl/trained_model.py",
        "        return self.temperature\n",
        "        return micro.temperature or self.temperature\n",
        ["tests/rl/hf/test_reward_model.py::test_the_step_precedes_the_rewards_or_follows_them"],
        slow=OTHERS,
    ),
    Fault(
        "temperatures_belong_to_the_first_rows",
        SAMPLER,
        "own = temperature[rows] if",
        "own = temperature[: len(rows)] if",
        [T_SAMPLER + "every_prompt_may_have_its_own_temperature"],
        slow=OTHERS,
    ),
    Fault(
        "prompt_logprobs_of_the_token_itself",
        SAMPLER,
        "F.pad(row[1:], (0, 1), value=IGNORE_INDEX)",
        "row",
        [T_SAMPLER + "prompt_logprobs_are_those_of_the_plain_forward_pass"],
        slow=OTHERS,
    ),
    # ---- reward shaping ----------------------------------------------------------------------------------------------
    Fault(
        "overlong_begins_at_the_limit",
        SHAPING,
        "free = max_response_length - self.buffer",
        "free = max_response_length",
        [T_SHAPING + "overlong_is_linear_over_the_buffer"],
    ),
    Fault(
        "relative_length_counts_wrong_responses",
        SHAPING,
        "lengths = [len(r.tokens) for r in group if r.reward >= RIGHT]",
        "lengths = [len(r.tokens) for r in group]",
        [T_SHAPING + "relative_length_compares_right_responses_with_their_mean"],
        slow=OTHERS,
    ),
    Fault(
        "shaping_changes_the_score",
        SHAPING,
        "rollout.shaped_reward += value",
        "rollout.shaped_reward += value; rollout.reward += value",
        [T_SHAPING + "shaped_rewards_add_up_and_scores_stay"],
    ),
    Fault(
        "every_group_is_reactivated",
        SHAPING,
        "[self.pseudo_reward] if min(scores) >= RIGHT else []",
        "[self.pseudo_reward]",
        [T_SHAPING + "reactivate_gives_all_right_groups_an_advantage"],
        slow=OTHERS,
    ),
    # ---- rankings ----------------------------------------------------------------------------------------------------
    Fault(
        "semantic_entropy_of_counts",
        RANK,
        "np.logaddexp.reduce(logprob) for logprob in clusters.values()",
        "math.log(len(logprob)) for logprob in clusters.values()",
        [T_RANK + "semantic_entropy_by_hand"],
    ),
    Fault(
        "an_interrupted_ranking_draws_the_same_for_every_part",
        RANK,
        "derived_seed(config.seed, _SEED, part)",
        "derived_seed(config.seed, _SEED)",
        [T_RANK + "every_part_of_a_ranking_has_draws_of_its_own"],
        slow=OTHERS,
    ),
    Fault(
        "stages_by_falling_entropy",
        RANK,
        "key=lambda row: scored[row][0])",
        "key=lambda row: -scored[row][0])",
        [T_RANK + "the_command_writes_stages_of_rising_entropy"],
        slow=OTHERS,
    ),
    Fault(
        "kmeans_chooses_the_farthest_member",
        KMEANS,
        "np.lexsort((np.arange(len(points)), distance, cluster))",
        "np.lexsort((np.arange(len(points)), -distance, cluster))",
        [T_RANK + "kmeans_finds_separate_clusters_and_stands_still"],
    ),
    Fault(
        "kmeans_centres_are_sums",
        KMEANS,
        "sums / np.bincount(cluster, minlength=k)[:, None]",
        "sums",
        [T_RANK + "kmeans_finds_separate_clusters_and_stands_still"],
        slow=OTHERS,
    ),
    Fault(
        "a_curriculum_is_shuffled",
        DATA,
        'if self.order == "shuffled":',
        "if self.order:",
        [T_DATA + "a_curriculum_is_read_in_the_order_of_its_files"],
    ),
    Fault(
        "gsm8k_answers_are_compared_as_written",
        RULES,
        "str(number.normalize())",
        "str(number)",
        [T_RULES + "the_final_answer_is_what_the_score_looks_at"],
        slow=OTHERS,
    ),
)
