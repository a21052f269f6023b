"""Builds the C++ core for the CPU (csrc/cpu and its bindings, unmodified) under the address and undefined-behaviour
sanitizers, as build/fuzz/_cpu*.so; again when a source, a flag or the compiler changed."""

import fcntl
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.emulator.build import ROOT, SUFFIX, compiler, preload, run_compiler, system_includes

BUILD = ROOT / "build" / "fuzz"
FLAGS = "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=fast -Wno-psabi".split()
FLAGS += "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all".split()
# Checks as calls compile faster, as in tests/emulator/build.py.
FLAGS += "--param asan-instrumentation-with-call-threshold=0".split()


def build() -> Path:
    """The extension; import it as entcov._cpu in a process with `environment()`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    product, stamp = BUILD / f"_cpu{SUFFIX}", BUILD / "stamp"
    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    headers = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h")])
    digest = hashlib.sha256(repr((compiler(), FLAGS, system_includes())).encode())
    digest.update(subprocess.run([*compiler(), "--version"], capture_output=True).stdout)
    for path in (*sources, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers
        if product.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
            return product
        stamp.unlink(missing_ok=True)

        def compile_one(source: Path) -> str:
            target = BUILD / f"{source.name}.o"
            run_compiler([*compiler(), *FLAGS, *system_includes(), "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        run_compiler([*compiler(), "-shared", *FLAGS, *objects, "-o", str(product)])
        stamp.write_text(digest.hexdigest())
    return product


def environment() -> dict[str, str]:
    """Of a process that loads it into an uninstrumented Python. The sanitizer looks for __cxa_throw when it starts, and
    Python itself is no C++: hence libstdc++."""
    found = preload("asan")
    done = subprocess.run([*compiler(), "-print-file-name=libstdc++.so"], capture_output=True, text=True)
    return found | {"LD_PRELOAD": f"{found['LD_PRELOAD']} {done.stdout.strip()}", "UBSAN_OPTIONS": "print_stacktrace=1"}
