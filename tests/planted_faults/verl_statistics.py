"""Faults of the statistics in verl's engines. They are tried in the environment that has verl."""

from tests.planted_faults.fault import Fault

STATISTICS, HEAD = "entcov/integrations/verl/statistics.py", "entcov/integrations/verl/fused_head.py"
MEGATRON_HEAD = "entcov/integrations/verl/megatron_head.py"
T = "tests/integrations/verl/test_statistics.py::test_"
SLOW = "verl takes five seconds to import"

FAULTS = [
    Fault("verl_statistics_without_logits_at_temperature_1", STATISTICS,
          "bias=bias, temperature=one_temperature(temperature)", "bias=bias, temperature=1.0",
          [T + "every_statistic_and_its_gradient"], slow=SLOW, package="verl"),
    Fault("verl_statistics_the_head's_bias_is_forgotten", STATISTICS, "bias=bias, temperature",
          "bias=None, temperature", [T + "a_head_with_a_bias"], slow=SLOW, package="verl"),
    Fault("verl_statistics_all_sequences_at_the_first_temperature", STATISTICS, "temperature=part[2])",
          "temperature=values[0])", [T + "a_temperature_for_each_sequence"], slow=SLOW, package="verl"),
    Fault("verl_statistics_logits_are_divided_in_bf16", STATISTICS,
          "rows, tokens = logits.flatten(0, -2), target.flatten()",
          "rows, tokens = (logits / temperature[..., None].to(logits.dtype)).flatten(0, -2), target.flatten(); "
          "temperature = torch.ones_like(temperature)", [T + "bf16_logits_are_not_divided_by_their_temperatures"],
          slow=SLOW, package="verl"),
    Fault("verl_statistics_a_control_goes_without_what_it_asked_for", STATISTICS, "    if asked:", "    if False:",
          [T + "what_entcov_does_not_cover_is_verls_or_refused"], slow=SLOW, package="verl"),
    Fault("verl_statistics_a_softcap_is_left_out", HEAD, "if logits is not made or made._version:", "if False:",
          [T + "a_head_without_a_request_gives_logits", T + "a_model_with_a_softcap_is_refused"],
          slow=SLOW, package="verl"),
    Fault("verl_statistics_a_lora_on_the_head_is_left_out", HEAD, "if not isinstance(head, StatisticsHead):",
          "if False:", [T + "a_head_without_a_request_gives_logits"], slow=SLOW, package="verl"),
    Fault("verl_statistics_logits_over_the_vocabulary_are_gathered", STATISTICS,
          "if len(split) != 1 or any(p != Replicate() for p in others):", "if True:",
          [T + "logits_that_are_dtensors"], slow=SLOW, package="verl"),
    Fault("verl_statistics_hidden_gradient_is_summed_twice_under_sequence_parallelism", MEGATRON_HEAD,
          "return not self.sequence_parallel", "return True",
          [T + "verls_megatron_engine_with_a_vocabulary_over_two_ranks"], slow=SLOW, package="verl"),
    Fault("verl_statistics_columns_that_pad_the_vocabulary_count", STATISTICS,
          "vocab_size = min(columns, self.model_config.hf_config.get_text_config().vocab_size)", "vocab_size = columns",
          [T + "hard_logits_of_a_tensor_parallel_rank"], slow=SLOW, package="verl"),
]  # fmt: skip
