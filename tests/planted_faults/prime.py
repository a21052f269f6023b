"""Faults of PRIME, its rewards, its reward model and its runs; and of ETPO."""

from tests.planted_faults.fault import Fault

PRIME, ETPO = (f"entcov/objective/{name}.py" for name in ("prime", "etpo"))
MODEL, LOOP, BACKEND, RECIPES = (f"entcov/rl/{name}.py" for name in ("reward_model", "loop", "backend", "load_config"))
T_PRIME, T_ETPO, T_MODEL, T_RUN, T_PLAN = (
    f"tests/{name}.py::test_"
    for name in ("objective/test_prime", "objective/test_etpo", "rl/hf/test_reward_model", "rl/test_prime",
                 "plan/test_plan")
)  # fmt: skip
RESUMED = T_RUN + "a_resumed_run_continues_bit_for_bit"
HALF_A_STEP = T_RUN + "a_run_that_fails_between_the_two_models_steps_keeps_neither"
ONE_STEP = T_MODEL + "one_step_is_that_of_the_cross_entropy_of_whole_responses"
ANY_DIVISION = T_MODEL + "no_division_of_the_batch_changes_the_rewards_or_the_step"
MOMENT = T_MODEL + "the_step_precedes_the_rewards_or_follows_them"

RUNS = "three runs of the trainer take two seconds"

FAULTS = (
    # ---- PRIME's rewards and advantages ------------------------------------------------------------------------------
    Fault(
        "a_response_s_last_token_keeps_its_reward",
        PRIME,
        "    reward[last[length > 0]] = 0.0\n",
        "",
        [T_PRIME + "token_rewards_are_the_scaled_log_ratios_of_all_but_last_tokens", MOMENT],
    ),
    Fault(
        "token_rewards_are_compared_with_sums_over_responses",
        PRIME,
        "index_add_(0, response, process) / length",
        "index_add_(0, response, process)",
        [T_PRIME + "one_group_by_hand", T_PRIME + "against_loops_with_groups_of_different_sizes_in_any_order"],
    ),
    Fault(
        "a_response_is_compared_with_itself",
        PRIME,
        "(size - 1).clamp(min=1)",
        "size",
        [T_PRIME + "against_loops_with_groups_of_different_sizes_in_any_order"],
    ),
    Fault(
        "the_outcome_rewards_every_token",
        PRIME,
        "total[ends - 1] += reward_gt_coef * compared(outcome, outcome, slice(None))",
        "total += (reward_gt_coef * compared(outcome, outcome, slice(None)))[response]",
        [T_PRIME + "one_group_by_hand"],
    ),
    Fault(
        "rewards_of_earlier_tokens_count",
        PRIME,
        "before[ends][response] - before[:-1]",
        "before[1:] - before[ends - length][response]",
        [T_PRIME + "one_group_by_hand"],
    ),
    Fault(
        "the_norm_is_the_greatest_token_reward",
        PRIME,
        "suffix_sums(process).abs().max()",
        "process.abs().max()",
        [T_PRIME + "the_norm_divides_by_the_greatest_return_of_token_rewards"],
    ),
    Fault(
        "the_shaped_reward_does_not_reach_the_advantage",
        "entcov/objective/advantages.py",
        "parts = responses.reward, responses.group, responses.length",
        "parts = responses.score, responses.group, responses.length",
        [T_PRIME + "the_estimator_reads_the_tokens_rewards_and_the_shaped_reward"],
    ),
    # ---- the reward model --------------------------------------------------------------------------------------------
    Fault(
        "the_reward_model_learns_the_opposite",
        MODEL,
        "slope = (beta * slope / totals",
        "slope = (-beta * slope / totals",
        [ONE_STEP, T_MODEL + "it_learns_which_responses_are_correct"],
    ),
    Fault(
        "the_cross_entropy_divides_by_the_micro_batch",
        MODEL,
        "slope / totals.num_sequences)",
        "slope / micro.num_sequences)",
        [ANY_DIVISION],
    ),
    Fault(
        "the_reward_model_is_compared_with_itself",
        MODEL,
        "self._logprob(self.reference, batch)",
        "self._logprob(self.model, batch)",
        [ONE_STEP, MOMENT],
    ),
    Fault(
        "rewards_of_the_model_before_its_step",
        MODEL,
        'if self.prime.update == "after":',
        'if self.prime.update == "none":',
        [MOMENT],
    ),
    Fault(
        "the_reward_model_clips_as_the_actor",
        MODEL,
        '"weight_decay", "max_grad_norm")',
        '"weight_decay")',
        [ONE_STEP],
    ),
    Fault(
        "the_reward_model_decays_as_the_actor",
        "entcov/rl/hf/actor.py",
        "        config = self.config  # a reward model's is not the actor's\n",
        "",
        [ONE_STEP],
    ),
    Fault(
        "the_reward_model_sees_shaped_rewards",
        MODEL,
        "outcome = micro.responses.score.double()",
        "outcome = micro.responses.reward.double() + 1",
        [ONE_STEP],
    ),
    # ---- its place in a run ------------------------------------------------------------------------------------------
    Fault(
        "half_a_step_of_prime_is_stored",
        LOOP,
        'self.unstorable = f"step {step} has begun to change the reward model"',
        "pass",
        [HALF_A_STEP + "[assign_advantages]"],
        slow=RUNS,
    ),
    Fault(
        "a_resumed_reward_model_has_a_new_optimizer",
        LOOP,
        'self.reward_model.load_state_dict(state["reward_model"])',
        "pass",
        [RESUMED],
    ),
    Fault(
        "a_resumed_reward_model_is_the_reference",
        BACKEND,
        "start.checkpoint.file(REWARD_MODEL)",
        'start.checkpoint.file("model")',
        [RESUMED],
        slow=RUNS,
    ),
    Fault(
        "a_reward_model_with_another_vocabulary",
        "entcov/rl/preflight.py",
        "if size != wanted:",
        "if size > wanted:",
        [T_RUN + "a_reward_model_of_its_own_first_weights"],
        slow=RUNS,
    ),
    Fault(
        "an_override_of_a_reward_model_that_is_not_used",
        RECIPES,
        '("prime.", "advantage", "prime", config.advantage)',
        '("prime.", "advantage", config.advantage, config.advantage)',
        [T_RUN + "keys_of_a_reward_model_that_is_not_used"],
    ),
    Fault(
        "the_plan_forgets_the_reward_model",
        "entcov/plan/memory.py",
        "self.reference + self.reward_model + TRAINER",
        "self.reference + TRAINER",
        [T_PLAN + "weights_gradients_and_optimizer_by_hand"],
    ),
    # ---- ETPO --------------------------------------------------------------------------------------------------------
    Fault(
        "tokens_inside_an_action_are_discounted",
        ETPO,
        "F.pad(expected_q[:steps, 1:]",
        "F.pad(gamma * expected_q[:steps, 1:]",
        [T_ETPO + "targets_by_hand", T_ETPO + "the_targets_fixed_point_is_the_soft_optimum_over_whole_actions"],
    ),
    Fault(
        "the_paper_s_targets_have_the_code_s_divergence",
        ETPO,
        'slice(0, steps) if semantics == "paper" else',
        "slice(1, steps + 1) if steps else",
        [T_ETPO + "targets_by_hand"],
    ),
    Fault(
        "an_episode_goes_on_behind_its_end",
        ETPO,
        "gamma * (alive * (",
        "gamma * ((",
        [T_ETPO + "targets_by_hand"],
    ),
    Fault(
        "the_expectation_s_weights_have_no_gradient",
        ETPO,
        "p = logp.exp()",
        "p = logp.exp().detach()",
        [T_ETPO + "a_step_lowers_the_loss_as_its_gradient_says_with_an_error_of_first_order"],
    ),
    Fault(
        "the_policy_forgets_the_reference",
        ETPO,
        "return _mean(beta * kl - value)",
        "return _mean(-value)",
        [T_ETPO + "the_loss_is_the_divergence_from_the_boltzmann_policy"],
    ),
)
