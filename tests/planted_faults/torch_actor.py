"""Faults of the transformers actor on a GPU (passes, metrics, memory), of the engine beside it, of the CUDA build."""

from tests.planted_faults.fault import Fault

PACKED = "entcov/rl/hf/packed_attention.py"
MODEL = "entcov/rl/hf/model.py"
HF_ACTOR = "entcov/rl/hf/actor.py"
T_ACTOR = "tests/rl/hf/test_actor.py::test_"
T_HEAD = "tests/rl/hf/test_large_vocabulary.py::test_"
T_SLEEP = "tests/rl/vllm/test_sleep.py::test_"
T_PACKED = "tests/rl/hf/test_packed.py::test_"

FAULTS = (
    Fault(
        "a_packed_row_is_one_sequence",
        PACKED,
        "starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))",
        "starts = F.pad(torch.tensor((sum(lengths),)).cumsum(0), (1, 0))",
        [T_PACKED + "packed_and_padded_rows_have_the_same_statistics_and_gradients"],
    ),
    Fault(
        "a_sliding_window_is_one_token_too_wide",
        PACKED,
        "(-1 if sliding_window is None else sliding_window - 1, 0)",
        "(-1 if sliding_window is None else sliding_window, 0)",
        [T_PACKED + "packed_and_padded_rows_have_the_same_statistics_and_gradients[a sliding window]"],
    ),
    Fault(
        "packed_rows_get_the_mask_too",
        PACKED,
        "if model.config._attn_implementation == NAME:\n        # transformers",
        "if False:\n        # transformers",
        [T_PACKED + "memory_grows_with_the_tokens_and_no_tensor_with_their_square[entcov_packed]"],
    ),
    Fault(
        "a_model_that_mixes_tokens_outside_attention_is_packed",
        PACKED,
        "return not model._is_stateful and (name",
        "return bool(name) and (name",
        [T_PACKED + "a_model_with_a_state_goes_one_by_one_whatever_its_attention"],
    ),
    Fault(
        "every_sequence_casts_the_weights_anew",
        MODEL,
        "    with autocast(model):\n        if model",
        "    if True:\n        if model",
        [T_PACKED + "sequences_one_by_one_share_the_weights_that_autocast_casts"],
    ),
    Fault(
        "a_checkpoint_says_whether_the_step_is_fused",
        HF_ACTOR,
        'group | {"fused": own["fused"]}',
        "group | {}",
        [T_ACTOR + "fused_adamw_is_the_gpus_and_a_checkpoint_of_either_device_goes_on_at_the_other"],
    ),
    Fault(
        "adamw_is_fused_on_a_cpu_too",
        MODEL,
        'fused = True if model.device.type == "cuda" else None',
        "fused = True",
        [T_ACTOR + "fused_adamw_is_the_gpus_and_a_checkpoint_of_either_device_goes_on_at_the_other"],
    ),
    Fault(
        "each_metric_of_a_micro_batch_is_waited_for",
        HF_ACTOR,
        "metrics[name] += value.double()",
        "metrics[name] += float(value)",
        [T_ACTOR + "an_update_reads_its_metrics_at_once"],
    ),
    Fault(
        "metrics_of_selections_are_read_by_themselves",
        "entcov/rl/actor.py",
        "return self._optimize(batch, selections, totals, step, found)",
        "return self._optimize(batch, selections, totals, step) | {k: float(v) for k, v in found.items()}",
        [T_ACTOR + "an_update_reads_its_metrics_at_once[kl_cov]"],
    ),
    Fault(
        "a_heads_model_may_bound_its_logits",
        MODEL,
        "return torch.equal(head(hidden), forward(",
        "return True or torch.equal(head(hidden), forward(",
        [T_HEAD + "only_a_head_without_more_is_plain"],
    ),
    Fault(
        "hidden_states_lose_the_temperature",
        MODEL,
        "bias=head.bias, **stats_options)",
        "bias=head.bias)",
        [T_HEAD + "hidden_states_give_the_statistics_and_gradients_of_logits"],
    ),
    Fault(
        "large_logits_are_counted_in_entries",
        MODEL,
        "rows * head.out_features * model.compute_dtype.itemsize > LARGE_LOGITS",
        "rows * head.out_features > LARGE_LOGITS",
        [T_HEAD + "the_bytes_of_the_logits_decide"],
    ),
    Fault(
        "a_draft_models_weights_are_dropped",
        "entcov/rl/vllm/engine.py",
        "drops = sync_follows and not self._drafts",
        "drops = sync_follows",
        [T_SLEEP + "a_draft_models_weights_are_kept"],
    ),
    Fault(
        "an_engine_asleep_is_put_to_sleep_again",
        "entcov/rl/vllm/engine.py",
        'if not self._sleeps or "weights" in self._asleep:',
        "if not self._sleeps:",
        [T_SLEEP + "sleeping_twice_keeps_what_the_first_time_kept"],
    ),
    Fault(
        "dropped_weights_are_sampled_with",
        "entcov/rl/vllm/sampler.py",
        "if self.engine.sleep(sync_follows=sync_follows):",
        "if self.engine.sleep(sync_follows=sync_follows) and not sync_follows:",
        [T_SLEEP + "dropped_weights_are_never_sampled_with"],
    ),
    Fault(
        "a_sync_is_promised_where_the_next_step_is_sampled_ahead",
        "entcov/rl/loop.py",
        "self.sampler.sleep(sync_follows=not self.config.rollout.max_staleness)",
        "self.sampler.sleep(sync_follows=True)",
        [T_SLEEP + "the_loop_promises_a_sync_after_the_last_draw_of_a_step[1]"],
    ),
    Fault(
        "an_evaluation_lets_the_weights_be_dropped",
        "entcov/rl/evaluation.py",
        "sampler.sleep(sync_follows=False)",
        "sampler.sleep(sync_follows=True)",
        ["tests/rl/test_evaluation.py::test_every_data_source_has_its_own_protocol"],
    ),
    Fault(
        "any_nvcc_is_taken",
        "build_backend.py",
        "if wanted is None or major(versions[nvcc]) == major(wanted):",
        "if wanted is None or versions[nvcc]:",
        ["tests/test_build.py::test_the_nvcc_of_torchs_major_version_is_taken"],
    ),
    Fault(
        "pypis_compiler_is_asked_for_beside_an_older_torch",
        "build_backend.py",
        "return major(torch_cuda() or CUDA_COMPILER_VERSION) == major(CUDA_COMPILER_VERSION)",
        "return True",
        ["tests/test_build.py::test_pypis_compiler_is_asked_for_where_it_fits_torch"],
    ),
    Fault(
        "steps_of_transformer_engines_adam_are_not_read",
        "megatron_integration/checkpoint.py",
        'if group["params"] and "step" in group:',
        "if False:",
        ["tests/megatron/test_checkpoint.py::test_steps_are_found_where_transformer_engines_adam_keeps_them"],
    ),
    Fault(
        "a_checkpoint_takes_no_bool",
        "entcov/rl/record/checkpoint.py",
        "bytes, bool, type(None), torch.dtype",
        "bytes, type(None), torch.dtype",
        ["tests/rl/record/test_checkpoint.py::test_what_transformer_engines_adam_saves_is_stored_and_goes_on"],
    ),
)
