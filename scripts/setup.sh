#!/usr/bin/env bash
# Makes the environments that are named, in this clone, with entcov in each:
#   setup.sh            .venv       entcov[train,tasks,dev,cuda-static], at the versions of constraints.txt
#   setup.sh engines    .venv       and vLLM and Megatron-Core (2.5 GB)
#   setup.sh verl       .venv-verl  entcov[verl,train,megatron,dev], constraints-verl.txt (1.6 GB)
#   setup.sh trl        .venv-trl   entcov[trl,dev], constraints-trl.txt (1.2 GB)
# Several names are installed at the same time. Runs again in a second when nothing that the installation depends on has
# changed. PYTHON=python3.12 picks another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup: $1" >&2
    exit 1
}

check_machine() {
    command -v "$python" >/dev/null || fail "$python not found; on Debian or Ubuntu: sudo apt-get install python3"
    local version
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
}

# What an environment is: its folder, the extras of entcov in it, the file of versions, and the list of packages that are
# installed before entcov, if any. A list is not resolved: that is quicker where it is complete, and vLLM's must not be.
# --no-compile: Python itself writes .pyc files of the modules that it imports, pip of all modules (45 s for verl and torch).
describe() {
    list="" bytecode=--compile
    case "$1" in
    entcov) folder=.venv extras=train,tasks,dev,cuda-static versions=constraints.txt ;;
    engines)
        describe entcov
        if [ "$cpu_only" = yes ]; then list=requirements-engines.txt; else extras+=,vllm,megatron; fi
        ;;
    verl) folder=.venv-verl extras=verl,train,megatron,dev versions=constraints-verl.txt list=$versions bytecode=--no-compile ;;
    trl) folder=.venv-trl extras=trl,dev versions=constraints-trl.txt list=$versions bytecode=--no-compile ;;
    *) fail "the arguments must be engines, verl, trl or left out, got '$1'" ;;
    esac
}

make_environment() {
    local folder extras versions list bytecode
    describe "$1"
    local venv_python=$folder/bin/python stamp=$folder/entcov_$1_installed
    # One that was moved, or half made when a set-up was interrupted, has no working pip: it is made anew.
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$folder"
    fi
    local state
    state=$(
        find csrc setup.py build_backend.py pyproject.toml "$versions" requirements-engines.txt scripts/setup.sh -type f -print0 |
            LC_ALL=C sort -z | xargs -0 cat | sha256sum
        "$venv_python" --version
        echo "CUDA=${ENTCOV_CUDA:-auto} ARCHS=${ENTCOV_CUDA_ARCHS:-}"
    )
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    rm -f "$folder"/entcov_*_installed

    local install=("$venv_python" -m pip install --disable-pip-version-check --quiet "$bytecode" -c "$versions")
    # The CPU build of torch: from where pip already looks (a mirror, a wheel folder), else from PyTorch's own index.
    if [ "$cpu_only" = yes ]; then
        local torch
        torch=$(sed -n 's/^torch==//p' "$versions")
        echo "setup: $folder: installing torch $torch for CPU"
        "${install[@]}" "torch==$torch+cpu" 2>/dev/null ||
            "${install[@]}" --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
    fi
    if [ -n "$list" ]; then
        echo "setup: $folder: installing the packages of $list"
        "${install[@]}" --no-deps -r "$list"
    fi
    echo "setup: $folder: installing entcov[$extras] and what it needs"
    "${install[@]}" -e ".[$extras]"
    if [ "$1" = engines ]; then
        [ "$cpu_only" = no ] || "$venv_python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
            fail "vLLM needs the system's libnuma.so.1; on Debian or Ubuntu: sudo apt-get install libnuma1"
        echo "$state" >"$folder/entcov_entcov_installed"
    fi
    echo "$state" >"$stamp"
}

python=${PYTHON:-python3}
check_machine
# On Linux, PyPI's torch brings gigabytes of CUDA libraries, which are of no use without an NVIDIA driver.
cpu_only=no
if [ "$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! command -v nvidia-smi >/dev/null; then
    cpu_only=yes
fi
# Without a driver nothing could run CUDA kernels, and they take a minute to compile. ENTCOV_CUDA=1 builds them all the same.
if [ "$cpu_only" = yes ]; then export ENTCOV_CUDA=${ENTCOV_CUDA:-0}; fi

[ $# -gt 0 ] || set -- entcov
for name; do describe "$name"; done  # a wrong name is an error before anything is installed
set -m  # each in a process group of its own, so that none outlives this script
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT
jobs=()
for name; do
    make_environment "$name" </dev/null &
    jobs+=($!)
done
code=0
for job in "${jobs[@]}"; do wait "$job" || code=$?; done
exit $code
