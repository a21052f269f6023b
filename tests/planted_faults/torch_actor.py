"""Faults of the transformers actor's passes on a GPU, of its metrics and of its memory."""

from tests.planted_faults.fault import Fault

PACKED = "entcov/rl/hf/packed_attention.py"
MODEL = "entcov/rl/hf/model.py"
HF_ACTOR = "entcov/rl/hf/actor.py"
T_ACTOR = "tests/rl/hf/test_actor.py::test_"
T_HEAD = "tests/rl/hf/test_large_vocabulary.py::test_"
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
        "        with autocast(model):\n            alone",
        "        if True:\n            alone",
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
)
