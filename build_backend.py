"""The PEP 517 build backend: setuptools', asking PyPI for a CUDA compiler where one is wanted and none is found.

It also holds what setup.py needs to know about CUDA, so that both decide alike.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks of this backend too)
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = Path(__file__).resolve().parent
# One release of the toolkit: nvcc, its optimiser, its headers, the static runtime and libcu++. About 300 MB.
# PyPI has no nvcc of an earlier one.
CUDA_COMPILER_VERSION = "13.0"
CUDA_COMPILER = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def cuda_sources() -> list[str]:
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*") if p.suffix in (".cu", ".cpp"))
    return [*sources, "csrc/bindings.cpp"] if sources else []


def driver_visible() -> bool:
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def torch_cuda() -> str | None:
    """torch.version.cuda of the torch beside which entcov is installed; None: there is no torch, or it has no CUDA.

    Read from torch's file: an isolated build cannot import it, and need not.
    """
    for folder in dict.fromkeys([*sys.path, *(sysconfig.get_path(name) for name in ("purelib", "platlib"))]):
        file = Path(folder, "torch", "version.py")
        if file.is_file():
            found = re.search(r"^cuda\b.*= *['\"]([\d.]+)['\"]", file.read_text(), re.MULTILINE)
            return found and found[1]
    return None


def nvcc_version(nvcc: Path) -> str:
    """Such as 13.0."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise SystemExit(f"entcov: {nvcc} --version must name a release, got {said.strip()[:200]!r}")
    return found[1]


def major(version: str) -> str:
    return version.partition(".")[0]


def matching_nvcc() -> Path:
    """The first nvcc found whose major version is that of torch's CUDA.

    A program of CUDA 13 does not start under a driver of CUDA 12, whatever torch can do there.

    Raises:
        SystemExit: there is none; the message names what is here and the way out.
    """
    wanted, found = torch_cuda(), find_nvccs()
    versions = {nvcc: nvcc_version(nvcc) for nvcc in found} if wanted else {}
    for nvcc in found:
        if wanted is None or major(versions[nvcc]) == major(wanted):
            return nvcc
    if found or not _pypi_fits():
        listed = ", ".join(f"{version} ({nvcc})" for nvcc, version in versions.items()) or "none"
        raise SystemExit(
            f"entcov: nvcc must be of CUDA {major(wanted)}, as torch here is (torch.version.cuda {wanted}), got "
            f"{listed}. Set CUDA_HOME to a CUDA {major(wanted)} toolkit, install torch for another CUDA, or set "
            "ENTCOV_CUDA=0 to do without the CUDA kernels."
        )
    raise SystemExit(
        "entcov is to build its CUDA kernels (ENTCOV_CUDA=1, or an NVIDIA driver is visible) and found no nvcc. "
        "Build without --no-build-isolation, or install the compiler first:\n    pip install "
        + " ".join(CUDA_COMPILER)
        + "\nor set CUDA_HOME to a toolkit, or ENTCOV_CUDA=0 to do without."
    )


def _pypi_fits() -> bool:
    return major(torch_cuda() or CUDA_COMPILER_VERSION) == major(CUDA_COMPILER_VERSION)


def find_nvccs() -> list[Path]:
    """nvcc of CUDA_HOME, of the PATH, of /usr/local/cuda, and of the nvidia-cuda-nvcc package, those that exist."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += [Path(entry) / "nvidia" / "cu13" / "bin" / "nvcc" for entry in sys.path if entry]
    return [nvcc for nvcc in dict.fromkeys(candidates) if nvcc.exists()]


def wants_cuda() -> bool:
    """Whether ENTCOV_CUDA and this machine call for entcov._cuda."""
    setting = os.environ.get("ENTCOV_CUDA", "auto")
    if setting not in ("auto", "1", "0"):
        raise SystemExit(f"ENTCOV_CUDA must be auto, 1 or 0, got {setting!r}")
    has_sources = any(source.endswith(".cu") for source in cuda_sources())
    if setting == "1" and not has_sources:
        raise SystemExit("ENTCOV_CUDA=1, but this source tree has no csrc/cuda/*.cu")
    return has_sources and (setting == "1" or (setting == "auto" and (driver_visible() or bool(find_nvccs()))))


def _with_compiler(requires: list[str]) -> list[str]:
    return [*requires, *CUDA_COMPILER] if wants_cuda() and not find_nvccs() and _pypi_fits() else requires


def get_requires_for_build_wheel(config_settings=None):
    return _with_compiler(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_compiler(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """A wheel of this tree. Modules that an earlier build left in build/lib* do not get into it."""
    for leftover in (ROOT / "build").glob("lib*"):
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
