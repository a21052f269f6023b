"""Faults of the study of a premature style: styles told from responses, the curriculum, what is said of the phases."""

from tests.planted_faults.fault import Fault

STYLES, CURRICULUM, STUDY = (f"entcov/studies/{name}.py" for name in ("styles", "curriculum", "style_study"))
TEST = "tests/studies/test_style.py::test_"
OTHERS = "the ordinary suite tries others of this file"

FAULTS = (
    Fault(
        "carries_may_repeat_the_carry",
        STYLES,
        'return "carries" if [step.count("+") + 1 for step in steps] == counts else OTHER',
        'return "carries"',
        [TEST + "styles_are_told_from_the_form"],
    ),
    Fault(
        "adds_need_not_go_on_with_their_result",
        STYLES,
        "and begins[1:] == [result for _, result in sums[:-1]]",
        "",
        [TEST + "styles_are_told_from_the_form"],
        slow=OTHERS,
    ),
    Fault(
        "the_counts_of_styles_change_the_reward",
        STYLES,
        'f"{SHARE}/all": -1.0',
        'f"{SHARE}/all": 0.0',
        [TEST + "the_reward_is_that_of_the_task_and_its_components_count_styles"],
    ),
    Fault(
        "the_curriculum_begins_with_the_long_sums",
        CURRICULUM,
        'write_rows(short + self._sums("long", _TRAIN, self.long_prompts), files["train"])',
        'write_rows(self._sums("long", _TRAIN, self.long_prompts) + short, files["train"])',
        [TEST + "the_file_has_short_sums_and_then_long_ones"],
    ),
    Fault(
        "the_second_phase_alone_begins_with_the_first",
        CURRICULUM,
        "load_rows(whole)[-count:]",
        "load_rows(whole)[:count]",
        [TEST + "the_last_prompts_are_the_second_phase_alone"],
        slow=OTHERS,
    ),
    Fault(
        "the_curriculum_holds_out_sums_that_are_trained_on",
        CURRICULUM,
        '_sums(length, _TRAIN, self.held_out, "held_out")',
        "_sums(length, _TRAIN, self.held_out)",
        [TEST + "no_held_out_sum_is_trained_on"],
    ),
    Fault(
        "style_study_takes_the_style_of_the_beginning_as_the_preferred_one",
        STUDY,
        "ends = [phases(plan, run)[0][-WINDOW:] for",
        "ends = [phases(plan, run)[0][:WINDOW] for",
        [TEST + "the_preferred_style_is_that_of_the_end_of_the_first_phase"],
    ),
    Fault(
        "style_study_calls_every_phase_reached",
        STUDY,
        "if reward >= REACHED), None)",
        "if reward >= 0), None)",
        [TEST + "values_of_a_run"],
    ),
    Fault(
        "style_study_counts_steps_from_the_first_phase",
        STUDY,
        "return steps[:-second], steps[-second:]",
        "return steps[:-second], steps",
        [TEST + "phases_are_parted_where_the_file_changes"],
        slow=OTHERS,
    ),
)
