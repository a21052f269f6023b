"""Faults of the plug-ins for slime, Megatron-LM's RL example and NeMo-RL."""

from tests.planted_faults.fault import Fault

PLUGIN, SLIME = "entcov/integrations/plugin.py", "entcov/integrations/slime.py"
MEGATRON, NEMO = "entcov/integrations/megatron_lm.py", "entcov/integrations/nemo_rl.py"
T_SLIME, T_MEGATRON = "tests/integrations/test_slime.py::test_", "tests/integrations/test_megatron_lm.py::test_"
T_NEMO = "tests/integrations/test_nemo_rl.py::test_"
T_ONE = "tests/integrations/test_divided_updates.py::test_updates_equal_those_of_one_process[1]"
T_TWO = "tests/integrations/test_divided_updates.py::test_updates_equal_those_of_one_process[2]"
SLOW = "processes that import Megatron-Core, ten seconds"

FAULTS = [
    Fault("plugins_a_changed_signature_passes", PLUGIN, "    if missing:", "    if False:",
          [T_NEMO + "a_changed_signature_is_named"]),
    Fault("plugins_a_replaced_name_stays", PLUGIN, "self.callback(setattr, owner, name, old)", "pass",
          [T_NEMO + "removal_leaves_nemo_rl_as_it_was"]),
    Fault("plugins_a_missing_state_begins_anew", "entcov/integrations/state_file.py", "raise FileNotFoundError(",
          "return dict(keys=", [T_NEMO + "a_resumed_run_goes_on_with_the_state"]),
    Fault("slime_the_second_update_selects_by_old_log_probabilities", SLIME, "if step_id and controlled.selects:",
          "if False:", [T_ONE], slow=SLOW),
    Fault("slime_a_removed_sample_is_not_in_the_divisor", SLIME, ".sum().clamp(min=1) for samples",
          ".sum() for samples", [T_ONE], slow=SLOW),
    Fault("slime_context_parallel_ranks_sum_over_their_part_of_a_response", SLIME,
          "if self.mpu.get_context_parallel_world_size() > 1:", "if False:", [T_TWO], slow=SLOW),
    Fault("slime_the_divisor_of_one_replica", SLIME,
          "dist.all_reduce(count, group=self.mpu.get_data_parallel_group(with_context_parallel=False))", "pass",
          [T_TWO], slow=SLOW),
    Fault("slime_samples_in_the_order_of_the_rollout", SLIME, "[order[i] for i in samples]",
          "list(range(len(samples)))", [T_ONE], slow=SLOW),
    Fault("slime_a_rollout_of_several_samples_passes", SLIME, "if not args.calculate_per_token_loss and int(",
          "if 0 and int(", [T_SLIME + "several_samples_of_one_rollout_need_the_mean_over_tokens"]),
    Fault("slime_the_loss_type_is_not_looked_at", SLIME, "args.loss_type != \"custom_loss\"\n", "False\n",
          [T_SLIME + "arguments_that_cannot_be_honoured"]),
    Fault("megatron_lm_the_second_update_selects_by_old_log_probabilities", MEGATRON,
          "(controlled.selects and (done or reads))", "(controlled.selects and reads)", [T_ONE], slow=SLOW),
    Fault("megatron_lm_the_divisor_of_one_replica", MEGATRON, "float(count * self.controlled.ranks)", "float(count)",
          [T_TWO], slow=SLOW),
    Fault("megatron_lm_the_vocabulary_is_gathered", MEGATRON, "(\"runtime_gather_output\", \"fp32_output\")",
          "(\"fp32_output\",)", [T_ONE], slow=SLOW),
    Fault("megatron_lm_padding_has_a_probability", MEGATRON, "group=group, vocab_size=self.vocab_size,", "group=group,",
          [T_ONE], slow=SLOW),
    Fault("megatron_lm_old_log_probabilities_in_bfloat16", MEGATRON, "**named | {\"dtype\": torch.float32}", "**named",
          [T_MEGATRON + "old_log_probabilities_are_float32"]),
    Fault("megatron_lm_a_packed_bin_has_one_position_count", MEGATRON,
          "torch.arange(row[0, at].numel(), device=device)", "torch.arange(at.start, at.stop, device=device)",
          [T_ONE], slow=SLOW),
    Fault("nemo_rl_a_masked_response_is_no_divisor", NEMO, "num_sequences=max(int(data[\"sample_mask\"].sum()), 1)",
          "num_sequences=rows", [T_NEMO + "equals_the_loss_of_the_whole_mini_batch"]),
    Fault("nemo_rl_several_updates_pass", NEMO, "rows != size,", "False,",
          [T_NEMO + "several_updates_a_rollout_are_refused"]),
    Fault("nemo_rl_columns_stay_in_the_trainers_data", NEMO, "del data[name]", "pass",
          [T_NEMO + "equals_the_loss_of_the_whole_mini_batch"]),
    Fault("nemo_rl_the_selection_is_a_token_late", NEMO, "torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)",
          "torch.cat([value, torch.zeros_like(value[:, :1])], dim=1)",
          [T_NEMO + "equals_the_loss_of_the_whole_mini_batch"]),
    Fault("nemo_rl_a_divided_sequence_passes", NEMO, "placement.is_shard() and placement.dim % 3 != 2", "False",
          [T_TWO], slow=SLOW),
]  # fmt: skip
