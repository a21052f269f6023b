"""Faults of the TRL plug-in. Its tests need trl: `.venv-trl/bin/python -m tests.planted_faults --only trl_`."""

from tests.planted_faults.fault import Fault

HERE = "entcov/integrations/trl/"
T = "tests/integrations/trl/test_"
TRAINER, HEAD, KEYS = (f"{T}{name}.py::test_" for name in ("trainer", "head", "keys"))
LAYOUTS = TRAINER + "every_layout_chooses_the_same_tokens_and_trains_alike"
PLAIN = TRAINER + "without_controls_the_loss_and_the_metrics_are_trl_s"
COLUMNS = HEAD + "the_columns_and_their_gradients"
SLOW = "trl takes six seconds to import"


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(f"trl_{name}", HERE + file, old, new, tests, SLOW, package="trl")


FAULTS = [
    fault("rows_are_numbered_on_each_process_alone", "trainer.py", "first = self.accelerator.process_index * rows",
          "first = 0", LAYOUTS),
    fault("the_selection_is_that_of_one_process", "trainer.py",
          "group=dist.group.WORLD if self.accelerator.num_processes > 1 else None", "group=None", LAYOUTS),
    fault("the_loss_is_not_multiplied_by_the_processes", "trainer.py",
          "loss * self._scales[self._micro] * self.accelerator.num_processes", "loss * self._scales[self._micro]",
          LAYOUTS),
    fault("responses_of_one_process_are_counted", "trainer.py",
          'for batch in self._window) * self.accelerator.num_processes', "for batch in self._window)",
          TRAINER + "two_processes_count_the_responses_of_both"),
    fault("dapo_divides_by_the_mini-batch's_own_tokens", "trainer.py", 'not in ("dapo", "cispo", "vespo", "bnpo")',
          'not in ("cispo", "bnpo")', PLAIN),
    fault("bnpo_divides_by_the_mini-batch's_tokens", "trainer.py", 'if self.loss_type == "bnpo":', "if False:", PLAIN),
    fault("the_tokens_of_tools_are_trained_on", "trainer.py",
          'return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask', "return mask",
          PLAIN),
    fault("later_updates_select_by_the_scored_policy", "trainer.py",
          "scored is not None and self.state.global_step == self._scored_at", "scored is not None",
          TRAINER + "passes_without_gradient"),
    fault("the_first_update_always_makes_a_pass", "trainer.py",
          "scored is not None and self.state.global_step == self._scored_at", "False",
          TRAINER + "passes_without_gradient"),
    fault("the_controls'_state_is_not_restored", "trainer.py",
          'self._controlled.load_state_dict(state["loss"])', 'state["loss"]',
          TRAINER + "a_resumed_run_is_the_uninterrupted_one"),
    fault("the_number_of_the_rollout_is_not_restored", "trainer.py", 'self._rollouts = state["rollouts"]',
          'state["rollouts"]', TRAINER + "a_resumed_run_is_the_uninterrupted_one"),
    Fault("trl_the_state_is_written_in_place", "entcov/integrations/state_file.py",
          'with open(temporary, "w") as file:', 'with open(path, "w") as file:',
          [TRAINER + "the_state_is_written_at_once_or_not_at_all"], SLOW, package="trl"),
    fault("the_controls_never_adapt_to_the_step", "trainer.py", "if self._updates_left == 0:", "if False:",
          TRAINER + "a_resumed_run_is_the_uninterrupted_one"),
    fault("the_group_of_a_response_is_the_response", "trainer.py", "group=of_row(row // self.num_generations)",
          "group=of_row(row)", TRAINER + "what_begin_is_shown"),
    fault("rewards_of_another_row", "trainer.py", 'rewards).flatten()[batch["entcov_row"]]',
          'rewards).flatten().flip(0)[batch["entcov_row"]]', TRAINER + "what_begin_is_shown"),
    fault("the_gathered_head_loses_other_ranks'_gradients", "fsdp_head.py",
          'full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)', "full_tensor()",
          TRAINER + "the_head_s_gradient_under_fsdp2"),
    fault("the_temperature_is_left_out", "head.py", "temperature=self.temperature", "temperature=1.0", COLUMNS),
    fault("scaled_logits_are_taken_for_plain_ones", "head.py",
          "if scaled or routed or", "if routed or", COLUMNS),
    fault("the_head's_bias_is_left_out", "head.py", "linear_token_stats, hidden, weight, target, bias=bias)",
          "linear_token_stats, hidden, weight, target)", COLUMNS),
    fault("a_head_in_float32_gets_bf16", "head.py", "hidden.float(), weight",
          "hidden.float().bfloat16(), weight.bfloat16()", HEAD + "a_head_in_float32"),
    fault("the_auxiliary_loss_is_lost", "head.py", 'getattr(outputs, "aux_loss", None)', "None",
          HEAD + "the_auxiliary_loss_is_trl_s"),
    fault("the_correction_of_the_kl_is_left_out", "reference_kl.py", "if self.corrected else kl", "if False else kl",
          TRAINER + "the_kl_term_is_trl_s"),
    fault("cispo's_bound_is_an_epsilon", "keys.py", '"clip_high": high - 1', '"clip_high": high', PLAIN),
    fault("a_refused_key_is_ignored", "keys.py", "            if value != field.default:", "            if False:",
          KEYS + "a_key_that_has_no_meaning_here_is_refused_before_a_model_is_loaded"),
    fault("a_mini-batch_of_two_generation_batches_is_accepted", "keys.py", "    if steps % accumulation:",
          "    if False:",
          KEYS + "a_key_that_has_no_meaning_here_is_refused_before_a_model_is_loaded"),
    fault("the_importance_weight_is_always_by_tokens", "keys.py", '"tis_level": level', '"tis_level": "token"',
          KEYS + "the_importance_weight_of_vllm"),
]  # fmt: skip
