"""Builds the C++ core (always) and the CUDA core (where wanted). PyTorch is not needed for it.

ENTCOV_CUDA=auto|1|0   auto: build entcov._cuda if nvcc is found or an NVIDIA driver is visible; 1: always; 0: never.
                       Where it is wanted and no nvcc is found, the compiler comes from PyPI (build_backend.py). The
                       nvcc must be of the major version of torch's CUDA, where torch is installed.
ENTCOV_CUDA_ARCHS      default "80;90;100": machine code for each, and PTX of the last for GPUs to come
CXX, CUDA_HOME, MAX_JOBS as usual.

Ninja compiles, in parallel, what changed since the last build: the command, the source or a header. Objects stay in
build/objects, and pybind11's headers in build/headers: pip builds in a new folder of its own each time, and with the
headers there every environment of one clone would compile again what another has compiled (22 s on two cores).
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import cuda_sources, matching_nvcc, wants_cuda  # noqa: E402

PYBIND11 = Path("build", "headers", f"pybind11-{pybind11.__version__}")  # from ROOT
PYTHON = sysconfig.get_path("include")
INCLUDES = [f"-I{PYBIND11}", f"-I{PYTHON}"]
# Paths of the building machine must not reach the binary.
PORTABLE = ["-g0", f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={PYTHON}=python"]
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
    nvcc = matching_nvcc()
    cxx = find_cxx()
    archs = os.environ.get("ENTCOV_CUDA_ARCHS", "80;90;100").split(";")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    host = [f"-Xcompiler={flag}" for flag in HOST]
    # Linked by the host compiler: nvcc would write its own paths into the binary. No kernel needs a device link.
    runtime = [f"-L{cuda_library_folder(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return (
        [str(nvcc), "-ccbin", cxx[0], "-DENTCOV_CUDA", "-std=c++17", "-O3", *targets, *host, *INCLUDES],
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


def find_ninja() -> str:
    """The program of the ninja package. pip puts it in the folder of scripts; with --target, in bin beside the package;
    to build in isolation, on the PATH."""
    places = (ninja.BIN_DIR, str(Path(ninja.__file__).parents[1] / "bin"), os.environ.get("PATH", ""))
    found = shutil.which("ninja", path=os.pathsep.join(filter(None, places)))
    if found is None:
        raise SystemExit("entcov: the package ninja has no program here; pip install --force-reinstall ninja")
    return found


def write_graph(
    path: Path, sources: list[str], output: Path, folder: Path, commands: tuple[list[str], list[str], list[str]]
) -> None:
    """The build of one extension for ninja. Paths are relative to ROOT. The compiler lists each object's headers."""
    compile_, link, libraries = (shlex.join(part).replace("$", "$$") for part in commands)
    with path.open("w") as file:
        graph = ninja.Writer(file, width=10_000)
        graph.variable("builddir", str(folder))  # where ninja keeps its log
        graph.rule(
            "compile", f"{compile_} -MMD -MF $out.d -c $in -o $out", description="compiling $in",
            depfile="$out.d", deps="gcc",
        )  # fmt: skip
        # Under another name first: a process that has the old file open keeps it.
        graph.rule(
            "link", f"{link} $in {libraries} -o $out.partial && mv -f $out.partial $out", description="linking $out"
        )
        objects = [str(folder / (source.replace("/", "_") + ".o")) for source in sources]
        for source, obj in zip(sources, objects, strict=True):
            graph.build(obj, "compile", source)
        graph.build(str(output), "link", objects)


def copy_headers() -> None:
    if not (ROOT / PYBIND11).exists():
        partial = ROOT / "build" / "headers" / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(ROOT / PYBIND11)


class Build(build_ext):
    def run(self):
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build" / "lock").open("w") as lock:  # two installations at the same time take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            copy_headers()
            super().run()

    def build_extension(self, ext):
        commands = cuda_commands() if ext.name == "entcov._cuda" else cpu_commands()
        folder = Path("build", "objects", ext.name)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        if self.force:
            output.unlink(missing_ok=True)
            for obj in (ROOT / folder).glob("*.o"):
                obj.unlink()
        graph = folder / "build.ninja"
        write_graph(ROOT / graph, ext.sources, output, folder, commands)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [find_ninja(), "-f", graph, "-j", jobs]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit(f"entcov: building {ext.name} failed; the messages of the compiler are above")


cpu_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
extensions = [Extension("entcov._cpu", ["csrc/bindings.cpp", *cpu_sources])]
if wants_cuda():
    extensions.append(Extension("entcov._cuda", cuda_sources()))
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
