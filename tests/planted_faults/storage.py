"""Faults of what is written: durable files, checkpoints, the metrics record, data files; and of tasks and rewards."""

from tests.planted_faults.fault import Fault

DURABLE, CHECKPOINT, METRICS, DATA, REWARDS = (
    f"entcov/rl/{name}.py" for name in ("durable", "checkpoint", "metrics", "data", "rewards")
)
TASK = "entcov/rl/tasks/base.py"
T_CHECKPOINT, T_METRICS, T_DATA, T_TASKS, T_REWARDS = (
    f"tests/test_{name}.py" for name in ("checkpoint", "metrics", "data", "tasks", "rewards")
)

FAULTS = (
    Fault("replaced_file_is_not_forced_to_the_disk", DURABLE, "            write_all(fd, data)\n            os.fsync(fd)\n", "            write_all(fd, data)\n", [T_CHECKPOINT, T_METRICS]),
    Fault("replaced_name_is_not_forced_to_the_disk", DURABLE, "    fsync_path(path.parent)\n", "", [T_CHECKPOINT, T_METRICS]),
    Fault("fsync_path_forces_nothing", DURABLE, "    try:\n        os.fsync(fd)\n    finally:", "    try:\n        pass\n    finally:", [T_CHECKPOINT, T_METRICS]),
    Fault("file_is_written_in_place", DURABLE, 'temporary = path.with_name(f".tmp_{path.name}.{os.getpid()}")', "temporary = path", [T_CHECKPOINT, T_METRICS]),
    Fault("short_writes_lose_the_rest", DURABLE, "view = view[os.write(fd, view) :]", "view = view[max(len(view), os.write(fd, view)) :]", [T_CHECKPOINT, T_METRICS]),
    Fault("failed_write_leaves_its_temporary_file", DURABLE, "        temporary.unlink(missing_ok=True)\n", "", [T_CHECKPOINT, T_METRICS]),
    Fault("checkpoint_files_are_not_forced_to_the_disk", CHECKPOINT, "            fsync_path(current)\n", "            pass\n", [T_CHECKPOINT]),
    Fault("folders_in_a_checkpoint_are_not_forced_to_the_disk", CHECKPOINT, "            fsync_path(folder)\n", "            pass\n", [T_CHECKPOINT]),
    Fault("checkpoint_folder_is_not_forced_to_the_disk", CHECKPOINT, "        fsync_path(temporary)\n", "", [T_CHECKPOINT]),
    Fault("checkpoint_name_is_not_forced_to_the_disk", CHECKPOINT, "        temporary.rename(final)\n        fsync_path(directory)\n", "        temporary.rename(final)\n", [T_CHECKPOINT]),
    Fault("pointer_moves_before_the_checkpoint_has_its_name", CHECKPOINT, "        temporary.rename(final)\n        fsync_path(directory)\n",
          '        replace_file(directory / "latest", f"{final.name}\\n".encode())\n        temporary.rename(final)\n        fsync_path(directory)\n', [T_CHECKPOINT]),
    Fault("checkpoint_is_written_under_its_final_name", CHECKPOINT, 'temporary = directory / f".tmp_step_{step}.{os.getpid()}"\n        try:', 'temporary = directory / f"step_{step}"\n        try:', [T_CHECKPOINT]),
    Fault("digest_is_not_checked", CHECKPOINT, "if digest != expected[name][1]:", "if False:", [T_CHECKPOINT]),
    Fault("sizes_are_not_checked", CHECKPOINT, "if file.stat().st_size != size:", "if False:", [T_CHECKPOINT]),
    Fault("step_of_the_manifest_is_not_checked", CHECKPOINT, "if stored_step != step:", "if False:", [T_CHECKPOINT]),
    Fault("one_checkpoint_too_few_is_kept", CHECKPOINT, "if n <= step][:-keep]", "if n <= step][: -keep + 1 or None]", [T_CHECKPOINT]),
    Fault("one_checkpoint_too_many_is_kept", CHECKPOINT, "if n <= step][:-keep]", "if n <= step][: -keep - 1]", [T_CHECKPOINT]),
    Fault("going_back_removes_what_was_just_stored", CHECKPOINT, "if n <= step][:-keep]", "][:-keep]", [T_CHECKPOINT]),
    Fault("a_replaced_checkpoint_is_not_put_back", CHECKPOINT, 'if match[1] == "old" and not', 'if match[1] == "none" and not', [T_CHECKPOINT]),
    Fault("damage_falls_back_silently", CHECKPOINT, "            raise CheckpointError(\n                f\"{problem}. Step", "            return Checkpoint(directory / f\"step_{earlier}\", earlier)\n            raise CheckpointError(\n                f\"{problem}. Step", [T_CHECKPOINT]),
    Fault("leftovers_of_a_live_writer_are_removed", CHECKPOINT, "        if locked:\n", "        if True:\n", [T_CHECKPOINT]),
    # ---- the record --------------------------------------------------------------------------------------------------
    Fault("metrics_line_is_not_forced_to_the_disk", METRICS, "            os.fsync(self._fd)\n", "", [T_METRICS]),
    Fault("resume_drops_the_line_of_the_checkpoint", METRICS, 'row["step"] <= resume_step', 'row["step"] < resume_step', [T_METRICS]),
    Fault("torn_line_stays", METRICS, "            os.ftruncate(self._fd, size)  # a refused line leaves no torn half behind\n", "", [T_METRICS]),
    Fault("nonfinite_metrics_are_not_counted", METRICS, "values[NONFINITE] = nonfinite", "pass", [T_METRICS]),
    Fault("two_runs_share_a_folder", METRICS, "fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", [T_METRICS]),
    # ---- data, tasks, rewards ----------------------------------------------------------------------------------------
    Fault("dataset_is_not_forced_to_the_disk", DATA, "            os.fsync(file.fileno())\n", "", [T_DATA]),
    Fault("dataset_is_written_in_place", DATA, 'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")', "temporary = path", [T_DATA]),
    Fault("every_epoch_in_one_order", DATA, '{self.seed}|{epoch}', '{self.seed}|0', [T_DATA]),
    Fault("order_ignores_the_seed", DATA, '{self.seed}|{epoch}', '0|{epoch}', [T_DATA]),
    Fault("first_held_out_prompts_of_all_sources_together", DATA, "seen[example.data_source] < n", "len(chosen) < n", [T_DATA]),
    Fault("evaluation_on_training_prompts", DATA, 'self._drawn("held_out", index)', 'self._drawn("train", index)', [T_DATA, T_RUN := "tests/test_run.py::test_training_never_sees_a_held_out_question"]),
    Fault("evaluation_on_training_files", DATA, "load_rows(*data.val_files) if", "load_rows(*data.train_files) if", [T_DATA]),
    Fault("splits_share_questions", TASK, "lambda key: self._split(key) == split", "lambda key: True", [T_TASKS, T_RUN]),
    Fault("examples_ignore_the_index", TASK, "{self.seed}|{split}|{index}", "{self.seed}|{split}", [T_TASKS]),
    Fault("examples_ignore_the_seed", TASK, "{self.seed}|{split}|{index}", "{split}|{index}", [T_TASKS]),
    Fault("held_out_fraction_the_other_way_round", TASK, "< held_out_fraction * 2**64", ">= held_out_fraction * 2**64", [T_TASKS]),
    Fault("answer_anywhere_earns_the_reward", TASK, "1.0 if answer_after_mark(response) == example.ground_truth", "1.0 if example.ground_truth in response", [T_TASKS, T_REWARDS]),
    Fault("first_mark_instead_of_the_last", TASK, "text.rpartition(MARK)", "text.partition(MARK)", [T_TASKS, T_REWARDS]),
    Fault("gsm8k_takes_the_first_mark", REWARDS, 'response.rpartition("####")', 'response.partition("####")', [T_REWARDS]),
    Fault("first_box_instead_of_the_last", REWARDS, "text.rfind(mark)", "text.find(mark)", [T_REWARDS]),
    Fault("thousands_end_at_the_comma", REWARDS, '(-?[0-9][0-9,]*', '(-?[0-9]*', [T_REWARDS]),
)  # fmt: skip
