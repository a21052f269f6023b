"""Faults of the law of entropy and reward, of pass@k, and of rankings by solve rate."""

from tests.planted_faults.fault import Fault

LAW, METRICS, PROGRESS, RUN, SOLVES, EVALUATION, RANK, FIT = (
    f"entcov/{name}.py"
    for name in (
        "law", "rl/record/law_metrics", "rl/record/progress", "rl/run", "rl/solve_counts", "rl/evaluation",
        "rl/data/rank", "report/fit_law",
    )
)  # fmt: skip
T_LAW, T_METRICS, T_PROGRESS, T_RUN, T_SOLVES, T_EVALUATION, T_RANK, T_FIT = (
    f"tests/{name}.py::test_"
    for name in (
        "test_law", "rl/record/test_law_metrics", "rl/record/test_progress", "rl/test_run", "rl/test_solve_counts",
        "rl/test_evaluation", "rl/data/test_rank", "report/test_fit_law",
    )
)  # fmt: skip
OTHERS = "the ordinary suite tries others of these files"

FAULTS = (
    # ---- the fit -----------------------------------------------------------------------------------------------------
    Fault(
        "law_ignores_the_weights_of_entropy",
        LAW,
        "mean_x, mean_r = np.average(x, weights=weight)",
        "mean_x, mean_r = np.average(x)",
        [T_LAW + "a_weight_counts_like_repeated_points"],
        slow=OTHERS,
    ),
    Fault(
        "law_draws_points_instead_of_blocks",
        LAW,
        "int(min(max(1, math.ceil(best)), max(1, count // 5)))",
        "1",
        [T_LAW + "the_variance_is_that_of_drawn_blocks_of_residuals"],
    ),
    Fault(
        "law_takes_rho_of_a_short_series_as_it_is",
        LAW,
        "rho + (1 + 4 * rho) / len(residual)",
        "rho",
        [T_LAW + "without_autocorrelation_the_interval_is_the_textbooks"],
        slow=OTHERS,
    ),
    Fault(
        "law_forgets_what_blocks_miss",
        LAW,
        "    covariance = covariance * _missed_by_blocks(rho, block)\n",
        "",
        [
            T_LAW + "the_variance_is_that_of_drawn_blocks_of_residuals",
            T_LAW + "intervals_cover_what_their_docstring_says[0.8]",
        ],
        slow=OTHERS,
    ),
    Fault(
        "entropy_is_gone_at_a_tenth_of_itself",
        LAW,
        "math.log(math.log1p(left * math.expm1(start)))",
        "math.log(left * start)",
        [T_LAW + "entropy_that_falls_as_a_power_of_the_step_ends_where_it_says"],
        slow=OTHERS,
    ),
    Fault(
        "entropy_is_extrapolated_from_the_whole_run",
        LAW,
        "slice(len(at) // 2, None)",
        "slice(0, None)",
        [T_LAW + "entropy_that_does_not_fall_has_no_end"],
        slow=OTHERS,
    ),
    Fault(
        "forecast_error_has_the_wrong_sign",
        LAW,
        'predicted - _series("reward", reward, count=len(later))',
        '_series("reward", reward, count=len(later)) - predicted',
        [T_LAW + "the_errors_of_a_forecast_by_hand"],
        slow=OTHERS,
    ),
    # ---- in a run and after it ---------------------------------------------------------------------------------------
    Fault(
        "a_resumed_run_forgets_the_points_of_the_law",
        RUN,
        "self.law = LawMetrics(read_metrics(self.config.run_dir))",
        "self.law = LawMetrics()",
        [T_RUN + "the_law_of_a_run_that_goes_on_is_that_of_all_its_steps"],
    ),
    Fault(
        "a_step_recorded_twice_is_two_points_of_the_law",
        METRICS,
        "if not self._points or step > self._points[-1][0]:",
        "if True:",
        [T_METRICS + "they_are_the_fit_to_all_steps_so_far"],
        slow=OTHERS,
    ),
    Fault(
        "the_warning_stays_when_entropy_no_longer_falls",
        PROGRESS,
        '        self._last.pop("law/gone_step", None)  # absent where entropy does not fall\n',
        "",
        [T_PROGRESS + "a_warning_where_entropy_will_be_gone_before_the_last_step"],
        slow=OTHERS,
    ),
    Fault(
        "an_evaluation_goes_with_the_entropy_of_the_step_before",
        FIT,
        'later = 1 if pattern.startswith("val-") else 0',
        "later = 0",
        [T_FIT + "an_evaluation_goes_with_the_policy_that_the_next_step_begins_with"],
        slow=OTHERS,
    ),
    Fault(
        "fit_law_forecasts_what_it_was_fitted_to",
        FIT,
        "first.forecast(points.entropy[count:], points.reward[count:])",
        "first.forecast(points.entropy, points.reward)",
        [T_FIT + "the_command_prints_tables_and_writes_numbers_and_a_picture"],
        slow=OTHERS,
    ),
    # ---- solve counts ------------------------------------------------------------------------------------------------
    Fault(
        "pass_at_k_draws_with_replacement",
        SOLVES,
        "math.prod(1.0 - k / i for i in range(samples - solved + 1, samples + 1))",
        "(1.0 - solved / samples) ** k",
        [T_SOLVES + "pass_at_k_is_the_ratio_of_binomials", T_SOLVES + "pass_at_k_is_unbiased"],
    ),
    Fault(
        "a_response_that_is_half_right_solves_its_prompt",
        SOLVES,
        "append(rollout.reward >= RIGHT)",
        "append(rollout.reward > 0)",
        [T_SOLVES + "counts_of_an_evaluation_and_its_curve"],
        slow=OTHERS,
    ),
    Fault(
        "the_record_of_solve_counts_has_no_bound",
        SOLVES,
        "tuple(solved[:MOST_PROMPTS])",
        "tuple(solved)",
        [T_SOLVES + "the_record_is_bounded_and_its_histogram_is_of_all_prompts"],
        slow=OTHERS,
    ),
    Fault(
        "the_range_of_solve_rates_is_open_above",
        RANK,
        "if least <= count <= most]",
        "if least <= count < most]",
        [T_RANK + "the_command_writes_the_prompts_in_a_range_of_solve_rates"],
        slow=OTHERS,
    ),
    Fault(
        "stored_counts_outlive_another_right_answer",
        RANK,
        "(p.tokens, p.example.data_source, p.example.ground_truth)",
        "(p.tokens, p.example.data_source)",
        [T_RANK + "an_interrupted_count_of_right_responses_goes_on_where_it_stopped"],
        slow=OTHERS,
    ),
    Fault(
        "ranked_prompts_of_a_task_are_those_of_the_warm_start",
        RANK,
        "different_prompts(loop.stream, shown, prompts)",
        "different_prompts(loop.stream, 0, prompts)",
        [T_RANK + "prompts_of_a_task_are_ranked_once_each_and_after_the_warm_starts"],
        slow=OTHERS,
    ),
)
