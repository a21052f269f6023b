"""Weights and optimizer state in Megatron's distributed checkpoint format, loadable at any other parallel layout.

Every rank writes its own shard. Loading is bit-exact at any layout. At another layout than that of the save, training
then differs by rounding, because sums are split differently.

Megatron-Core 0.16's distributed optimizer, where Adam is torch's (no Transformer Engine, no Apex), loads wrongly in
three ways: it asserts that a step was taken, it looks for each parameter's step where none was stored, and it gives
all parameters one step tensor, which each of them then counts up. `_torch_adam_loads_rightly` corrects all three. The
step counts are checked after any load: a wrong one means a wrong bias correction, which no error would show.
"""

import errno
import queue
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from entcov import arguments as check
from entcov.rl.record.checkpoint import CheckpointError
from megatron_integration.actor import MegatronModel
from megatron_integration.bridge import unwrapped
from megatron_integration.node import PeerError

# gloo gathers optimizer state in the CPU memory of one data-parallel rank; else every GPU would need room for it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}
_COMMON = "entcov"


def save_sharded(actor: MegatronModel, folder: Path) -> None:
    """Writes this rank's shard into `folder`. Collective; returns when every rank's shard is on the disk."""
    actor.gather_parameters()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=actor.groups.control)
    with actor.groups.running(), _results_in_this_process():
        try:
            dist_checkpointing.save(_tree(actor, is_loading=False), str(folder))
        except CheckpointException as failure:  # it is no Exception, so nothing would report it
            raise _write_failure(failure, folder) from failure
    dist.barrier(group=actor.groups.control)


def _write_failure(failure: CheckpointException, folder: Path) -> Exception:
    """The error of a rank's file system with its errno. Megatron-Core keeps it as text, and only on one rank."""
    if not failure.failures:
        return PeerError(f"another rank could not write {folder}")
    said = "; ".join(f"rank {rank}: {error}" for rank, (error, _) in failure.failures.items())
    number = re.search(r"\[Errno (\d+)\]", said)
    return OSError(int(number[1]) if number else errno.EIO, f"cannot write {folder}: {check.one_line(said)}")


@contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Collects the results of a save in this process. Megatron-Core would start a manager process for them, which takes
    seconds, needs a main module that can be imported again, and outlives a rank that is killed."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def load_sharded(actor: MegatronModel, folder: Path) -> None:
    """Fills the actor's weights, optimizer and weight_version from `folder`. Collective.

    Raises:
        CheckpointError: nothing that `save_sharded` wrote, or another kind of optimizer (distributed or not, and the
            parameters' dtype, must be as at the save), or what was loaded does not fit together.
    """
    if not (folder / "common.pt").exists():
        raise CheckpointError(f"{folder}: holds no checkpoint of the megatron backend")
    common = dist_checkpointing.load_common_state_dict(str(folder))[_COMMON]
    kind = _kind(actor)
    if common["kind"] != kind:
        raise CheckpointError(
            f"{folder}: was saved with {common['kind']}, this run has {kind}; megatron.distributed_optimizer and "
            "model.compute_dtype must be those of the save"
        )
    actor.weight_version = common["weight_version"]
    with actor.groups.running(), _torch_adam_loads_rightly(actor):
        state = dist_checkpointing.load(_tree(actor, is_loading=True), str(folder))
        unwrapped(actor.model).load_state_dict(state["model"], strict=True)
        if actor.weight_version:
            actor.optimizer.load_state_dict(state["optimizer"])
        else:
            actor.optimizer.reload_model_params()
    _check_steps(actor, folder)


def _tree(actor: MegatronModel, *, is_loading: bool) -> dict[str, Any]:
    model = unwrapped(actor.model).sharded_state_dict()
    tree: dict[str, Any] = {"model": model, _COMMON: {"weight_version": actor.weight_version, "kind": _kind(actor)}}
    if actor.weight_version:  # before its first step an optimizer has no state
        tree["optimizer"] = actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
    return tree


def _kind(actor: MegatronModel) -> str:
    which = "the distributed optimizer" if actor.megatron.distributed_optimizer else "the plain optimizer"
    return f"{which} on {str(actor.bridge.dtype).removeprefix('torch.')} parameters"


def _inner(actor: MegatronModel) -> list[Any]:
    return getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])


@contextmanager
def _torch_adam_loads_rightly(actor: MegatronModel) -> Iterator[None]:
    """Corrects how the actor's distributed optimizers over torch's Adam load. No other optimizer is changed."""
    optimizers = [
        o for o in _inner(actor)
        if isinstance(o, DistributedOptimizer) and isinstance(o.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]  # fmt: skip
    if optimizers and actor.weight_version and not optimizers[0].optimizer.state:
        _take_an_empty_step(actor)
    try:
        for optimizer in optimizers:
            optimizer._set_main_param_and_optimizer_states = _tolerating_no_step(optimizer)
            optimizer.load_state_dict = _with_own_steps(optimizer)
        yield
    finally:
        for optimizer in optimizers:
            for name in ("_set_main_param_and_optimizer_states", "load_state_dict"):
                optimizer.__dict__.pop(name, None)


def _take_an_empty_step(actor: MegatronModel) -> None:
    """Makes the optimizer's state, without changing a weight: no gradient, and a learning rate of 0."""
    groups = actor.optimizer.param_groups
    before = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    actor.model.zero_grad_buffer()
    actor.optimizer.step()
    for group, lr in zip(groups, before, strict=True):
        group["lr"] = lr


def _tolerating_no_step(optimizer: DistributedOptimizer):
    """Loads a parameter's state although its step is not stored: the step is restored with the parameter groups."""
    inner = type(optimizer)._set_main_param_and_optimizer_states

    def set_states(model_param, tensors):
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        inner(optimizer, model_param, {"step": state["step"].clone(), **tensors})

    return set_states


def _with_own_steps(optimizer: DistributedOptimizer):
    inner = type(optimizer).load_state_dict

    def load(state_dict):
        inner(optimizer, state_dict)
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()

    return load


def _check_steps(actor: MegatronModel, folder: Path) -> None:
    """Raises unless every parameter's own step count is the number of optimizer steps taken."""
    steps = [step for optimizer in _inner(actor) for step in _steps(optimizer.optimizer)]
    tensors = [step for step in steps if isinstance(step, torch.Tensor)]
    wrong = sorted({float(step) for step in steps} - {float(actor.weight_version)})
    holds = any(group["params"] for o in _inner(actor) if o.optimizer is not None for group in o.optimizer.param_groups)
    if actor.weight_version and holds and not steps:
        raise CheckpointError(f"{folder}: the optimizer's steps could not be read after loading")
    if wrong or len({id(step) for step in tensors}) < len(tensors):
        raise CheckpointError(
            f"{folder}: the optimizer was not restored: every parameter must have its own step count of "
            f"{actor.weight_version}, found {wrong or 'one that several share'}"
        )


def _steps(optimizer: Any) -> Iterator[Any]:
    """Step counts: torch's Adam has one a parameter, Transformer Engine's one a group."""
    if optimizer is None:
        return
    for state in optimizer.state.values():
        if "step" in state:
            yield state["step"]
    for group in optimizer.param_groups:
        if group["params"] and "step" in group:
            yield group["step"]
