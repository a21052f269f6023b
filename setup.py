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

INCLUDES = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
# Paths of the building machine must not reach the binary.
PORTABLE = ["-g0", f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={pybind11.get_include()}=pybind11"]
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


def cpu_commands() -> tuple[list[str], list[str]]:
    """How to compile one source and how to link, without file names."""
    cxx = find_cxx()
    compile_ = [*cxx, "-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", *HOST, *INCLUDES]
    return compile_, [*cxx, "-shared", "-fopenmp", "-s"]


def cuda_commands() -> tuple[list[str], list[str]]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit(
            "entcov wants to build its CUDA kernels (ENTCOV_CUDA=1, or an NVIDIA driver is visible) and found no nvcc. "
            "Build without --no-build-isolation, or install the compiler first:\n    pip install "
            + " ".join(CUDA_COMPILER)
            + "\nor set CUDA_HOME to a toolkit, or ENTCOV_CUDA=0 to do without."
        )
    archs = os.environ.get("ENTCOV_CUDA_ARCHS", "80;90;100").split(";")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    base = [str(nvcc), "-ccbin", find_cxx()[0], "-std=c++17"]
    host = [f"-Xcompiler={flag}" for flag in HOST]
    # The wheels of the compiler keep the static runtime in lib, toolkits in lib64; nvcc looks into the latter only.
    libraries = [f"-L{nvcc.resolve().parent.parent / 'lib'}"]
    return [*base, "-O3", *targets, *host, *INCLUDES], [*base, "-shared", "-cudart=static", *libraries, "-Xlinker=-s"]


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
        compile_, link = cuda_commands() if ext.name == "entcov._cuda" else cpu_commands()
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
        run([*link, *objects, "-o", str(partial)], f"linking {ext.name}")
        partial.replace(output)


cpu_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
extensions = [Extension("entcov._cpu", ["csrc/bindings.cpp", *cpu_sources])]
if wants_cuda():
    extensions.append(Extension("entcov._cuda", cuda_sources()))
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
