"""Builds ranks of Megatron models alone in this process, behind a process group that does nothing, and weighs them.

`python -m tests.built_models JOBS` reads a JSON list of jobs and prints a list of results. A job with "weigh": "meta"
builds one rank's module of a model of any size on the meta device and counts parameters; "optimizer" builds a small one
with its distributed optimizer, takes a step, and adds up the bytes of what is really there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from entcov.losses import PolicyLossConfig
from entcov.rl.config import ActorConfig, MegatronConfig
from megatron_integration import cpu
from megatron_integration.actor import MegatronActor
from megatron_integration.layout import Layout
from megatron_integration.model import build_model, make_bridge


def run(job: dict) -> dict:
    megatron = MegatronConfig(**job["megatron"])
    tp, pp = megatron.tensor_parallel, megatron.pipeline_parallel
    world = tp * pp * job.get("data_parallel", 1)
    # Ranks of one stage are consecutive tensor-parallel ones, then data-parallel ones.
    rank = job["stage"] * (world // pp)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    with _no_gloo():
        parallel_state.initialize_model_parallel(tp, pp)
    cpu.seed_everything(0)
    layout = Layout(
        device=torch.device("meta" if job["weigh"] == "meta" else "cpu"),
        replicas=job.get("data_parallel", 1),
        replica=0,
        context_parallel=1,
        tensor_group=parallel_state.get_tensor_model_parallel_group() if tp > 1 else None,
        data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        control=dist.group.WORLD,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            transformers.AutoConfig.for_model(**job["config"]).save_pretrained(folder)
            bridge = make_bridge(folder, megatron, layout, dtype=getattr(torch, job["dtype"]))
        with layout.device:
            model = build_model(bridge, layout)
        parameters = sum(p.numel() for p in model.parameters())
        if job["weigh"] == "meta":
            return {"parameters": parameters, "built": type(model).__name__}
        return {"parameters": parameters} | _weigh_optimizer(model, bridge, layout, megatron)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _no_gloo():
    """The groups that Megatron-Core wants on gloo do nothing either: the other ranks are not there to join them."""
    create = parallel_state.create_group

    def create_fake(*args, **kwargs):
        return create(*args, **kwargs | ({"backend": "fake"} if kwargs.get("backend") == "gloo" else {}))

    parallel_state.create_group = create_fake
    try:
        yield
    finally:
        parallel_state.create_group = create


def _weigh_optimizer(model, bridge, layout: Layout, megatron: MegatronConfig) -> dict:
    actor = MegatronActor(
        model, bridge, layout, ActorConfig(), megatron, PolicyLossConfig(), [], temperature=1.0
    )  # fmt: skip
    buffers = actor.model.buffers
    with layout.running():
        actor.model.zero_grad_buffer()
        actor.optimizer.zero_grad()
        actor.optimizer.prepare_grads()
        actor.optimizer.step()
    optimizers = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    kept: dict[int, int] = {}  # by storage: main weights that are views of weights count with the weights
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for one in optimizers:
        for group in one.optimizer.param_groups:
            for main in group["params"]:
                for tensor in (main, *one.optimizer.state[main].values()):
                    if torch.is_tensor(tensor) and tensor.dim() and tensor.untyped_storage().data_ptr() not in weights:
                        kept[tensor.data_ptr()] = tensor.nbytes
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(kept.values()),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
