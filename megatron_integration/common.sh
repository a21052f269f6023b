# shellcheck shell=bash disable=SC2034,SC2154
# What the training scripts share: the processes, the method, and the start. Sourced by them, from the repository's root.
#
# One node: nothing to set. Several: on every node the same command with
#   NUM_NODES NODE_RANK MASTER_ADDR     as torchrun takes them; slurm.sbatch and ray_job.sh set them
#   GPUS_PER_NODE (8)  MASTER_PORT (29500)
# Rollouts on GPUs of their own, instead of the trainer's:
#   ROLLOUT_URL=http://node4:8000    of a vLLM server, which the same script starts on that node with ENTCOV_SERVE=1 and
#                                    SERVE_HOST, the address it listens on (127.0.0.1). They share a token by the home
#                                    directory, or ENTCOV_VLLM_TOKEN on all nodes (docs/vllm.md)
# Instead of training:
#   ENTCOV_DRY_RUN=1    print the command
#   ENTCOV_PLAN=1       print its plan: memory, traffic and time, without a GPU
#   SMOKE_LAYERS=2      two steps with random weights, the model's widths and so many layers: does everything start?
set -euo pipefail

fail() {
    echo "$0: $1" >&2
    exit 2
}

# One hardware queue: kernels run in the order of their launch, which overlapping communication in Megatron relies on.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# vLLM starts threads of its own; tokenizers that have worked before would warn about every one of them.
export TOKENIZERS_PARALLELISM=false

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
if [ "$NUM_NODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    fail "MASTER_ADDR must be the address of node 0 where NUM_NODES=$NUM_NODES"
fi
DISTRIBUTED_ARGS=(
    --nproc-per-node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node-rank "$NODE_RANK"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-29500}"
)

# use KIND FOLDER NAME: sources FOLDER/NAME.sh.
use() {
    local file="megatron_integration/$2/$3.sh"
    [ -f "$file" ] || fail "$1 must be one of $(cd "megatron_integration/$2" && echo *.sh | sed 's/\.sh//g'), got $3"
    # shellcheck source=/dev/null
    source "$file"
}

# use_method NAME: fills METHOD_ARGS.
use_method() {
    use method methods "$1"
}

# use_model NAME: fills MODEL_ARGS and SMOKE_ARGS; MODEL_PATH replaces the hub's name, by a folder for instance.
use_model() {
    use model model_configs "$1"
    MODEL_ARGS=("model.path=${MODEL_PATH:-$MODEL}")
    SMOKE_ARGS=()
    if [ -n "${SMOKE_LAYERS:-}" ]; then
        SMOKE_ARGS=(
            model.path=null "model.tokenizer=${MODEL_PATH:-$MODEL}"
            "${MODEL_SHAPE_ARGS[@]}" "model.config.num_hidden_layers=$SMOKE_LAYERS"
            steps=2 run_dir=runs/smoke rollout.prompts_per_step=32 rollout.filter_zero_variance=false rollout.max_draws=3
            rollout.max_response_length=256 eval.prompts=0
        )
    fi
}

# execute WORD...: the command, or a dry run of it. Replaces the shell.
execute() {
    if [ -n "${ENTCOV_DRY_RUN:-}" ]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}

# start RECIPE key=value...: the training, the plan, or a dry run of either.
start() {
    local arguments=("$@")
    if [ -n "${ROLLOUT_URL:-}" ]; then
        arguments+=(rollout.vllm.mode=server "rollout.vllm.url=$ROLLOUT_URL" rollout.vllm.sleep=false)
    fi
    if [ -n "${ENTCOV_SERVE:-}" ]; then
        [[ ${ROLLOUT_URL:-} =~ :([0-9]+)/?$ ]] || fail "ROLLOUT_URL must end in the server's port, got '${ROLLOUT_URL:-}'"
        execute python -m entcov.rl.vllm.server "${arguments[@]}" \
            --host "${SERVE_HOST:-127.0.0.1}" --port "${BASH_REMATCH[1]}"
    elif [ -n "${ENTCOV_PLAN:-}" ]; then
        execute python -m entcov plan "${arguments[@]}" \
            --gpus "$((GPUS_PER_NODE * NUM_NODES))" --gpus-per-node "$GPUS_PER_NODE"
    else
        execute torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_integration train "${arguments[@]}"
    fi
}
