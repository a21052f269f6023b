#!/usr/bin/env bash
# Sets entcov up in .venv of this clone, vLLM and Megatron-Core included, and in .venv-verl and .venv-trl, and runs all tests.
# With arguments for pytest: the tests of .venv alone, with these.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'exit 130' INT
failed=""
if [ $# -gt 0 ]; then
    ./scripts/setup.sh engines
else
    ./scripts/setup.sh engines verl trl
    ./scripts/test_plugins.sh || failed+=" of the plug-ins"
fi
# Two workers with one thread each: tests of distributed code start processes of their own. Each gets one half of the suite in
# its order, so that few files are set up twice, and takes tests of the other's half when it is done with its own.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal -q "$@" || failed+=" of .venv"
[ -z "$failed" ] || { echo "setup_and_test: failed: tests$failed" >&2 && exit 1; }
