#!/usr/bin/env bash
# The launch scripts on a Ray cluster: one torchrun on each of NUM_NODES nodes, which ray_nodes.py starts and watches.
#
#   RAY_ADDRESS=http://head:8265 NUM_NODES=4 megatron_integration/launch/ray_job.sh train_qwen2.5_32b.sh kl_cov [key=value ...]
#
# Every node needs this repository, its environment, the data and the run directory under the same path (REPOSITORY).
# ENTCOV_DRY_RUN=1 prints the command.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] || fail "usage: megatron_integration/launch/ray_job.sh SCRIPT PRESET [key=value ...]"
REPOSITORY=${REPOSITORY:-$PWD}
execute ray job submit --address "${RAY_ADDRESS:-http://localhost:8265}" -- \
    python "$REPOSITORY/megatron_integration/launch/ray_nodes.py" \
    --nodes "$NUM_NODES" --gpus-per-node "$GPUS_PER_NODE" --repository "$REPOSITORY" "$@"
