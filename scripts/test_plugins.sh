#!/usr/bin/env bash
# Sets up .venv-verl and .venv-trl and runs the tests of the plug-ins in them, at the same time, each on one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh verl trl

in_environment() {  # ENTCOV_ENVIRONMENT: a test that is skipped is an error (tests/integrations/conftest.py)
    OMP_NUM_THREADS=1 ENTCOV_ENVIRONMENT=$1 ".venv-$1/bin/python" -m pytest -q -p no:cacheprovider "${@:2}"
}

output=$(mktemp)
set -m  # the second is a process group of its own, which ends with this script
trap 'rm -f "$output"; for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT
in_environment trl tests/integrations/test_environment.py tests/integrations/trl </dev/null >"$output" 2>&1 &
failed=""
# Recipes too: verl's hydra needs omegaconf 2.3, and .venv has a newer one.
in_environment verl tests/integrations/test_environment.py tests/integrations/verl \
    tests/rl/test_config.py tests/rl/test_stored_recipe.py || failed+=" .venv-verl"
wait $! || failed+=" .venv-trl"
cat "$output"
[ -z "$failed" ] || { echo "test_plugins: failed in$failed" >&2 && exit 1; }
