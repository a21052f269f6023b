#!/usr/bin/env bash
# The whole table of Cui et al. for a run's latest checkpoint: seven sets, T = 0.6 and the mean of 32 samples for AIME and AMC,
# greedy for the others, as the run's own recipe says. Needs `python -m entcov data eval`.
#
#   megatron_integration/launch/eval.sh runs/qwen2.5_7b_clip_cov [key=value ...]
#
# On as many GPUs as the layout wants; megatron.* and rollout.vllm.* may differ from the training's. A model that fits on one
# GPU in float32 needs no torchrun: python -m entcov eval RUN data.val_files=[...]. common.sh: several nodes, a dry run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN=${1:-}
[ -n "$RUN" ] || fail "usage: megatron_integration/launch/eval.sh RUN [key=value ...]"
FILES=$(printf ',data/%s/test.parquet' math500 aime24 aime25 amc olympiadbench minerva omni_math)
on_gpus eval "$RUN" "data.val_files=[${FILES:1}]" eval.prompts=null "${@:2}"
