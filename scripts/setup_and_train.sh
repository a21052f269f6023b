#!/usr/bin/env bash
# Sets entcov up in .venv of this clone and trains the tiny recipe on the CPU. Further arguments go to `entcov train`, for
# example steps=20. Started again after an interruption, it goes on from the latest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
.venv/bin/python -m entcov train examples/tiny_cpu.yaml "$@"
