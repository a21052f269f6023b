"""How fast this GPU reads and copies memory, by our own kernels (ceilings.cu) and by torch's."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import cuda_toolchain

SOURCE = Path(__file__).with_name("ceilings.cu")
BLOCKS_A_MULTIPROCESSOR = (2, 4, 8)  # of 512 threads; 4 fill one


def compile_library(folder: Path, architecture: str) -> ctypes.CDLL:
    """Builds ceilings.cu as a shared library in `folder`."""
    library, nvcc = folder / "ceilings.so", cuda_toolchain.nvcc()
    command = [nvcc, "-shared", "-std=c++17", "-O3", f"-arch={architecture}", "-Xcompiler=-fPIC", SOURCE, "-o", library]
    # A toolkit's nvcc knows where its libraries are; that of PyPI's package does not.
    command += [f"-L{nvcc.parent.parent / name}" for name in ("lib64", "lib") if (nvcc.parent.parent / name).is_dir()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ceilings.cu does not compile: {done.stderr}")
    return ctypes.CDLL(str(library))


def calls(memory: Tensor, target: Tensor, library: ctypes.CDLL | None) -> dict[str, dict[str, Callable[[], object]]]:
    """{"read": {name: call}, "copy": {name: call}} over `memory`; the copies go to `target` of the same size.

    Without a library (a rehearsal) there are torch's alone.
    """
    reads: dict[str, Callable[[], object]] = {"torch.sum": memory.sum}
    copies: dict[str, Callable[[], object]] = {"torch copy": lambda: target.copy_(memory)}
    if library is not None:
        multiprocessors = torch.cuda.get_device_properties(memory.device).multi_processor_count
        word = torch.zeros(4, dtype=torch.int32, device=memory.device)
        for blocks in BLOCKS_A_MULTIPROCESSOR:
            name = f"{blocks} blocks a multiprocessor"
            reads[name] = _launch(library.entcov_read, memory, word, blocks * multiprocessors)
            copies[name] = _launch(library.entcov_copy, memory, target, blocks * multiprocessors)
    return {"read": reads, "copy": copies}


def _launch(function, memory: Tensor, out: Tensor, blocks: int) -> Callable[[], None]:
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        if error := function(memory.data_ptr(), memory.nbytes // 16, out.data_ptr(), blocks, stream):
            raise RuntimeError(f"ceilings.cu: CUDA error {error}")

    return call
