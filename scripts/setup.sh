#!/usr/bin/env bash
# Makes .venv in this clone and installs entcov with its [train,tasks,dev,cuda-static] extras into it; `setup.sh engines` adds vLLM
# and Megatron-Core (2.5 GB). Runs again in a second when nothing that the installation depends on has changed.
# PYTHON=python3.12 picks another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup: $1" >&2
    exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python not found; on Debian or Ubuntu: sudo apt-get install python3"
version=$("$python" -c 'import platform; print(platform.python_version())')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "entcov needs Python 3.11 or newer and $python is $version; name another one: PYTHON=python3.12 $0"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv"
[ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    fail "the header Python.h of $python is missing; on Debian or Ubuntu: sudo apt-get install python3-dev"
if [ -z "${CXX:-}" ]; then
    command -v g++ >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null ||
        fail "no C++ compiler found; on Debian or Ubuntu: sudo apt-get install g++"
fi

engines=no
case "${1:-}" in
"") ;;
engines) engines=yes ;;
*) fail "the argument must be 'engines' or left out, got '$1'" ;;
esac

venv_python=.venv/bin/python
# A .venv that was moved, or half made when a set-up was interrupted, has no working pip: it is made anew.
if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv
fi

# On Linux, PyPI's torch brings gigabytes of CUDA libraries, which are of no use without an NVIDIA driver.
cpu_only=no
if [ "$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! command -v nvidia-smi >/dev/null; then
    cpu_only=yes
fi
# Without a driver nothing could run CUDA kernels, and they take a minute to compile. ENTCOV_CUDA=1 builds them all the same.
if [ "$cpu_only" = yes ]; then export ENTCOV_CUDA=${ENTCOV_CUDA:-0}; fi

# One stamp for each of the two sets of packages.
if [ "$engines" = yes ]; then stamp=.venv/entcov_engines_installed; else stamp=.venv/entcov_installed; fi
state=$(
    find csrc setup.py build_backend.py pyproject.toml constraints.txt requirements-engines.txt scripts/setup.sh -type f -print0 |
        LC_ALL=C sort -z | xargs -0 cat | sha256sum
    "$venv_python" --version
    echo "CUDA=${ENTCOV_CUDA:-auto} ARCHS=${ENTCOV_CUDA_ARCHS:-}"
)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    exit 0
fi
rm -f .venv/entcov_installed .venv/entcov_engines_installed

install=("$venv_python" -m pip install --disable-pip-version-check --quiet -c constraints.txt)
# The CPU build of torch: from where pip already looks (a mirror, a wheel folder), else from PyTorch's own index.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if [ "$cpu_only" = yes ]; then
    echo "setup: installing torch $torch for CPU"
    "${install[@]}" "torch==$torch+cpu" 2>/dev/null ||
        "${install[@]}" --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
fi
echo "setup: installing entcov and what it needs"
"${install[@]}" -e ".[train,tasks,dev,cuda-static]"
if [ "$engines" = yes ]; then
    echo "setup: installing vLLM and Megatron-Core"
    if [ "$cpu_only" = yes ]; then
        "${install[@]}" --no-deps -r requirements-engines.txt
        "$venv_python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
            fail "vLLM needs the system's libnuma.so.1; on Debian or Ubuntu: sudo apt-get install libnuma1"
    else
        "${install[@]}" -e ".[vllm,megatron]"
    fi
    echo "$state" >.venv/entcov_installed
fi
echo "$state" >"$stamp"
