#!/usr/bin/env bash
# Qwen2.5-7B on DAPO-Math-17k, on one node of eight 80 GB GPUs or more.
#
#   megatron_integration/train_qwen2.5_7b.sh METHOD [key=value ...]
#
# METHOD: grpo, clip_higher, clip_cov, kl_cov, aent_math or aent_openr1. TP, PP, CP: another layout. MODEL_CONFIG=qwen3_8b or llama3.1_8b:
# the same setting for another model. common.sh says how to start several nodes, a dry run, a plan or a smoke test.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source megatron_integration/common.sh

METHOD=${1:-clip_cov}
use_method "$METHOD"
use_model "${MODEL_CONFIG:=qwen2.5_7b}"

TRAINING_ARGS=("run_dir=${RUN_DIR:-runs/${MODEL_CONFIG}_$METHOD}")
MODEL_PARALLEL_ARGS=(
    "megatron.tensor_parallel=${TP:-2}"
    "megatron.pipeline_parallel=${PP:-1}"
    "megatron.context_parallel=${CP:-1}"
    "megatron.sequence_parallel=$([ "${TP:-2}" -gt 1 ] && echo true || echo false)"
)
ROLLOUT_ARGS=("rollout.vllm.tensor_parallel=${ROLLOUT_TP:-${TP:-2}}")

start examples/qwen2.5_7b_dapo_math.yaml \
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${METHOD_ARGS[@]}" \
    "${SMOKE_ARGS[@]}" "${@:2}"
