"""The parts of `weight_sync` that need vLLM: a receiver of weights from memory or a file, and senders between GPUs.

Importing it registers the receiver as weight-transfer backend "entcov". A server gets it by
`--worker-extension-cls entcov.rl.vllm.transfer.WorkerExtension`, which makes its workers import this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from entcov.rl.vllm.weight_sync import Engine, Stream, Weight, check_weights_file

BACKEND = "entcov"


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """Nothing has to be arranged."""


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    """Exactly one of the two."""

    weights: Any = None  # [(name, tensor)], by reference: a layer's tensors are read when the last of them is here
    path: str | None = None  # a safetensors file

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.path is None):
            raise ValueError("update_info: exactly one of weights and path must be given")


class Receiver(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Loads full tensors under their Hugging Face names, taking this worker's shard, as vLLM's own backends do."""

    init_info_cls, update_info_cls = _InitInfo, _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        weights = update_info.weights
        if weights is None:
            from safetensors.torch import load_file

            weights = load_file(check_weights_file(update_info.path)).items()
        with disable_mtp_completeness_check():
            self.model.load_weights(iter(weights))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_heads(self.model)

    def shutdown(self) -> None:
        pass


def _repack_heads(model: nn.Module) -> None:
    """Packs the output layer's weights for the CPU's matrix product once more.

    vLLM 0.32 packs a layer again when it has received its weights. A head that is tied to the embedding receives none,
    and would keep computing with the packed copy of the old ones.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear") and not module.weight.is_meta:
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension:
    """Makes a server's workers import this module, which registers the receiver."""


if BACKEND not in WeightTransferEngineFactory._registry:  # a spawned worker may import this module twice
    WeightTransferEngineFactory.register_engine(BACKEND, Receiver)


class _Source(WeightSource):
    """One update's weights as vLLM's senders read them."""

    def __init__(self) -> None:
        self.weights: Sequence[Weight] = ()
        self.stream: Stream = iter(())

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(weight.name, weight.dtype, weight.shape) for weight in self.weights]

    def __iter__(self) -> Stream:
        stream, self.stream = self.stream, iter(())
        return stream


class _Versioned:
    """The engine as a VLLMWeightSyncClient that adds the version to each update: vLLM's own senders give none."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.version: str | None = None
        self.init_weight_transfer_engine = engine.init_weight_transfer_engine
        self.start_weight_update = engine.start_weight_update
        self.update_weights = engine.update_weights

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.engine.finish_weight_update(weight_version or self.version)


class Native:
    """vLLM's senders between GPUs: "nccl" to other GPUs, "ipc" to another process on the trainer's own GPU.

    Rank 0 of the trainer sends; the other ranks only iterate over their weights.

    Args:
        backend: what the server was started with.
        workers: processes of the server that hold weights (tensor x pipeline x data parallel).
    """

    def __init__(self, backend: str, workers: int) -> None:
        self.backend, self.workers = backend, workers
        self._source = _Source()
        self._client: _Versioned | None = None
        self._sender: Any = None

    def send(self, engine: Engine, weights: Sequence[Weight], stream: Stream, version: str) -> None:
        self._source.weights, self._source.stream = weights, stream
        if self._sender is None:
            self._client = _Versioned(engine)
            self._sender = WeightTransferTrainerFactory.trainer_init(
                self._init_info(), client=self._client, source=self._source
            )
        self._client.version = version
        self._sender.send_weights()

    def _init_info(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=rank, packed=True)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        return NCCLTrainerInitInfo(
            rank=rank, master_address=get_ip(), master_port=get_open_port(), world_size=1 + self.workers, packed=True
        )
