"""Faults of the studies of training runs: their plans, the benchmark's sets, what is chosen and what is said."""

from tests.planted_faults.fault import Fault

PLAN, TRAINING, PROMPTS, LAW, RULES = (
    f"entcov/{name}.py"
    for name in ("studies/plan", "studies/training", "studies/hard_prompts", "studies/law_study", "rl/rewards/rules")
)
T_PLAN, T_TRAINING, T_PROMPTS, T_LAW = (
    f"tests/studies/test_{name}.py::test_" for name in ("plan", "training", "hard_prompts", "law_study")
)
MANY_ARMS = T_TRAINING + "many_arms_are_named_where_they_differ_from_their_baseline"

FAULTS = (
    Fault(
        "study_reports_the_seeds_that_chose",
        PLAN,
        "{*self.choosing_seeds, *self.prompts.own_seeds} & set(self.seeds)",
        "{*self.prompts.own_seeds} & set(self.seeds)",
        [T_PLAN + "a_bad_plan_is_refused"],
    ),
    Fault(
        "study_forgets_the_baselines_of_its_arms",
        PLAN,
        "            wanted |= more\n",
        "            break\n",
        [T_PLAN + "an_arm_takes_its_baselines_with_it"],
    ),
    Fault(
        "study_chooses_the_worst_strength",
        TRAINING,
        "values.index(max(values))",
        "values.index(min(values))",
        [T_TRAINING + "strengths_are_chosen_on_the_choosing_seed_alone"],
    ),
    Fault(
        "study_reports_the_first_strength_and_not_the_chosen_one",
        TRAINING,
        "chosen.get(arm, {}), seed, folder)",
        "plan.candidates.get(arm, [{}])[0], seed, folder)",
        [T_TRAINING + "strengths_are_chosen_on_the_choosing_seed_alone"],
        slow="the one above has the same tests",
    ),
    Fault(
        "study_says_higher_whatever_the_interval",
        TRAINING,
        'if difference.excludes_zero else "not told apart"',
        'if True else "not told apart"',
        [T_TRAINING + "statements_follow_the_intervals"],
    ),
    Fault(
        "studies_runs_all_start_from_one_policy",
        TRAINING,
        "plan.prompts.model(bench, seed)",
        "plan.prompts.model(bench, plan.prompts.ranked_by)",
        [T_TRAINING + "runs_get_the_policy_and_the_prompts_of_their_seed_and_arm"],
    ),
    Fault(
        "held_out_prompts_are_trained_on",
        PROMPTS,
        "own[self.held_out : self.held_out + self.train]",
        "own[: self.train]",
        [T_PROMPTS + "the_sets_share_no_prompt_of_training_and_evaluation"],
    ),
    Fault(
        "sparse_prompts_are_those_solved_once",
        PROMPTS,
        "if c == 0]",
        "if c == 1]",
        [T_PROMPTS + "the_sets_share_no_prompt_of_training_and_evaluation"],
        slow="the one above has the same tests",
    ),
    Fault(
        "a_part_of_a_task_has_no_reward",
        RULES,
        'name = rest.partition("/")[0]',
        "name = rest",
        [T_PROMPTS + "evaluated_prompts_have_a_source_of_their_own_and_the_same_reward"],
    ),
    Fault(
        "a_studys_page_names_the_last_commit_alone",
        "entcov/studies/page.py",
        "makers = known if own in known else [*known, own]",
        "makers = [own]",
        ["tests/studies/test_page.py::test_a_page_names_every_commit_that_worked_on_it"],
    ),
    Fault(
        "a_commit_that_made_no_run_is_named_among_those_that_did",
        "entcov/studies/page.py",
        "if made_nothing and known:",
        "if False:",
        ["tests/studies/test_page.py::test_a_commit_that_makes_nothing_but_the_page_is_named_apart"],
    ),
    Fault(
        "every_arm_of_many_is_named",
        "entcov/studies/figures.py",
        "    if len(rows) <= _NAMED:\n",
        "    if True:\n",
        [MANY_ARMS],
    ),
    Fault(
        "the_overview_has_every_arm",
        "entcov/studies/figures.py",
        "for arm, runs in rows.items() if arm not in left_out",
        "for arm, runs in rows.items()",
        [MANY_ARMS],
    ),
    Fault(
        "accuracy_on_training_prompts_is_drawn_as_held_out",
        "entcov/studies/figures.py",
        'if not key.startswith("val-core/") or "/held_out/" in key',
        "if True",
        ["tests/studies/test_training.py::test_accuracies_of_training_prompts_are_not_drawn_as_held_out"],
    ),
    Fault(
        "legends_of_long_names_are_wider_than_the_figure",
        "entcov/report/plots.py",
        "if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:",
        "if True:",
        ["tests/report/test_plots.py::test_the_legend_covers_no_panel_and_is_in_the_figure[20]"],
    ),
    Fault(
        "the_overview_says_nothing_of_the_arms_that_it_leaves_out",
        "entcov/studies/figures.py",
        "    if left_out:\n",
        "    if False:\n",
        [MANY_ARMS],
    ),
    Fault(
        "each_policy_has_temperature_1_and_not_its_best",
        "entcov/studies/temperature.py",
        "max(TEMPERATURES, key=lambda t, own=own: fmean(own[t]))",
        "1.0",
        ["tests/studies/test_temperature.py::test_each_policy_has_its_best_temperature"],
    ),
    Fault(
        "law_study_takes_every_steps_point_alone",
        LAW,
        "series[i : i + count].mean()",
        "series[i]",
        [T_LAW + "points_are_means_of_successive_steps"],
    ),
    Fault(
        "law_study_calls_a_failed_forecast_right",
        LAW,
        'return "too high" if sum(errors) > 0 else "too low"',
        'return "neither too high nor too low"',
        [T_LAW + "a_forecast_that_fails_is_said_to"],
    ),
)
