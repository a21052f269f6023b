#!/usr/bin/env bash
# Qwen2.5-32B on DAPO-Math-17k, on 32 GPUs with 80 GB or more: NUM_NODES=4, and the same on every node (slurm.sbatch).
#
#   megatron_integration/launch/train_qwen2.5_32b.sh PRESET [key=value ...]
#
# PRESET: as for train_qwen2.5_7b.sh; kl_cov is kl_cov_32b here. common.sh says how to start several nodes, another model
# or layout, a dry run, a plan or a smoke test.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

METHOD=${1:-clip_cov}
PRESET=$METHOD
[ "$METHOD" != kl_cov ] || PRESET=kl_cov_32b
SETTING_ARGS=("preset=$PRESET" "run_dir=runs/$(model_name qwen2.5_32b)_$METHOD")
start examples/qwen2.5_32b_dapo_math.yaml "${@:2}"
