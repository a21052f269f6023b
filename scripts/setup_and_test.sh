#!/usr/bin/env bash
# Sets entcov up in .venv of this clone, vLLM and Megatron-Core included, and runs its tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh engines
# Two workers with one thread each: tests of distributed code start processes of their own. Each gets one half of the suite in
# its order, so that few files are set up twice, and takes tests of the other's half when it is done with its own.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal -q "$@"
