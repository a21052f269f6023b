#!/usr/bin/env bash
# AEnt's two published settings, 1.5 billion parameters each, on one node of eight GPUs.
#
#   megatron_integration/train_aent_1.5b.sh math|openr1 [key=value ...]
#
# The twin without entropy control: ... math control=[] run_dir=runs/aent_math_1.5b_twin. See common.sh for a dry run, a plan
# or a smoke test. `openr1` needs data.train_files=[...] of your own (examples/aent_openr1_1.5b.yaml).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source megatron_integration/common.sh

SETTING=${1:-math}
case $SETTING in
    math) use_model qwen2.5_math_1.5b ;;
    openr1) use_model r1_distill_qwen_1.5b ;;
    *) fail "setting must be math or openr1, got $SETTING" ;;
esac
use_method "aent_$SETTING"

TRAINING_ARGS=("run_dir=${RUN_DIR:-runs/aent_${SETTING}_1.5b}")
MODEL_PARALLEL_ARGS=(
    "megatron.tensor_parallel=${TP:-1}"
    "megatron.sequence_parallel=$([ "${TP:-1}" -gt 1 ] && echo true || echo false)"
)

start "examples/aent_${SETTING}_1.5b.yaml" \
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${METHOD_ARGS[@]}" "${SMOKE_ARGS[@]}" "${@:2}"
