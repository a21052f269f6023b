#!/usr/bin/env bash
# AEnt's two published settings, models of 1.5 billion parameters, on one node of eight GPUs.
#
#   megatron_integration/launch/train_aent_1.5b.sh math|openr1 [key=value ...]
#
# Without entropy control: ... math control=[] run_dir=runs/aent_math_1.5b_baseline. `openr1` needs
# data.train_files=[...] of your own (examples/aent_openr1_1.5b.yaml). common.sh says how to start a dry run, a plan or a
# smoke test.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SETTING=${1:-math}
[[ $SETTING =~ ^(math|openr1)$ ]] || fail "setting must be math or openr1, got $SETTING"
SETTING_ARGS=()
start "examples/aent_${SETTING}_1.5b.yaml" "${@:2}"
