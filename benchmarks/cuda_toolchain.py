"""Finds nvcc and nvdisasm, compiles .cu files to machine code, and reads the compiler's report. Needs no GPU."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED_NVCC = "13.0.88"  # numbers about compiled code are asserted with this compiler only
ARCHS = ("sm_80", "sm_90a", "sm_100a")
INSTALL = "pip install -c constraints.txt -e '.[cuda-static]'"


class ToolMissing(RuntimeError):
    """A program of the CUDA toolkit is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel. Bytes are a thread's, but for shared memory, which is a block's."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def candidates(program: str) -> list[Path]:
    """Every copy of the program: first that of the toolkit in CUDA_HOME, last that of PyPI's packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    paths = [Path(home) / "bin" / program for home in homes if home]
    if on_path := shutil.which(program):
        paths.append(Path(on_path))
    paths.append(Path("/usr/local/cuda/bin") / program)
    paths += [Path(entry) / "nvidia" / "cu13" / "bin" / program for entry in sys.path if entry]
    return [path for path in dict.fromkeys(paths) if os.access(path, os.X_OK)]


@cache
def version(program: Path) -> str:
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if not found:
        raise RuntimeError(f"{program} --version does not tell its version: {text!r}")
    return found[1]


@cache
def nvcc() -> Path:
    """The pinned nvcc if there is one, else the first that is found."""
    found = candidates("nvcc")
    if not found:
        raise ToolMissing(f"no nvcc on this machine; {INSTALL}")
    return next((path for path in found if version(path) == PINNED_NVCC), found[0])


@cache
def nvdisasm() -> Path:
    """A disassembler not older than the pinned compiler, whose machine code it has to know."""
    found = [path for path in candidates("nvdisasm") if numbers(version(path)) >= numbers(PINNED_NVCC)[:2]]
    if not found:
        raise ToolMissing(f"no nvdisasm of CUDA {PINNED_NVCC} or later on this machine; {INSTALL}")
    return found[0]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def compile_cubin(source: Path, arch: str, cubin: Path) -> dict[str, Resources]:
    """Compiles one file for one architecture with the flags of setup.py, and returns ptxas's report by kernel."""
    flags = ["-DENTCOV_CUDA", f"-arch={arch}", "-std=c++17", "-O3", "-Xptxas", "-v"]
    command = [nvcc(), "-cubin", *flags, source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
    return parse_ptxas(done.stderr)


def parse_ptxas(log: str) -> dict[str, Resources]:
    kernels = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        # A kernel's own properties come first. Those of device functions that were not inlined have the same form.
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        if not frame or not used:
            raise RuntimeError(f"ptxas says nothing about the resources of {name}:\n{part}")
        stack, stores, loads = map(int, frame.groups())
        shared = re.search(r"(\d+) bytes smem", used[2])
        kernels[name] = Resources(int(used[1]), stores, loads, stack, int(shared[1]) if shared else 0)
    return kernels


def disassemble(cubin: Path) -> str:
    return subprocess.run([nvdisasm(), cubin], capture_output=True, text=True, check=True).stdout


def compile_all(
    sources: list[Path], archs: tuple[str, ...], folder: Path
) -> dict[tuple[Path, str], tuple[dict[str, Resources], str]]:
    """(resources by kernel, disassembly) of every source for every architecture."""

    def one(job: tuple[Path, str]) -> tuple[dict[str, Resources], str]:
        source, arch = job
        cubin = folder / f"{source.stem}.{arch}.cubin"
        return compile_cubin(source, arch, cubin), disassemble(cubin)

    jobs = [(source, arch) for source in sources for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(one, jobs), strict=True))
