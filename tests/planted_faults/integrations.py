"""Faults of the class that the plug-ins share."""

from tests.planted_faults.fault import Fault

CONTROLLED, GATHER, REMEMBERED = (
    f"entcov/integrations/{name}.py" for name in ("controlled_loss", "gather", "remembered")
)
T = "tests/integrations/test_controlled_loss.py::test_"
DTENSOR, EXAMPLE = "entcov/integrations/dtensor.py", "examples/fsdp2_loop.py"
T_DTENSOR, T_EXAMPLE = (
    "tests/integrations/test_dtensor.py::test_on_two_ranks",
    "tests/test_examples.py::test_fsdp2_loop",
)

FAULTS = [
    Fault("ControlledLoss_the_step_of_a_draw_does_not_move_on", CONTROLLED, "self.updates += 1", "self.updates += 0",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_the_selection_of_the_rollout_is_not_applied", REMEMBERED,
          "return tokens.loss_mask & self.chosen[name][self._places(tokens)]",
          "return tokens.loss_mask & ~self.chosen[name][self._places(tokens)]",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_dropped_tokens_stay", REMEMBERED, "= tokens.loss_mask & ~self.drop[at]", "= tokens.loss_mask",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_responses_keep_the_length_that_they_had_before_tokens_were_dropped", REMEMBERED,
          "tokens.sequence_length if tokens.sequence_length is None else self.length[at]", "tokens.sequence_length",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_shaped_advantages_are_forgotten", CONTROLLED,
          "tokens if self._remembered is None else self._remembered.applied_to(tokens)", "tokens",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_entropies_of_the_rollout_in_another_order", REMEMBERED, "[own.loss_mask][order] if comparing",
          "[own.loss_mask] if comparing", [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_a_rank_that_cannot_remember_leaves_the_others_waiting", CONTROLLED,
          "None if failure else rollout.loss_mask", "rollout.loss_mask", [T + "a_rank_that_fails_is_an_error_on_all"],
          slow="the other rank waits for a minute"),
    Fault("ControlledLoss_metrics_of_one_rank_alone", CONTROLLED,
          "            dist.all_reduce(values, group=self.group)", "            pass",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_means_of_the_step_weigh_updates_not_tokens", CONTROLLED,
          "self._updated[name] += value * count", "self._updated[name] += value",
          [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("ControlledLoss_the_trainer's_number_of_responses_is_ignored", CONTROLLED,
          "totals = Totals(totals.num_tokens, num_sequences)", "pass",
          [T + "the_divisor_of_a_trainer_that_counts_empty_responses"]),
    Fault("ControlledLoss_a_refused_state_stays_half_loaded", CONTROLLED,
          "control.load_state_dict(old)", "pass", [T + "a_state_that_is_refused_changes_nothing"]),
    Fault("ControlledLoss_micro-batches_in_another_order", CONTROLLED,
          "if not torch.equal(given, tokens.token_id):", "if False:", [T + "wrong_calls"]),
    Fault("ControlledLoss_a_rank_that_failed_does_not_enter_the_collective", CONTROLLED,
          "elif failure is not None:", "elif False:", [T + "a_rank_that_fails_is_an_error_on_all"],
          slow="the other rank waits for a minute"),
    Fault("gather_tokens_in_the_order_of_the_ranks", GATHER, 'order = table["token_id"].argsort(stable=True)',
          'order = torch.arange(len(table["token_id"]))', [T + "any_division_trains_as_the_undivided_loop"]),
    Fault("gather_tokens_repeated_ids_pass", GATHER, "    if repeated:", "    if False:", [T + "wrong_calls"]),
    Fault("vocab_shard_starts_as_if_the_shards_were_even", DTENSOR, "each = -(-columns // ranks)",
          "each = columns // ranks", [T_DTENSOR], slow="two processes"),
    Fault("vocab_shard_takes_partial_sums_for_values", DTENSOR,
          "if any(placement.is_partial() for placement in placements):", "if False:", [T_DTENSOR],
          slow="two processes"),
    Fault("vocab_shard_takes_the_group_of_another_mesh_dimension", DTENSOR, "mesh.get_group(own[0])",
          "mesh.get_group(0)", [T_DTENSOR], slow="two processes"),
    Fault("the_example_trains_with_half_of_the_gradient", EXAMPLE, "(loss * controlled.ranks).backward()",
          "loss.backward()", [T_EXAMPLE], slow="three processes"),
    Fault("the_example_numbers_the_tokens_of_every_rank_alike", EXAMPLE,
          "torch.arange(row[0] * LENGTH, (row[-1] + 1) * LENGTH)", "torch.arange(len(row) * LENGTH)", [T_EXAMPLE],
          slow="three processes"),
    Fault("a_skip_where_the_trainer_should_be_passes", "tests/integrations/conftest.py",
          "if ENVIRONMENT is not None and report.skipped:", "if False:",
          ["tests/integrations/test_environment.py::test_a_skip_in_an_environment_of_a_trainer_is_a_failure"]),
    Fault("a_file_that_is_skipped_as_a_whole_passes", "tests/integrations/conftest.py",
          "def pytest_make_collect_report():\n    return no_skip((yield))",
          "def pytest_make_collect_report():\n    return (yield)",
          ["tests/integrations/test_environment.py::test_a_skip_in_an_environment_of_a_trainer_is_a_failure"]),
]  # fmt: skip
