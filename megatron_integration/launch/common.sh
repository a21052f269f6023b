# shellcheck shell=bash
# What the launch scripts share: the processes, the model, the published setting, and the start. They source this file.
#
# The model and the layout are those of the recipe. These variables change them:
#   MODEL_PATH=Qwen/Qwen3-32B  another model, by a name on the hub or a folder; it must be one that the layout can divide
#   TP  PP  CP  ROLLOUT_TP     tensor, pipeline and context parallel ranks; tensor parallel ranks of an engine (default: TP)
#   RUN_DIR=runs/my_run        default: runs/MODEL_PRESET; of train_aent_1.5b.sh: what the recipe says
# Several nodes: the same command on every node, with
#   NUM_NODES NODE_RANK MASTER_ADDR     as torchrun takes them; slurm.sbatch and ray_job.sh set them
#   GPUS_PER_NODE (8)  MASTER_PORT (29500)
# Rollouts on GPUs of their own:
#   ROLLOUT_URL=http://node4:8000    a vLLM server. The same script starts it on that node with ENTCOV_SERVE=1 and
#                                    SERVE_HOST, the address it listens on (127.0.0.1). Trainer and server share a token
#                                    in the home directory, or ENTCOV_VLLM_TOKEN on all nodes (docs/vllm.md)
# Instead of training:
#   ENTCOV_DRY_RUN=1    print the command
#   ENTCOV_PLAN=1       print memory, traffic and time by arithmetic; needs no GPU
#   SMOKE_LAYERS=2      two steps with random weights, the model's widths and this number of layers: does everything start?
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "$0: $1" >&2
    exit 2
}

# One hardware queue: kernels run in the order of their launch. Megatron's overlapped communication relies on it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# vLLM starts threads of its own; tokenizers that were used before would print a warning about each of them.
export TOKENIZERS_PARALLELISM=false

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-1}

# execute WORD...: replaces the shell by the command, or prints the command in a dry run.
execute() {
    if [ -n "${ENTCOV_DRY_RUN:-}" ]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}

# on_gpus WORD...: the command of megatron_integration in one process for each GPU.
on_gpus() {
    if [ "$NUM_NODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        fail "MASTER_ADDR must be the address of node 0 where NUM_NODES=$NUM_NODES"
    fi
    execute torchrun --nproc-per-node "$GPUS_PER_NODE" --nnodes "$NUM_NODES" --node-rank "${NODE_RANK:-0}" \
        --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" -m megatron_integration "$@"
}

# model_name NAME: what a run directory is called after: NAME, or the last part of MODEL_PATH where that is given.
model_name() {
    local name=${MODEL_PATH:-$1}
    name=${name##*/}
    name=${name,,}
    echo "${name//-/_}"
}

# start RECIPE key=value...: the training, the server or the plan, with SETTING_ARGS and the variables above.
start() {
    local arguments=("$1" "${SETTING_ARGS[@]}") words smoke=()
    [ -z "${MODEL_PATH:-}" ] || arguments+=("model.path=$MODEL_PATH")
    [ -z "${RUN_DIR:-}" ] || arguments+=("run_dir=$RUN_DIR")
    if [ -n "${TP:-}" ]; then
        arguments+=("megatron.tensor_parallel=$TP")
        arguments+=("megatron.sequence_parallel=$([ "$TP" -gt 1 ] && echo true || echo false)")
    fi
    [ -z "${PP:-}" ] || arguments+=("megatron.pipeline_parallel=$PP")
    [ -z "${CP:-}" ] || arguments+=("megatron.context_parallel=$CP")
    [ -z "${ROLLOUT_TP:-${TP:-}}" ] || arguments+=("rollout.vllm.tensor_parallel=${ROLLOUT_TP:-$TP}")
    if [ -n "${SMOKE_LAYERS:-}" ]; then
        words=$(python -m megatron_integration.launch.smoke "$SMOKE_LAYERS" "${arguments[@]}")
        mapfile -t smoke <<<"$words"
    fi
    arguments+=("${smoke[@]}" "${@:2}")
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
        on_gpus train "${arguments[@]}"
    fi
}
