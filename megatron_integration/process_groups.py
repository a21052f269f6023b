"""Process groups for tensor, pipeline, context and data parallelism, and the device of this process."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from entcov.rl.config import MegatronConfig
from entcov.rl.recipe import ConfigError
from megatron_integration.cpu import on_cpu, seed_everything
from megatron_integration.node import Node, from_first, ranks_by_node

T = TypeVar("T")
# Ranks wait for each other while one generates or checks answers, which may take hours. A rank that dies is noticed at
# once, by its closed connections and by torchrun; this bound is only for a rank that hangs.
_PATIENCE = timedelta(hours=12)


def start_processes(device: str = "auto") -> torch.device:
    """Joins the processes that torchrun started; the device of this one.

    Raises:
        RuntimeError: the process was not started by torchrun (or something else that sets RANK and WORLD_SIZE).
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} must be set: start the processes with "
            "torchrun --nproc-per-node=N -m megatron_integration train RECIPE"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place)
    else:
        place = torch.device("cpu")
        dist.init_process_group("gloo")
    return place


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this process. A replica is the tensor x pipeline x context parallel ranks that share a model copy.

    `control` is a gloo group of all ranks for everything but training; it waits for hours, where NCCL would time out.
    Rollouts may be sampled in another thread while a step goes on, so they have such groups of their own: collectives
    of two threads in one group would meet in any order.
    """

    device: torch.device
    replicas: int
    replica: int
    context_parallel: int
    data_group: dist.ProcessGroup  # same tensor and pipeline place, all data and context parallel ones
    batch_group: dist.ProcessGroup  # same tensor, pipeline and context place: one rank of each replica, in their order
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup | None  # the ranks that a sequence is divided over, if there are several
    control: dist.ProcessGroup
    node: Node
    sampling: dist.ProcessGroup  # as `control`
    sampling_node: Node  # as `node`
    node_leaders: tuple[int, ...]  # the first rank of every node

    @property
    def context_rank(self) -> int:
        return parallel_state.get_context_parallel_rank()

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    @property
    def replica_leader(self) -> bool:
        """Whether this rank is the first of its replica. Global rank 0 leads replica 0."""
        return not (
            parallel_state.get_tensor_model_parallel_rank()
            or parallel_state.get_pipeline_model_parallel_rank()
            or parallel_state.get_context_parallel_rank()
        )

    def running(self) -> AbstractContextManager[None]:
        """Everything that runs Megatron-Core goes inside; on a GPU it changes nothing."""
        return nullcontext() if self.device.type == "cuda" else on_cpu()

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """`make()` of rank 0 on every rank. Collective; if it fails there, the others raise PeerError."""
        return from_first(make, self.control)

    def destroy(self) -> None:
        """Frees the groups, so that others can be made of the same processes."""
        for group in (self.control, self.node.group, self.sampling, self.sampling_node.group):
            dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()


def make_process_groups(config: MegatronConfig, device: torch.device, *, seed: int = 0) -> ProcessGroups:
    """Divides the ranks of the default process group. Collective; `destroy` undoes it.

    Raises:
        ConfigError: the number of processes is not a multiple of a replica's size.
    """
    size = config.tensor_parallel * config.pipeline_parallel * config.context_parallel
    world = dist.get_world_size()
    if world % size:
        raise ConfigError(
            f"megatron: the number of processes must be a multiple of tensor_parallel * pipeline_parallel * "
            f"context_parallel = {config.tensor_parallel} * {config.pipeline_parallel} * {config.context_parallel}, "
            f"got {world}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        context_parallel_size=config.context_parallel,
    )
    if device.type == "cuda":
        model_parallel_cuda_manual_seed(seed)
    else:
        seed_everything(seed)
    control, sampling = _patient_group(), _patient_group()
    nodes = ranks_by_node(control)
    for ranks in nodes:
        groups = _patient_group(ranks), _patient_group(ranks)
        if dist.get_rank() in ranks:
            node, sampling_node = map(Node, groups)
    return ProcessGroups(
        device=device,
        replicas=world // size,
        replica=parallel_state.get_data_parallel_rank(),
        context_parallel=config.context_parallel,
        batch_group=parallel_state.get_data_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group() if config.context_parallel > 1 else None,
        control=control,
        node=node,
        sampling=sampling,
        sampling_node=sampling_node,
        node_leaders=tuple(ranks[0] for ranks in nodes),
    )


def _patient_group(ranks: list[int] | None = None) -> dist.ProcessGroup:
    """A gloo group of these ranks, None: of all. Collective of all ranks."""
    return dist.new_group(ranks, backend="gloo", timeout=_PATIENCE)
