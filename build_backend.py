"""The PEP 517 build backend: setuptools', asking PyPI for a CUDA compiler where one is wanted and none is found.

It also holds what setup.py needs to know about CUDA, so that both decide alike.
"""

import os
import shutil
import sys
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


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, of /usr/local/cuda, or of the nvidia-cuda-nvcc package; None: there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += [Path(entry) / "nvidia" / "cu13" / "bin" / "nvcc" for entry in sys.path if entry]
    return next((nvcc for nvcc in candidates if nvcc.exists()), None)


def wants_cuda() -> bool:
    """Whether ENTCOV_CUDA and this machine call for entcov._cuda."""
    setting = os.environ.get("ENTCOV_CUDA", "auto")
    if setting not in ("auto", "1", "0"):
        raise SystemExit(f"ENTCOV_CUDA must be auto, 1 or 0, got {setting!r}")
    has_sources = any(source.endswith(".cu") for source in cuda_sources())
    if setting == "1" and not has_sources:
        raise SystemExit("ENTCOV_CUDA=1, but this source tree has no csrc/cuda/*.cu")
    return has_sources and (setting == "1" or (setting == "auto" and (driver_visible() or find_nvcc() is not None)))


def _with_compiler(requires: list[str]) -> list[str]:
    return [*requires, *CUDA_COMPILER] if wants_cuda() and find_nvcc() is None else requires


def get_requires_for_build_wheel(config_settings=None):
    return _with_compiler(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_compiler(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """A wheel of this tree. Modules that an earlier build left in build/lib* do not get into it."""
    for leftover in (ROOT / "build").glob("lib*"):
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
