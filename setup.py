"""Builds the C++ core (always) and the CUDA core (where asked for); torch is not needed.

ENTCOV_CUDA=auto|1|0   auto: build entcov._cuda if nvcc is found, or an NVIDIA driver is visible (then the compiler comes
                       from PyPI, see build_backend.py); 1: fail without it; 0: never
ENTCOV_CUDA_ARCHS      default "80;90;100": machine code for each, and PTX of the last for what comes later
CXX, CUDA_HOME, MAX_JOBS as usual.

Objects are kept in build/objects and rebuilt when their command, their source or a header they include has changed.
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
import build_backend  # noqa: E402

# Paths of the building machine must not reach the binary.
PORTABLE = [
    f"-ffile-prefix-map={ROOT}=.",
    f"-ffile-prefix-map={pybind11.get_include()}=pybind11",
    "-g0",
]
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"]


def cxx() -> str:
    """The C++ compiler, or an exit that says how to get one."""
    configured = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "").split(" ")[0]
    for name in ([configured] if os.environ.get("CXX") else [configured, "g++", "c++", "clang++"]):
        if name and (found := shutil.which(shlex.split(name)[0])):
            return " ".join([found, *shlex.split(name)[1:]])
    sys.exit(
        "entcov builds a C++ extension and found no C++17 compiler"
        + (f" (CXX={os.environ['CXX']!r} does not exist)" if os.environ.get("CXX") else "")
        + ". Install one: `apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora), "
        "`conda install cxx-compiler`, or set CXX."
    )


def stale(obj: Path, command: str) -> bool:
    """Whether `obj` must be compiled again: its command, source or any included file is newer than it."""
    depfile, commandfile = obj.with_suffix(".d"), obj.with_suffix(".cmd")
    if not (obj.exists() and depfile.exists() and commandfile.exists()) or commandfile.read_text() != command:
        return True
    names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return any(not os.path.exists(n) or os.path.getmtime(n) > obj.stat().st_mtime for n in names)


class Build(build_ext):
    def build_extension(self, ext):
        folder = ROOT / "build" / "objects" / ext.name
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            obj = folder / (source.replace("/", "_") + ".o")
            command = [*ext.compiler, *ext.extra_compile_args, "-MMD", "-MF", str(obj.with_suffix(".d")),
                       "-c", source, "-o", str(obj)]  # fmt: skip
            text = shlex.join(command)
            if self.force or stale(obj, text):
                print(text, flush=True)
                if subprocess.run(command, cwd=ROOT).returncode:
                    raise SystemExit(f"entcov: {source} did not compile; the compiler's messages are above")
                obj.with_suffix(".cmd").write_text(text)
            return str(obj)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*ext.linker, "-shared", *objects, *ext.extra_link_args, "-o", str(output)]
        print(shlex.join(link), flush=True)
        if subprocess.run(link, cwd=ROOT).returncode:
            raise SystemExit(f"entcov: {ext.name} did not link; the linker's messages are above")


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def cpu_extension() -> Extension:
    ext = Extension("entcov._cpu", ["csrc/bindings.cpp", *sources("csrc/cpu/*.cpp")])
    ext.compiler = ext.linker = shlex.split(cxx())
    python = sysconfig.get_path("include")
    ext.extra_compile_args = [*CXX_FLAGS, *PORTABLE, f"-I{pybind11.get_include()}", f"-I{python}"]
    ext.extra_link_args = ["-fopenmp", "-s"]
    return ext


setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": Build})
