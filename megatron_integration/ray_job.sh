#!/usr/bin/env bash
# The training scripts on a Ray cluster: one torchrun on each of NUM_NODES nodes, which ray_nodes.py starts and watches.
#
#   RAY_ADDRESS=http://head:8265 NUM_NODES=4 megatron_integration/ray_job.sh train_qwen2.5_32b.sh kl_cov [key=value ...]
#
# Every node needs this repository, its environment, the data and the run directory under the same path (REPOSITORY).
# ENTCOV_DRY_RUN=1 prints the command.
set -euo pipefail
script=${1:?usage: megatron_integration/ray_job.sh SCRIPT METHOD [key=value ...]}
shift
REPOSITORY=${REPOSITORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}

command=(
    ray job submit --address "${RAY_ADDRESS:-http://localhost:8265}" --
    python "$REPOSITORY/megatron_integration/ray_nodes.py"
    --nodes "${NUM_NODES:-1}" --gpus-per-node "${GPUS_PER_NODE:-8}" --repository "$REPOSITORY"
    "$script" "$@"
)
if [ -n "${ENTCOV_DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
