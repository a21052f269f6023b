"""Builds the C++ core (always) and the CUDA core (where wanted). PyTorch is not needed for it.

ENTCOV_CUDA=auto|1|0   auto: build entcov._cuda if nvcc is found or an NVIDIA driver is visible; 1: always; 0: never.
                       Where it is wanted and no nvcc is found, the compiler comes from PyPI (build_backend.py).
ENTCOV_CUDA_ARCHS      default "80;90;100": machine code for each, and PTX of the last for GPUs to come
CXX, CUDA_HOME, MAX_JOBS as usual.

Objects stay in build/objects and are compiled again when their command, their source or a header of theirs changed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import CUDA_COMPILER, cuda_sources, find_nvcc, wants_cuda  # noqa: E402

HEADERS = {"pybind11": pybind11.get_include(), "python": sysconfig.get_path("include")}
INCLUDES = [f"-I{path}" for path in HEADERS.values()]
# Paths of the building machine must not reach the binary.
PORTABLE = ["-g0", f"-ffile-prefix-map={ROOT}=.", *(f"-ffile-prefix-map={p}={name}" for name, p in HEADERS.items())]
HOST = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *PORTABLE]


def find_cxx() -> list[str]:
    if wanted := os.environ.get("CXX"):
        command = shlex.split(wanted)
        if shutil.which(command[0]):
            return command
        raise SystemExit(f"CXX={wanted!r} is not a program on the PATH")
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise SystemExit(
        "entcov builds a C++ extension and found no compiler (g++, c++ or clang++). Install one: `apt install g++` "
        "(Debian, Ubuntu), `dnf install gcc-c++` (Fedora), `conda install cxx-compiler`; or set CXX."
    )


def cpu_commands() -> tuple[list[str], list[str], list[str]]:
    """How to compile one source, how to link, and with which libraries; without file names."""
    cxx = find_cxx()
    compile_ = [*cxx, "-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", *HOST, *INCLUDES]
    return compile_, [*cxx, "-shared", "-fopenmp", "-s"], []


def cuda_commands() -> tuple[list[str], list[str], list[str]]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit(
            "entcov is to build its CUDA kernels (ENTCOV_CUDA=1, or an NVIDIA driver is visible) and found no nvcc. "
            "Build without --no-build-isolation, or install the compiler first:\n    pip install "
            + " ".join(CUDA_COMPILER)
            + "\nor set CUDA_HOME to a toolkit, or ENTCOV_CUDA=0 to do without."
        )
    cxx = find_cxx()
    archs = os.environ.get("ENTCOV_CUDA_ARCHS", "80;90;100").split(";")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    host = [f"-Xcompiler={flag}" for flag in HOST]
    # Linked by the host compiler: nvcc would write its own paths into the binary. No kernel needs a device link.
    runtime = [f"-L{cuda_library_folder(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return (
        [str(nvcc), "-ccbin", cxx[0], "-std=c++17", "-O3", *targets, *host, *INCLUDES],
        [*cxx, "-shared", "-s"],
        runtime,
    )


def cuda_library_folder(nvcc: Path) -> Path:
    """Where the toolkit of this nvcc, which may be a wrapper script, keeps libcudart_static.a."""
    dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    tops = [line.split("TOP=", 1)[1].strip() for line in dry.stderr.splitlines() if "TOP=" in line]
    folders = [Path(top) / sub for top in tops for sub in ("lib64", "lib", "targets/x86_64-linux/lib")]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return folder.resolve()
    raise SystemExit(f"entcov: no libcudart_static.a beside {nvcc}; looked in {', '.join(map(str, folders))}")


def stale(obj: Path, command: str) -> bool:
    """Whether `obj` must be compiled again."""
    depfile, commandfile = obj.with_suffix(".d"), obj.with_suffix(".cmd")
    if not (obj.exists() and depfile.exists() and commandfile.exists()) or commandfile.read_text() != command:
        return True
    inputs = depfile.read_text().replace("\\\n", " ").split(": ", 1)[1].split()
    built = obj.stat().st_mtime
    return any(not (ROOT / name).exists() or (ROOT / name).stat().st_mtime > built for name in inputs)


def run(command: list[str], what: str) -> None:
    sys.stdout.write(shlex.join(command) + "\n")
    sys.stdout.flush()
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"entcov: {what} failed; the messages of the compiler are above")


class Build(build_ext):
    def build_extension(self, ext):
        compile_, link, libraries = cuda_commands() if ext.name == "entcov._cuda" else cpu_commands()
        folder = ROOT / "build" / "objects" / ext.name
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            obj = folder / (source.replace("/", "_") + ".o")
            command = [*compile_, "-MMD", "-MF", str(obj.with_suffix(".d")), "-c", source, "-o", str(obj)]
            if self.force or stale(obj, shlex.join(command)):
                run(command, f"compiling {source}")
                obj.with_suffix(".cmd").write_text(shlex.join(command))
            return str(obj)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")  # a process that has the old one open keeps it
        run([*link, *objects, *libraries, "-o", str(partial)], f"linking {ext.name}")
        partial.replace(output)


cpu_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
extensions = [Extension("entcov._cpu", ["csrc/bindings.cpp", *cpu_sources])]
if wants_cuda():
    extensions.append(Extension("entcov._cuda", cuda_sources()))
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
