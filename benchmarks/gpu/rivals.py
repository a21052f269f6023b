"""Implementations of other projects, run from their published wheels without installing them.

A wheel is unpacked, and its packages are entered without their __init__ files, which import many further packages. A
stand-in of a few lines replaces a module that a submodule imports from elsewhere. The rivals' code is not changed. On
one GPU their collectives run in a group of one rank and move no data.
"""

import contextlib
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.contenders import Contender, named, read_once

HEAD_COLUMNS = 32768  # of a tile of TRL's head, its trainer's choice


@dataclass(frozen=True)
class Rival:
    """requirements: what `python -m benchmarks rivals` downloads for it, its own package first.

    load(source) -> Contender, in a process of its own with the archives unpacked and on sys.path.
    """

    requirements: tuple[str, ...]
    load: Callable[[str], Contender]


def find(requirement: str, folder: Path) -> Path | None:
    """The wheel or sdist of that requirement in the folder."""
    name = requirement.split("==")[0].replace("-", "_") + "-"
    return next((p for p in sorted(folder.iterdir()) if p.name.startswith(name)), None)


def missing(rival: Rival, folder: Path | None) -> str | None:
    """Why this rival cannot run with what the folder has; None: it can."""
    if folder is None:
        return "no --rivals folder"
    absent = [requirement for requirement in rival.requirements if find(requirement, folder) is None]
    return f"not in the folder: {', '.join(absent)}" if absent else None


def prepare(name: str, folder: Path, scratch: Path, device: str) -> Contender:
    """Unpacks the rival's archives and loads it. For a process that does nothing else."""
    rival = RIVALS[name]
    if reason := missing(rival, folder):
        raise FileNotFoundError(reason)
    for requirement in rival.requirements:
        archive, place = find(requirement, folder), scratch / requirement.split("==")[0]
        if archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(place)
            sys.path.insert(0, str(place))
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(place, filter="data")
            sys.path.insert(0, str(next(place.iterdir())))  # an sdist's one folder
    if device == "cpu":  # Triton's interpreter takes the GPU's place and has no current device
        torch.cuda.device = lambda *_: contextlib.nullcontext()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return rival.load(find(rival.requirements[0], folder).name)


def bare(*packages: str) -> None:
    """Enters packages of the unpacked archives without running their __init__ files."""
    for package in packages:
        module = types.ModuleType(package)
        folders = [Path(entry, *package.split(".")) for entry in sys.path]
        module.__path__ = [str(folder) for folder in folders if folder.is_dir()]
        enter(package, module)


def enter(name: str, module: types.ModuleType) -> None:
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


def stand_in(name: str, **members: object) -> None:
    """Replaces a module that is not in the archives, or that imports too much."""
    module = types.ModuleType(name)
    vars(module).update(members)
    enter(name, module)


def only_logprob(cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    return lambda logits, target: {"logprob": -cross_entropy(logits, target)}


def trl(source: str) -> Contender:
    bare("trl", "trl.kernels")
    kernel = import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    return Contender("TRL", source, {"token_stats": named(kernel)}, read_once)


def liger_vocab_parallel(source: str) -> Contender:
    bare("liger_kernel", "liger_kernel.ops")
    op = import_module("liger_kernel.ops.vocab_parallel_cross_entropy").LigerVocabParallelCEFunction

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return op.apply(logits[None], target[None], None, -100, 0.0, "pytorch", "global")[0]

    def traffic(workload: str, backward: bool, size: int) -> float:
        cast = size + 4 if size < 4 else 0
        return 2 * size + 4 + (8 + cast if backward else 0)  # maximum, exponentials; in place, and the cast

    return Contender("Liger vocab-parallel CE", source, {"token_stats": only_logprob(cross_entropy)}, traffic)


def liger_cross_entropy(source: str) -> Contender:
    bare("liger_kernel", "liger_kernel.ops")
    op = import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return op.apply(logits, target, None, -100, 0.0, 0.0, "none", None, False, False, False)[0]

    note = "computes the gradient in the forward pass, over the logits"
    functions = {"token_stats": only_logprob(cross_entropy)}
    return Contender("Liger CE", source, functions, note=note, overwrites=lambda dtype, backward: backward)


def flash_attention(source: str) -> Contender:
    bare("flash_attn", "flash_attn.ops", "flash_attn.ops.triton")
    loss = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    functions = {"token_stats": only_logprob(lambda logits, target: loss(logits, target)[0])}
    return Contender("flash-attention CE", source, functions, read_once)


def transformer_engine(source: str) -> Contender:
    bare("transformer_engine", "transformer_engine.common", "transformer_engine.common.triton",
         "transformer_engine.pytorch", "transformer_engine.pytorch.triton")  # fmt: skip
    stand_in("transformer_engine.pytorch.jit", no_torch_dynamo=lambda *_, **__: lambda function: function)
    op = import_module("transformer_engine.pytorch.cross_entropy").CrossEntropyFunction

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return op.apply(logits[None], target[None], 0.0, False, None, -100, False)[0]

    return Contender(
        "Transformer Engine CE", source, {"token_stats": only_logprob(cross_entropy)},
        lambda workload, backward, size: 4 * size if backward else 2 * size, "copies the logits in the forward pass",
    )  # fmt: skip


def _megatron() -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron-Core's cross-entropy over a tensor-parallel group of one rank."""
    bare("megatron", "megatron.core", "megatron.core.tensor_parallel", "megatron.core.fusions")
    stand_in(
        "megatron.core.parallel_state",
        get_tensor_model_parallel_group=lambda *_, **__: dist.group.WORLD,
        get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
    )
    stand_in(
        "megatron.core.utils",
        divide=lambda a, b: a // b,
        get_tensor_model_parallel_group_if_none=lambda group, **_: group,
        is_torch_min_version=lambda *_, **__: True,
    )
    loss = import_module("megatron.core.tensor_parallel.cross_entropy").vocab_parallel_cross_entropy
    sys.modules["megatron.core.tensor_parallel"].vocab_parallel_cross_entropy = loss
    return loss


def megatron(source: str) -> Contender:
    loss = _megatron()
    functions = {"token_stats": only_logprob(lambda logits, target: loss(logits[:, None], target[:, None])[:, 0])}
    note = "writes over fp32 logits"
    return Contender("Megatron-Core CE", source, functions, note=note, overwrites=is_fp32)


def megatron_fused(source: str) -> Contender:
    _megatron()
    loss = import_module("megatron.core.fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits[:, None], target[:, None], dist.group.WORLD)[:, 0]

    functions = {"token_stats": only_logprob(cross_entropy)}
    note = "writes over fp32 logits; its gradient is bf16 for every dtype"
    return Contender("Megatron-Core fused CE", source, functions, note=note, overwrites=is_fp32)


def is_fp32(dtype: torch.dtype, backward: bool) -> bool:
    return dtype == torch.float32


def verl(source: str) -> Contender:
    """What its Megatron actor does: entropy of the logits, log-probability of a copy of them."""
    _megatron()
    bare("verl", "verl.utils", "verl.utils.megatron")
    module = import_module("verl.utils.megatron.tensor_parallel")

    def function(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = logits.float()[:, None]  # Megatron's Float16Module returns fp32 logits
        copy = logits.clone()
        entropy = module.vocab_parallel_entropy(logits)[:, 0]
        logprob = module.vocab_parallel_log_probs_from_logits(copy, target[:, None])[:, 0]
        return {"logprob": logprob, "entropy": entropy}

    note = (
        "with Megatron-Core's cross-entropy, on fp32 logits as its Megatron actor has them; restores them in backward"
    )
    return Contender("verl", source, {"token_stats": function}, note=note, overwrites=is_fp32)


def verl_fsdp(source: str, padded: bool = False) -> Contender:
    """What its FSDP engine does at temperature 1, with padding removed or with padded rows, which it copies."""
    bare("verl", "verl.utils", "flash_attn", "flash_attn.ops", "flash_attn.ops.triton")
    stand_in("verl.utils.device", get_device_name=lambda: "cuda", get_torch_device=lambda: torch.cuda)
    stand_in("tensordict", TensorDict=object)
    module = import_module("verl.utils.torch_functional")

    def function(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        entropy = module.entropy_from_logits(logits)
        if padded:
            logits = torch.cat(list(logits[None]))
        return {"logprob": module.logprobs_from_logits(logits, target, inplace_backward=padded), "entropy": entropy}

    kernel = "flash-attention's" if module.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE else "torch's"
    note = f"{kernel} cross-entropy and entropy in plain torch, in the dtype of the logits"
    return Contender("verl FSDP, padded" if padded else "verl FSDP", source, {"token_stats": function}, note=note)


def areal(source: str) -> Contender:
    bare("areal", "areal.utils", "areal.utils.functional", "areal.infra")
    stand_in("areal.infra.platforms", is_npu_available=False)
    op = import_module("areal.utils.functional.vocab_parallel")._VocabParallelLogProbsEntropy
    function = named(lambda logits, target: op.apply(logits.float(), target, dist.group.WORLD))
    return Contender("AReaL", source, {"token_stats": function}, note="casts the logits to fp32, as it does itself")


def cut_cross_entropy(source: str) -> Contender:
    loss = import_module("cut_cross_entropy").linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"logprob": -loss(hidden, weight, target, reduction="none")}

    note = "does not store the logits; leaves small gradients out, by its default"
    return Contender("cut-cross-entropy", source, {"lm_head": function}, note=note)


def verl_linear(source: str) -> Contender:
    bare("verl", "verl.utils", "verl.utils.kernel")
    stand_in(
        "verl.utils.device",
        get_device_capability=lambda device_id=0: torch.cuda.get_device_capability(device_id),
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
        is_cuda_available=torch.cuda.is_available(),
    )
    op = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    function = named(lambda hidden, weight, target: op(hidden, weight, target, 1.0, "none"))
    return Contender("verl linear CE", source, {"lm_head": function}, note="does not store the logits")


def trl_head(source: str) -> Contender:
    bare("trl", "trl.kernels", "trl.trainer")
    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())
    op = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return op.apply(hidden, weight, None, target, 1.0, HEAD_COLUMNS, None, 1.0, ("entropy",))

    note = f"tiles of 4,096 tokens and {HEAD_COLUMNS:,} columns, made again in backward"
    return Contender("TRL chunked head", source, {"lm_head": named(function)}, note=note)


def verl_head(source: str) -> Contender:
    bare("verl", "verl.utils", "verl.utils.experimental")
    op = import_module("verl.utils.experimental.torch_functional").FusedLinearForPPOFunction
    note = "chunks of 512 tokens in plain torch, made again in backward; sums the gradient of the weight in its dtype"
    return Contender("verl chunked head", source, {"lm_head": named(op.apply)}, note=note)


def liger_head(source: str) -> Contender:
    bare("liger_kernel", "liger_kernel.ops")
    op = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")._FusedLinearPPOFallbackFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
        nll, entropy = op.apply(hidden, weight, target, 1.0, -100, True)[:2]
        return {"logprob": -nll, "entropy": entropy}

    note = "its fallback (chunks of 512 tokens in plain torch): the kernels for sm_90 need cutlass-dsl"
    return Contender("Liger fused linear", source, {"lm_head": function}, note=note)


LIGER, MEGATRON, VERL = "liger-kernel==0.8.5", "megatron-core==0.16.1", "verl==0.9.1"
FLASH = "flash-attn==2.8.3.post2"
# In the order in which they run, the most important first.
RIVALS = {
    "TRL": Rival(("trl==1.16.0",), trl),
    "verl": Rival((VERL, MEGATRON), verl),
    "verl FSDP": Rival((VERL, FLASH), verl_fsdp),
    "verl FSDP, padded": Rival((VERL, FLASH), partial(verl_fsdp, padded=True)),
    "Liger vocab-parallel CE": Rival((LIGER,), liger_vocab_parallel),
    "Megatron-Core CE": Rival((MEGATRON,), megatron),
    "flash-attention CE": Rival((FLASH,), flash_attention),
    "Transformer Engine CE": Rival(("transformer-engine==2.20.2",), transformer_engine),
    "cut-cross-entropy": Rival(("cut-cross-entropy==25.1.1",), cut_cross_entropy),
    "verl linear CE": Rival((VERL,), verl_linear),
    "TRL chunked head": Rival(("trl==1.16.0",), trl_head),
    "Liger fused linear": Rival((LIGER,), liger_head),
    "verl chunked head": Rival((VERL,), verl_head),
    "AReaL": Rival(("areal==1.0.4",), areal),
    "Liger CE": Rival((LIGER,), liger_cross_entropy),
    "Megatron-Core fused CE": Rival((MEGATRON,), megatron_fused),
}
