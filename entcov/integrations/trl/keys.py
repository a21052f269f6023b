"""What the keys of TRL's GRPOConfig become in entcov's loss. None is ignored: a key is kept, translated or refused.

`policy_loss_config` translates and refuses. The keys that neither it nor the refusals name are those of data,
generation, rewards, advantages, logging and of vLLM, which stay TRL's (`KEPT`).
"""

import math
from dataclasses import fields
from typing import Any

from entcov.objective.tokens import LOG_RATIO_BOUND, OBJECTIVE_KNOBS, PolicyLossConfig

TESTED = "1.16.0"  # of trl, with transformers 5.23 and accelerate 1.15

# (objective, aggregation) of the loss types, with importance_sampling_level="token"
LOSS_TYPES = {
    "grpo": ("ppo", "seq-mean-token-mean"),
    "bnpo": ("ppo", "token-mean"),
    "dapo": ("ppo", "token-mean"),
    "dr_grpo": ("ppo", "seq-mean-token-sum-norm"),
    "cispo": ("cispo", "token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "vespo": ("vespo", "token-mean"),
}
# ... and with "sequence"
SEQUENCE_LOSS_TYPES = {"grpo": ("gspo", "seq-mean-token-mean"), "luspo": ("gspo", "seq-mean-token-sum")}
TRANSLATED = (
    "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "sapo_temperature_neg",
    "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    "off_policy_mask_threshold", "beta", "use_bias_correction_kl", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "max_completion_length", "temperature", "num_iterations", "steps_per_generation", "generation_batch_size",
    "cast_lm_head_to_fp32", "router_aux_loss_coef", "mask_truncated_completions", "num_generations",
)  # fmt: skip
# key: what to do instead. The key must be at its default.
REFUSED = {
    "top_entropy_quantile": "TRL's threshold is that of each micro-batch; entcov's chooses over the whole mini-batch: "
    'controls=[make_control("high_entropy_tokens", top_entropy_quantile=..., denominator="all")]',
    "entropy_coef": 'use controls=[make_control("entropy_bonus", entropy_coef=...)]',
    "use_adaptive_entropy": 'use controls=[make_control("adaptive_bonus", rule="trl", target=..., entropy_coef=...)]',
    "entropy_coef_min": 'it is coef_min of make_control("adaptive_bonus", rule="trl")',
    "entropy_coef_max": 'it is coef_max of make_control("adaptive_bonus", rule="trl")',
    "entropy_coef_delta": 'it is delta of make_control("adaptive_bonus", rule="trl")',
    "entropy_target": 'it is target of make_control("adaptive_bonus", rule="trl")',
}  # fmt: skip
KEPT = (
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "remove_unused_columns", "num_generations_eval",
    "ds3_gather_for_generation", "shuffle_dataset", "pad_to_multiple_of", "top_p", "top_k", "min_p",
    "generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation", "use_vllm", "vllm_mode",
    "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization",
    "vllm_max_model_length", "vllm_tensor_parallel_size", "reward_weights", "multi_objective_aggregation",
    "scale_rewards", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "max_tool_calling_iterations",
    "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    "vllm_importance_sampling_cap",
    # of TrainingArguments, with a default of TRL's own
    "learning_rate", "logging_steps", "gradient_checkpointing", "bf16",
)  # fmt: skip


def policy_loss_config(args: Any) -> PolicyLossConfig:
    """The loss of a GRPOConfig, without the KL term, which `ReferenceKL` adds as TRL defines it.

    Raises: ValueError that names the key, the rule and what is possible, for a loss that entcov does not have, a key
        that nothing would read, and a key of another version of TRL that is not at its default.
    """
    _refuse_keys(args)
    _check_windows(args)
    level = args.importance_sampling_level
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence, got {level}")
    types = LOSS_TYPES if level == "token" else SEQUENCE_LOSS_TYPES
    if args.loss_type not in types:
        raise ValueError(
            f"loss_type must be one of {', '.join(types)} with importance_sampling_level={level!r}, got "
            f"{args.loss_type}"
        )
    objective, aggregation = types[args.loss_type]
    if level == "sequence" and args.beta and args.use_bias_correction_kl:
        raise ValueError(
            "use_bias_correction_kl must be False with importance_sampling_level='sequence' and beta > 0: the "
            "correction is unbiased for token ratios alone; got True"
        )
    try:
        return PolicyLossConfig(
            objective=objective,
            aggregation=aggregation,
            max_response_length=args.max_completion_length if args.loss_type == "dr_grpo" else None,
            off_policy_mask_threshold=args.off_policy_mask_threshold,
            **_clip(args, objective),
            **_mismatch(args),
        )
    except ValueError as error:
        raise ValueError(
            f"{error} (clip_low is epsilon, clip_high is epsilon_high, for cispo epsilon_high - 1; dual_clip is delta; "
            "tau_* are sapo_temperature_*; tis_cap and tis_floor are vllm_importance_sampling_clip_max and _min)"
        ) from None


def _refuse_keys(args: Any) -> None:
    known = {*TRANSLATED, *REFUSED, *KEPT}
    from trl.trainer.grpo_config import GRPOConfig

    for field in fields(GRPOConfig):
        if field.name in REFUSED or (field.name in GRPOConfig.__annotations__ and field.name not in known):
            value = getattr(args, field.name)
            if value != field.default:
                why = REFUSED.get(field.name, "entcov's plug-in does not know this key of another version of TRL")
                raise ValueError(f"{field.name} must be left at {field.default!r}, got {value!r}: {why}")


def _check_windows(args: Any) -> None:
    """An optimizer step must not span two generation batches: tokens of the second one do not exist when the first
    backward pass begins."""
    steps, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
    if steps % accumulation:
        raise ValueError(
            "steps_per_generation must be a multiple of gradient_accumulation_steps, so that the tokens of an "
            f"optimizer step come from one generation batch; got {steps} and {accumulation} (generation_batch_size "
            f"{args.generation_batch_size}: it is per_device_train_batch_size * processes * steps_per_generation)"
        )


def _clip(args: Any, objective: str) -> dict[str, float]:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None and objective != "ppo":
        raise ValueError(f"delta must be None, the loss does not read it ({objective}); got {args.delta}")
    if objective == "sapo":
        return {"tau_pos": args.sapo_temperature_pos, "tau_neg": args.sapo_temperature_neg}
    if objective == "vespo":
        return {name: getattr(args, name) for name in OBJECTIVE_KNOBS["vespo"]}
    if objective == "cispo":
        if high < 1:
            raise ValueError(
                "epsilon_high must be at least 1 for loss_type cispo, where it bounds the importance weight itself "
                f"(the paper: 5); got {high}"
            )
        return {"clip_low": 1.0, "clip_high": high - 1}
    clip = {"clip_low": args.epsilon, "clip_high": high}
    if args.delta is None:
        return clip
    if args.delta < 1 + high:
        raise ValueError(f"delta must be at least 1 + epsilon_high = {1 + high}, got {args.delta}")
    return {**clip, "dual_clip": args.delta}


def _mismatch(args: Any) -> dict[str, Any]:
    """The importance weight of vLLM's sampler. Its logarithm is bounded by +-20, so an open end is the bound."""
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return {}
    modes = {f"{level}_{mode}": (level, mode) for level in ("token", "sequence") for mode in ("truncate", "mask")}
    if args.vllm_importance_sampling_mode not in modes:
        raise ValueError(
            f"vllm_importance_sampling_mode must be one of {', '.join(modes)}, got {args.vllm_importance_sampling_mode}"
        )
    level, mode = modes[args.vllm_importance_sampling_mode]
    high, low = args.vllm_importance_sampling_clip_max, args.vllm_importance_sampling_clip_min
    return {
        "tis_cap": math.exp(LOG_RATIO_BOUND) if high is None else high,
        "tis_floor": 0.0 if low is None else low,
        "tis_level": level,
        "tis_mode": mode,
    }
