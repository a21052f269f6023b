"""Faults of the record of responses and of the report's page."""

from tests.planted_faults.fault import Fault

RECORD, LENS, PAGE, PLOTS, ACTOR, LOOP, RUN = (
    f"entcov/{name}.py"
    for name in (
        "rl/record/token_record", "report/token_lens", "report/page", "report/plots", "rl/actor", "rl/loop", "rl/run",
    )
)  # fmt: skip
T_RECORD, T_PAGE = "tests/rl/record/test_token_record.py::test_", "tests/report/test_page.py::test_"
BY_HAND, BOUNDS = T_RECORD + "a_step_by_hand", T_RECORD + "what_clip_cov_chose_are_the_tokens_in_its_bounds"
HOSTILE, SEEDS = T_PAGE + "text_of_models_is_text", T_PAGE + "seeds_are_one_label_and_the_lens_has_every_run"
RESUMED = "tests/rl/test_run.py::test_a_resumed_run_continues_bit_for_bit[clip_cov]"

FAULTS = (
    # ---- the record --------------------------------------------------------------------------------------------------
    Fault("selections_are_not_told", ACTOR, "if self.on_selection is not None:", "if False:", [BOUNDS]),
    Fault(
        "watched_tokens_are_taken_by_place",
        RECORD,
        "at = torch.searchsorted(self.ids, token_id).clamp(max=len(self.ids) - 1)",
        "at = torch.arange(len(token_id), device=token_id.device).clamp(max=len(self.ids) - 1)",
        [BY_HAND, BOUNDS],
    ),
    Fault(
        "a_later_update_forgets_what_an_earlier_one_chose",
        RECORD,
        "mask[where] |= part.cpu()[known] != 0",
        "mask[where] = part.cpu()[known] != 0",
        [T_RECORD + "a_token_counts_as_chosen_if_one_update_chose_it"],
    ),
    Fault(
        "weights_choose_nothing",
        RECORD,
        "(control, selection.weight), ",
        "",
        [BY_HAND],
    ),
    Fault(
        "log_probability_after_is_that_before",
        LOOP,
        'self.watched.updated(self.actor.compute_logprobs(self.watched.batch)["logprob"], self',
        "self.watched.updated(self.watched.batch.old_logprob, self",
        [BY_HAND, BOUNDS],
    ),
    Fault(
        "solve_counts_of_the_chosen_responses_alone",
        RECORD,
        "self._solved(rollouts), batch.subset(chosen)",
        "self._solved([rollouts[i] for i in chosen]), batch.subset(chosen)",
        [BY_HAND],
    ),
    Fault(
        "records_are_not_thinned",
        RECORD,
        "        stride *= 2\n",
        "        break\n",
        [T_RECORD + "the_record_is_bounded"],
    ),
    Fault(
        "files_are_not_cut",
        RECORD,
        "if len(data) <= budget or not limit:",
        "if True:",
        [T_RECORD + "the_record_is_bounded"],
    ),
    Fault(
        "records_after_the_checkpoint_stay",
        RECORD,
        "if number > step:",
        "if False:",
        [T_RECORD + "the_record_is_bounded"],
    ),
    Fault(
        "the_last_record_stays_when_the_run_goes_on",
        RECORD,
        "if number != step and not is_kept(number, step, self._every(split)):",
        "if False:",
        [RESUMED],
    ),
    Fault(
        "half_a_character_is_a_text_of_its_own",
        RECORD,
        'if text.endswith("\\ufffd") and',
        "if False and",
        [T_RECORD + "texts_of_tokens_join_to_the_text"],
    ),
    Fault(
        "every_rank_writes_the_record",
        RUN,
        "_token_record(config, loop, run_dir if backend.is_rank0 else None)",
        "_token_record(config, loop, None)",
        [BOUNDS],
    ),
    # ---- the page ----------------------------------------------------------------------------------------------------
    Fault("data_ends_its_element", LENS, '.replace("<", "\\\\u003c")', "", [HOSTILE]),
    Fault("labels_are_markup", PAGE, "return html.escape(visible(text))", "return visible(text)", [HOSTILE]),
    Fault(
        "what_cannot_be_seen_stays",
        LENS,
        'if unicodedata.category(character)[0] == "C" or',
        "if False or",
        [HOSTILE, T_PAGE + "what_cannot_be_seen_is_named"],
    ),
    Fault(
        "any_script_may_run",
        PAGE,
        "script-src '{_hash(script)}'",
        "script-src 'unsafe-inline'",
        [T_PAGE + "nothing_is_loaded_and_the_policy_names_what_runs"],
    ),
    Fault("change_is_turned_round", LENS, "_short(a - b)", "_short(b - a)", [SEEDS]),
    Fault(
        "the_page_is_written_in_place",
        PAGE,
        "atomic_write(out, page.encode())",
        "out.write_bytes(page.encode())",
        [T_PAGE + "the_file_is_replaced_in_one_step"],
    ),
    Fault(
        "the_lens_takes_what_it_wants",
        LENS,
        "if len(to_json(data)) <= max_bytes or stride > total:",
        "if True:",
        [T_PAGE + "the_lens_is_cut_to_what_is_left_of_the_page"],
    ),
    Fault(
        "held_out_accuracy_of_one_source",
        PLOTS,
        "sum(values) / len(values) for name, values",
        "values[0] for name, values",
        [T_PAGE + "a_panel_has_seeds_and_their_mean_and_held_out_accuracy_over_sources"],
    ),
)
