"""Faults of the diagnostics and of their plots."""

from tests.planted_faults.fault import Fault

DIAGNOSTICS, ANSWERS, LOOP, ACTOR, SOLVES, PLOTS, PAGE = (
    f"entcov/{name}.py"
    for name in (
        "diagnostics", "rl/answers", "rl/loop", "rl/actor", "rl/solve_counts", "report/diagnostics", "report/page",
    )
)  # fmt: skip
T = "tests/test_diagnostics.py::test_"
T_ANSWERS, T_PLOTS = "tests/rl/test_answers.py::test_", "tests/report/test_diagnostics.py::test_"
CLASSES, POSITIONS = T + "token_classes_by_hand", T + "entropy_by_position_by_hand"
EXPECTED = T + "the_expected_prediction_is_the_covariance_of_the_logits_change"
ANSWERED, CALIBRATED = T + "group_answers_by_hand", T + "calibration_by_hand"
STEP = "tests/rl/test_loop.py::test_one_step_by_hand"
CHANGE = "tests/rl/test_loop.py::test_the_entropy_change_is_that_of_tokens_that_no_earlier_update_was_trained_on"
UPDATE = "tests/rl/hf/test_actor.py::test_the_entropy_change_is_measured_before_the_tokens_own_update"

FAULTS = (
    Fault(
        "the_top_share_is_rounded_down",
        DIAGNOSTICS,
        "math.ceil(round(share * len(largest), 6))",
        "max(1, int(share * len(largest)))",
        [T + "top_covariance_against_sorting_in_float64"],
    ),
    Fault(
        "the_smallest_covariances_are_the_top",
        DIAGNOSTICS,
        "largest = covariance.sort(descending=True)",
        "largest = covariance.sort()",
        [T + "top_covariance_by_hand"],
    ),
    Fault(
        "tokens_of_no_advantage_are_rewarded",
        DIAGNOSTICS,
        "number = torch.where(advantage == 0, len(CLASSES), number)",
        "pass",
        [CLASSES],
    ),
    Fault(
        "a_likely_token_is_unlikely",
        DIAGNOSTICS,
        "(logprob < math.log(likely))",
        "(logprob <= math.log(likely))",
        [CLASSES],
    ),
    Fault("changes_of_classes_cancel", DIAGNOSTICS, "sums / sums.abs().sum()", "sums / sums.sum()", [CLASSES]),
    Fault(
        "a_place_is_its_beginning",
        DIAGNOSTICS,
        "bins * (2 * position + 1)",
        "bins * (2 * position)",
        [POSITIONS, STEP],
    ),
    Fault(
        "float_sums_depend_on_the_order",
        DIAGNOSTICS,
        "    return from_fixed_point(sums) + 0.0 * value.sum()",
        "    number = torch.zeros(len(value), dtype=torch.int64) if number is None else number\n"
        "    return torch.zeros(count, dtype=value.dtype).index_add_(0, number, value).squeeze()",
        [T + "no_order_of_the_tokens_changes_a_bit_and_the_metrics_are_complete"],
    ),
    Fault(
        "the_prediction_is_the_measurement", DIAGNOSTICS, ".exp() * error, measured", ".exp() * 0, measured", [EXPECTED]
    ),
    Fault(
        "the_sampler_s_policy_is_forgotten",
        DIAGNOSTICS,
        "measured + (old_logprob - rollout_logprob.double()).exp() * error",
        "measured + error",
        [EXPECTED, UPDATE],
    ),
    Fault(
        "first_order_noise",
        DIAGNOSTICS,
        "(d.expm1() - d) + d.expm1() * d",
        "(d.expm1() - d) - d.expm1() * d",
        [EXPECTED],
    ),
    Fault(
        "the_last_of_equal_answers_counts",
        DIAGNOSTICS,
        "max(own.values(), key=len, default=[])",
        "max(reversed(own.values()), key=len, default=[])",
        [ANSWERED],
    ),
    Fault(
        "responses_without_an_answer_do_not_count",
        DIAGNOSTICS,
        "len(most) / size,",
        "len(most) / max(1, sum(map(len, own.values()))),",
        [ANSWERED],
    ),
    Fault(
        "bins_are_open_above",
        DIAGNOSTICS,
        "torch.bucketize(confidence.double(), edges)",
        "torch.bucketize(confidence.double(), edges, right=True)",
        [CALIBRATED],
    ),
    Fault("errors_of_bins_cancel", DIAGNOSTICS, "abs(accuracy - confidence)", "(accuracy - confidence)", [CALIBRATED]),
    Fault(
        "groups_without_variance_are_solved",
        DIAGNOSTICS,
        "none, whole = int((count == 0).sum()), int((count == size).sum())",
        "none, whole = 0, int(((count == size) | (count == 0)).sum())",
        [T + "solved_shares_by_hand"],
    ),
    Fault(
        "texts_have_a_confidence",
        ANSWERS,
        "return rollout.text, False",
        "return rollout.text, True",
        [T_ANSWERS + "answers_of_a_rule_and_texts_without_one", STEP],
    ),
    Fault(
        "the_first_update_counts",
        LOOP,
        "(number and not epoch)",
        "not epoch",
        [CHANGE],
    ),
    Fault("tokens_that_were_trained_on_count", LOOP, "(number and not epoch)", "number", [CHANGE]),
    Fault(
        "the_old_entropy_is_the_new_one", ACTOR, "old_entropy=micro.entropy[at]", "old_entropy=stats.entropy", [UPDATE]
    ),
    Fault(
        "reliability_is_not_read_back",
        SOLVES,
        'if "distinct" in state:',
        "if False:",
        [T_ANSWERS + "an_evaluation_logs_and_keeps_them"],
    ),
    Fault(
        "the_end_of_the_run_is_its_middle",
        PLOTS,
        "for at in (0, middle, len(steps) - width)",
        "for at in (0, middle, middle)",
        [T_PLOTS + "the_panels_hold_the_logged_numbers"],
    ),
    Fault(
        "reliability_is_turned_round",
        PLOTS,
        "size, x, y = np.array(sure.bins).T",
        "size, y, x = np.array(sure.bins).T",
        [T_PLOTS + "reliability_of_the_first_evaluation_and_the_last_one"],
    ),
    Fault(
        "the_page_has_no_diagnostics",
        PAGE,
        "if diagnosed := _diagnostics(runs):",
        "if diagnosed := '':",
        [T_PLOTS + "a_page_has_the_panels_of_every_label"],
    ),
)
