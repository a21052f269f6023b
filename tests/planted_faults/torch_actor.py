"""Faults of the transformers actor's passes on a GPU, of its metrics and of its memory."""

from tests.planted_faults.fault import Fault

PACKED = "entcov/rl/hf/packed_attention.py"
MODEL = "entcov/rl/hf/model.py"
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
)
