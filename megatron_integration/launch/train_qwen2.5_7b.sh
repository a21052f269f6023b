#!/usr/bin/env bash
# Qwen2.5-7B on DAPO-Math-17k, on one node of eight GPUs with 80 GB or more.
#
#   megatron_integration/launch/train_qwen2.5_7b.sh PRESET [key=value ...]
#
# PRESET: grpo, clip_higher, clip_cov (default), kl_cov, aent_math, ...: the names in entcov/controls/published.py.
# common.sh says how to start several nodes, another model or layout, a dry run, a plan or a smoke test.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PRESET=${1:-clip_cov}
SETTING_ARGS=("preset=$PRESET" "run_dir=runs/$(model_name qwen2.5_7b)_$PRESET")
start examples/qwen2.5_7b_dapo_math.yaml "${@:2}"
