"""Faults of the verl plug-in. Its tests need verl: `.venv-verl/bin/python -m tests.planted_faults --only verl`."""

from tests.planted_faults.fault import Fault

HERE = "entcov/integrations/verl/"
T = "tests/integrations/verl/test_"
TRAINING, SETTINGS, STORED, LOADING = (T + f"{name}.py::test_" for name in (
    "training", "configuration", "checkpoint", "loading"))  # fmt: skip
DIVISIONS = TRAINING + "a_control_acts_and_no_division_changes_it[clip_cov]"
ORDERS = TRAINING + "single_sequences_dynamic_batches_and_other_orders_of_rows"
SLOW = "verl takes ten seconds to import"


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(f"verl_{name}", HERE + file, old, new, tests, SLOW, package="verl")


FAULTS = [
    fault("the_micro_batch_takes_another_s_tokens", "training.py", "self.places[row] for row in data[ROW].tolist()",
          "self.places[row] for row in sorted(self.places)[: len(data)]", DIVISIONS),
    fault("a_loss_that_is_averaged_over_ranks_is_not_multiplied", "training.py", 'loss * data["dp_size"]', "loss * 1",
          TRAINING + "two_data_parallel_ranks_train_like_one"),
    fault("the_selection_is_that_of_one_rank", "training.py", "group=engine.get_data_parallel_group()", "group=None",
          TRAINING + "two_data_parallel_ranks_train_like_one"),
    fault("later_updates_select_by_the_scored_policy", "engine.py", "self.training.weights_changed()", "pass",
          TRAINING + "a_pass_is_made_only_where_a_control_selects_under_weights_that_nothing_has_scored"),
    fault("the_first_update_never_reads_the_scoring_pass", "training.py",
          "known = (controlled.begins or controlled.selects) and self._all_know(data)", "known = False",
          TRAINING + "a_pass_is_made_only_where_a_control_selects_under_weights_that_nothing_has_scored"),
    fault("denominators_leave_out_empty_responses", "training.py", "num_sequences=sequences)", "num_sequences=None)",
          TRAINING + "every_aggregation_has_verls_denominators"),
    fault("metrics_of_verl_are_not_means_of_micro_batches", "training.py", "* share for name", "for name",
          TRAINING + "no_control_is_verls_vanilla_loss"),
    fault("a_preset_s_objective_is_forgotten", "config.py", 'objective = published["objective"]', "pass",
          SETTINGS + "published_presets"),
    fault("knobs_of_the_objective_are_left_out", "config.py", "    } | own\n", "    }\n",
          SETTINGS + "knobs_of_an_objective_that_verl_has_no_key_for"),
    fault("a_preset_s_advantage_is_forgotten", "config.py", 'if "advantage" in setting:', "if False:",
          SETTINGS + "published_presets"),
    fault("importance_weights_are_left_out", "training.py", "else weights[mask].float()", "else None",
          TRAINING + "rollout_importance_weights_scale_the_policy_gradient"),
    fault("sequences_are_numbered_by_their_place", "rollout.py", "order = sorted(", "order = list(",
          ORDERS),
    fault("a_stage_without_outputs_makes_no_pass", "training.py",
          "if controlled.selects and self._scored is None:",
          "if controlled.selects and self._scored is None and self.has_outputs:",
          TRAINING + "a_pipeline_stage_without_outputs_takes_part_in_the_passes_and_nothing_else"),
    fault("the_state_is_rank_0s", "checkpoint.py", "state for state in states if state is not None",
          'state or {"step": 0, "loss": {}} for state in states',
          TRAINING + "the_state_is_that_of_the_ranks_that_have_the_models_outputs"),
    fault("the_step_is_not_restored", "training.py", 'self.step, self._scored = state["step"], None', "pass",
          STORED + "a_resumed_run_continues_bit_for_bit"),
    fault("the_state_is_not_restored", "engine.py", "checkpoint.restore(self.training, state, local_path)", "pass",
          STORED + "a_resumed_run_continues_bit_for_bit"),
    fault("verls_keys_are_ignored", "config.py", "for knob in VERLS_KNOBS.get(name, ())", "for knob in ()",
          SETTINGS + "one_key_is_enough"),
    fault("the_published_clip_is_not_asked_for", "config.py", "if value is not None and got != value:", "if False:",
          SETTINGS + "published_presets"),
    fault("any_loss_function_will_do", "worker.py", "if loss_function.func is not ppo_loss:", "if False:",
          SETTINGS + "another_loss_function_or_engine_is_refused"),
    fault("uninstall_leaves_the_names_of_losses", "loss.py", "registry.pop(mode, None)", "None",
          LOADING + "into_verl_and_out_of_it"),
    fault("a_failed_hook_is_forgotten", "hooks.py", "            _failure = reason", "            pass",
          LOADING + "into_verl_and_out_of_it"),
    fault("the_package_imports_verls_configuration", "__init__.py", "\ninstall()\n",
          "\nimport verl.workers.config\n\ninstall()\n",
          LOADING + "import_verl_imports_no_module_of_verl_or_others_for_the_plugin"),
]  # fmt: skip
