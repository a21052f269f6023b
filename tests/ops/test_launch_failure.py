"""A first launch that fails because the binary does not fit the machine says so, and what to do. Needs no GPU."""

from __future__ import annotations

import subprocess

import pytest

from tests.emulator.build import ROOT, compiler, includes, run_compiler

# The CUDA runtime of another machine: its driver's version is the first argument, the error the second.
MACHINE = """
#include <cstdio>
#include <cstdlib>
#include "launch.h"
int driver;
extern "C" {
cudaError_t cudaDriverGetVersion(int* version) { return *version = driver, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 3, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device != 3) return cudaErrorInvalidDevice;
  return *value = which == cudaDevAttrComputeCapabilityMajor ? 7 : 5, cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "what CUDA says"; }
const char* cudaGetErrorName(cudaError_t) { return "itsName"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
int main(int, char** arguments) {
  driver = atoi(arguments[1]);
  puts(entcov::cuda::describe_failure(static_cast<cudaError_t>(atoi(arguments[2])), "row_stats", 12));
  printf("%d.%d\\n", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  static_assert(cudaErrorInsufficientDriver == 35 && cudaErrorUnsupportedPtxVersion == 222);
  static_assert(cudaErrorNoKernelImageForDevice == 209 && cudaErrorIllegalAddress == 700);
}
"""
DRIVER, PTX, IMAGE, OTHER = 35, 222, 209, 700


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    (folder / "machine.cpp").write_text(MACHINE)
    sources = [str(folder / "machine.cpp"), str(ROOT / "csrc" / "cuda" / "launch.cpp")]
    core = ["-std=c++17", "-DENTCOV_CUDA", f"-I{ROOT / 'csrc' / 'cuda'}", "-Wno-attributes", "-Wno-unknown-pragmas"]
    run_compiler([*compiler(), *core, *includes(), *sources, "-o", str(folder / "machine")])

    def says(driver: int, error: int) -> tuple[str, str]:
        """What follows CUDA's own words, and the version of CUDA that the binary was built with."""
        done = subprocess.run([folder / "machine", str(driver), str(error)], capture_output=True, text=True, check=True)
        message, version = done.stdout.splitlines()
        assert message.startswith(
            "entcov: row_stats: the launch of 12 blocks of 256 threads failed: what CUDA says (its"
        )
        return message.partition("(itsName)")[2], version

    return says


def test_a_driver_older_than_the_binary(machine):
    for error in (DRIVER, PTX):
        message, version = machine(12040, error)
        assert message == (
            f". entcov was built with CUDA {version}, and the driver supports CUDA up to 12.4: update the driver, or "
            "build entcov again with CUDA 12 (CUDA_HOME names the toolkit)"
        )


def test_a_machine_without_a_driver(machine):
    assert machine(0, DRIVER)[0] == ". No NVIDIA driver was found on this machine"


def test_a_gpu_that_the_binary_has_no_code_for(machine):
    assert machine(13000, IMAGE)[0] == (
        ". entcov was built without machine code for this GPU, of compute capability 7.5: build it again with "
        "ENTCOV_CUDA_ARCHS=75"
    )


def test_other_failures_have_cudas_words_alone(machine):
    assert machine(13000, OTHER)[0] == ""
