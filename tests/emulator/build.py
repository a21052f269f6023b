"""Builds the CUDA kernels, unmodified, for the CPU (cuda_emu.h): plain, and under the sanitizers.

A mode is a Python extension with the interface of entcov._cuda (csrc/bindings.cpp), so what is tested is all
that lies between Python and the device. Products go to build/emulator/<mode> and are made again when a source changed.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulator"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
INSTALL = "pip install -c constraints.txt -e '.[dev,cuda-static]'"

# Floating point is the same in all modes (no contraction), so their results must agree bit for bit.
COMMON = "-std=c++17 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -march=native".split()
COMMON += "-DENTCOV_CUDA -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -Wno-attributes".split()
# AddressSanitizer itself catches null pointers; its checks as calls, and none for those, compile in half of the time.
CHECKS = "-fsanitize=address,undefined -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=undefined"
MODES = {
    "plain": ["-O1"],
    "asan": f"-O0 -g1 {CHECKS} -fno-omit-frame-pointer --param asan-instrumentation-with-call-threshold=0".split(),
    "tsan": "-O1 -g1 -fsanitize=thread -fno-omit-frame-pointer".split(),
}
RUNTIME = {"asan": "libasan.so", "tsan": "libtsan.so"}


def cuda_headers() -> Path:
    """The folder of cuda_runtime_api.h: of the PyPI packages, or of a toolkit."""
    folders = [Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path if entry]
    folders += [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for folder in folders:
        if (folder / "cuda_runtime_api.h").exists() and (folder / "crt" / "host_defines.h").exists():
            return folder
    raise RuntimeError(f"the emulated CUDA tests need CUDA's headers (no GPU, no toolkit), and found none: {INSTALL}")


def compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(wanted[0]):
        raise RuntimeError(f"tests that compile the kernels need g++ (or CXX), and {wanted[0]!r} is not on the PATH")
    return wanted


def system_includes() -> list[str]:
    """Python's headers and pybind11's."""
    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError(f"tests that compile the kernels need pybind11's headers: {INSTALL}") from error
    return [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]


def includes() -> list[str]:
    cuda = cuda_headers()
    return [f"-I{HERE}", f"-isystem{cuda}", f"-isystem{cuda / 'cccl'}", *system_includes()]


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "warning:" in done.stderr:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


class Builder:
    """Compiles and links under build/emulator; every object is made once, and as many at a time as there are cores."""

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool
        self.objects: dict[Path, Future] = {}

    def compile(self, source: Path, flags: list[str], folder: str, include: Path = ROOT / "csrc" / "cuda") -> Future:
        target = BUILD / folder / (source.name + ".o")

        def run() -> Path:
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [*compiler(), *COMMON, *flags, f"-I{include}", *includes(), "-x", "c++"]
            run_compiler([*command, "-c", str(source), "-o", str(target)])
            return target

        if target not in self.objects:
            self.objects[target] = self.pool.submit(run)
        return self.objects[target]

    def link(self, mode: str, objects: list[Future], target: Path) -> Path:
        names = [str(future.result()) for future in objects]
        target.parent.mkdir(parents=True, exist_ok=True)
        run_compiler([*compiler(), "-shared", *MODES[mode], *names, "-o", str(target), "-lpthread"])
        return target

    def kernels(self, mode: str, csrc: Path = ROOT / "csrc", folder: str = "", only: str = "") -> list[Future]:
        """Objects of the emulated _cuda; `only`: this source of `csrc` instead of the repository's."""
        flags, scheduler = MODES[mode], ["-O1", "-g1", "-DEMU_TSAN"] if mode == "tsan" else MODES[mode]
        jobs = [self.compile(HERE / "cuda_emu.cpp", scheduler, mode)]
        jobs.append(self.compile(ROOT / "csrc" / "bindings.cpp", ["-O1"], "bindings"))
        for source in sorted((ROOT / "csrc" / "cuda").iterdir()):
            if source.name == only:
                jobs.append(self.compile(csrc / "cuda" / only, [*flags, "-O0"], folder, csrc / "cuda"))
            elif source.suffix in (".cu", ".cpp"):
                jobs.append(self.compile(source, flags, mode))
        return jobs


def mutant(name: str, file: str, old: str, new: str) -> Path:
    """A copy of csrc with one text of csrc/cuda/`file` replaced."""
    csrc = BUILD / "mutants" / name / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cpu"))
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    if text.count(old) != 1:
        raise RuntimeError(f"the mutant {name} replaces {old!r} in {file}, which is there {text.count(old)} times")
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    return csrc


@dataclass(frozen=True)
class Mutant:
    """One fault planted in a real kernel: `old` becomes `new` in csrc/cuda/`file`, and `source` is compiled with it.
    Running replay.py's `case` must end with `report`."""

    mode: str
    source: str
    file: str
    old: str
    new: str
    case: str
    report: str


MUTANTS = {
    "no barrier before the sum of the warps": Mutant(
        "tsan", "row_stats.cu", "device/block_reduction.cuh",
        "    __syncthreads();\n    if (rank != 0) return;", "    if (rank != 0) return;",
        "5008 bf16", "ThreadSanitizer: data race",
    ),
    "no barrier before a block's counts are added to all": Mutant(
        "tsan", "token_select.cu", "token_select.cu",
        "  __syncthreads();\n  const uint32_t mine", "  const uint32_t mine",
        "selection of 2048 tokens", "ThreadSanitizer: data race",
    ),
    "a word past the end of the row": Mutant(
        "asan", "logits_grad.cu", "device/vectors.cuh", "words - 1 < whole", "words < whole",
        "1000 bf16, unaligned", "AddressSanitizer: heap-buffer-overflow",
    ),
    "a word before the row": Mutant(
        "asan", "logits_grad.cu", "device/vectors.cuh", ">= shift_ ? 0 : 1", ">= shift_ ? 0 : 0",
        "2049 fp16", "AddressSanitizer: use-after-poison",
    ),
    "vector loads of unaligned rows": Mutant(
        "plain", "row_stats.cu", "launch.h",
        "return reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 &&",
        "return reinterpret_cast<uintptr_t>(logits.data) % 2 == 0 ||",
        "1000 bf16, unaligned", "misaligned 16-byte load",
    ),
    "a sum past its place in shared memory": Mutant(
        "asan", "row_stats.cu", "device/block_reduction.cuh", "shared.sum[i][rank / kWarp] = v[i];",
        "shared.sum[i][rank / kWarp + 1] = v[i];", "5008 bf16", "index 8 out of bounds",
    ),
}  # fmt: skip


def build_all() -> dict[str, Path]:
    """{mode or mutant's name: the extension _cuda}, {"faults " + mode: the library of faults.cu}."""
    BUILD.mkdir(parents=True, exist_ok=True)
    state, stamp = _state(), BUILD / "stamp"
    products = {mode: BUILD / mode / f"_cuda{SUFFIX}" for mode in MODES}
    products |= {f"faults {mode}": BUILD / mode / "faults.so" for mode in MODES}
    products |= {name: BUILD / "mutants" / name / f"_cuda{SUFFIX}" for name in MUTANTS}
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers
        if stamp.exists() and stamp.read_text() == state and all(path.exists() for path in products.values()):
            return products
        stamp.unlink(missing_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            builder = Builder(pool)
            links = {}
            for mode, flags in MODES.items():
                links[mode] = (mode, builder.kernels(mode))
                pieces = (HERE / "cuda_emu.cpp", ROOT / "csrc" / "cuda" / "launch.cpp", HERE / "faults.cu")
                links[f"faults {mode}"] = (mode, [builder.compile(piece, flags, mode) for piece in pieces])
            for name, m in MUTANTS.items():
                csrc = mutant(name, m.file, m.old, m.new)
                links[name] = (m.mode, builder.kernels(m.mode, csrc, f"mutants/{name}", m.source))
            for name, (mode, objects) in links.items():
                builder.link(mode, objects, products[name])
        stamp.write_text(state)
    return products


def _state() -> str:
    """Changes whenever a source, a flag or the compiler does."""
    digest = hashlib.sha256(repr((compiler(), str(cuda_headers()), sys.version)).encode())
    digest.update(subprocess.run([*compiler(), "--version"], capture_output=True).stdout)
    for path in sorted([*(ROOT / "csrc").rglob("*"), *HERE.glob("*")]):
        if path.is_file() and (path.suffix in (".h", ".cuh", ".cu", ".cpp") or path.name == "build.py"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def preload(mode: str) -> dict[str, str]:
    """Environment of a process that loads this mode's extension into an uninstrumented Python."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if mode in RUNTIME:
        name = f"-print-file-name={RUNTIME[mode]}"
        found = subprocess.run([*compiler(), name], capture_output=True, text=True).stdout.strip()
        environment |= {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    return environment


if __name__ == "__main__":
    for name, path in build_all().items():
        print(f"{name}: {path.relative_to(ROOT)}")
