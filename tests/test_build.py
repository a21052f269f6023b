"""Which CUDA compiler the build takes: one of the major version that torch was built with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nvidia-cuda-nvcc==13.0.88"


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """build_backend.py on a machine without torch, without a compiler, and with a driver."""
    spec = importlib.util.spec_from_file_location("build_backend_of_this_test", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ENTCOV_CUDA", "auto")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "driver_visible", lambda: True)
    nowhere = {"/usr/local/cuda/bin/nvcc": "/nowhere"}
    monkeypatch.setattr(module, "Path", lambda *parts: Path(*(nowhere.get(part, part) for part in parts)))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda settings: ["wheel"])
    return module


def toolkit(folder: Path, version: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n/bin/echo 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


def torch_with(tmp_path: Path, cuda: str) -> None:
    file = tmp_path / "site" / "torch" / "version.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip = None\n")


@pytest.mark.parametrize(("cuda", "found"), [("'13.0'", "13.0"), ("None", None), ('"12.8"', "12.8")])
def test_torchs_cuda_is_read_without_importing_torch(backend, tmp_path, cuda, found):
    assert backend.torch_cuda() is None
    torch_with(tmp_path, cuda)
    assert backend.torch_cuda() == found


def test_the_nvcc_of_torchs_major_version_is_taken(backend, tmp_path, monkeypatch):
    new, old = toolkit(tmp_path / "new", "13.0"), toolkit(tmp_path / "old", "12.6")
    monkeypatch.setenv("CUDA_HOME", str(new.parents[1]))
    monkeypatch.setenv("PATH", str(old.parent))
    assert backend.matching_nvcc() == new  # without torch the first one
    torch_with(tmp_path, "'12.8'")
    assert backend.matching_nvcc() == old


def test_another_major_version_is_refused_with_both_and_the_way_out(backend, tmp_path, monkeypatch):
    nvcc = toolkit(tmp_path / "new", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    torch_with(tmp_path, "'12.8'")
    with pytest.raises(SystemExit) as refused:
        backend.matching_nvcc()
    assert str(refused.value) == (
        f"entcov: nvcc must be of CUDA 12, as torch here is (torch.version.cuda 12.8), got 13.0 ({nvcc}). Set CUDA_HOME"
        " to a CUDA 12 toolkit, install torch for another CUDA, or set ENTCOV_CUDA=0 to do without the CUDA kernels."
    )


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, f"found no nvcc.*pip install {PACKAGE} .*ENTCOV_CUDA=0"),
        ("'13.2'", f"found no nvcc.*pip install {PACKAGE} .*ENTCOV_CUDA=0"),
        ("'12.8'", r"must be of CUDA 12, as torch here is \(torch.version.cuda 12.8\), got none"),
    ],
)
def test_no_compiler_at_all(backend, tmp_path, cuda, message):
    if cuda is not None:
        torch_with(tmp_path, cuda)
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        backend.matching_nvcc()


def test_a_program_that_is_no_nvcc(backend, tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\n/bin/echo hello\n")
    (tmp_path / "nvcc").chmod(0o755)
    with pytest.raises(SystemExit, match="nvcc --version must name a release, got 'hello'"):
        backend.nvcc_version(tmp_path / "nvcc")


@pytest.mark.parametrize(("cuda", "asked"), [(None, True), ("'13.2'", True), ("'12.8'", False)])
def test_pypis_compiler_is_asked_for_where_it_fits_torch(backend, tmp_path, cuda, asked):
    if cuda is not None:
        torch_with(tmp_path, cuda)
    assert (PACKAGE in backend.get_requires_for_build_wheel()) is asked
