"""Builds ranks of Megatron models alone in this process, behind a process group that does nothing, and weighs them.

`python -m tests.support.built_models JOBS` reads a JSON list of jobs and prints a list of results. A job with
"weigh": "meta" builds one rank's module of a model of any size on the meta device and counts parameters; "optimizer"
builds a small one with its distributed optimizer, takes a step, and adds up the bytes of what is really there; "recipe"
builds what a recipe asks for: its model at full size on the meta device, and its whole actor with one narrow layer a
stage; "cuda" makes the TransformerConfig of a GPU, with a stand-in for Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from torch.testing._internal.distributed.fake_pg import FakeStore

from entcov.objective.tokens import PolicyLossConfig
from entcov.plan.model_shapes import PUBLISHED
from entcov.rl.config import ActorConfig, MegatronConfig
from entcov.rl.load_config import load_config
from megatron_integration import cpu
from megatron_integration.actor import MegatronActor
from megatron_integration.bridge import build_model, make_bridge
from megatron_integration.node import Node
from megatron_integration.process_groups import ProcessGroups


def run(job: dict) -> dict:
    if job["weigh"] == "recipe":
        return _build_recipe(job)
    if job["weigh"] == "cuda":
        return _cuda_config(job)
    megatron = MegatronConfig(**job["megatron"])
    device = "meta" if job["weigh"] == "meta" else "cpu"
    with _rank(megatron, job["stage"], job.get("data_parallel", 1), device) as layout:
        model, bridge = _build(job["config"], megatron, layout, job["dtype"])
        parameters = sum(p.numel() for p in model.parameters())
        if job["weigh"] == "meta":
            return {"parameters": parameters}
        actor = MegatronActor(
            model, bridge, layout, ActorConfig(), megatron, PolicyLossConfig(), [], temperature=1.0
        )  # fmt: skip
        return {"parameters": parameters} | _weigh_optimizer(model, actor, layout)


def _build_recipe(job: dict) -> dict:
    config = load_config(job["recipe"], job["overrides"])
    megatron, dtype = config.megatron, config.model.compute_dtype
    tp, pp = megatron.tensor_parallel, megatron.pipeline_parallel
    whole = PUBLISHED[config.model.path] if config.model.path else config.model.config
    whole = {key: value for key, value in whole.items() if value is not None}
    narrow = whole | {
        "num_hidden_layers": pp, "hidden_size": 16 * tp, "intermediate_size": 16 * tp, "num_attention_heads": 2 * tp,
        "num_key_value_heads": tp, "head_dim": 8, "vocab_size": 256,
    }  # fmt: skip
    parameters, trained = [], []
    for stage in range(pp):
        with _rank(megatron, stage, 1, "meta") as layout:
            model, _ = _build(whole, megatron, layout, dtype)
            parameters.append(sum(p.numel() for p in model.parameters()))
        with _rank(megatron, stage, 2, "cpu") as layout:
            model, bridge = _build(narrow, megatron, layout, dtype)
            actor = MegatronActor(
                model, bridge, layout, config.actor, megatron, config.loss, config.build_controls(),
                temperature=config.rollout.temperature,
            )  # fmt: skip
            trained.append(sum(p.requires_grad for p in actor.model.parameters()))
    return {"parameters": parameters, "trained": trained, "controls": [c.name for c in config.build_controls()]}


def _cuda_config(job: dict) -> dict:
    megatron = MegatronConfig(**job["megatron"])
    stand_ins = {"transformer_engine": ModuleType("transformer_engine")}
    found = ["fused_weight_gradient_mlp_cuda"] if job["apex"] else []
    find_spec = importlib.util.find_spec
    with (
        _rank(megatron, 0, 1, "cuda") as layout,
        patch.dict(sys.modules, stand_ins),
        patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", lambda *args: None),
        patch.object(importlib.util, "find_spec", lambda name, *args: name in found or find_spec(name, *args)),
    ):
        config = _bridge(job["config"], megatron, layout, "bfloat16").config
    return {name: getattr(config, name) for name in sorted(vars(config)) if "fusion" in name}


@contextmanager
def _rank(megatron: MegatronConfig, stage: int, data_parallel: int, device: str) -> Iterator[ProcessGroups]:
    """The layout of a stage's first rank, in groups that do nothing."""
    tp, pp, cp = megatron.tensor_parallel, megatron.pipeline_parallel, megatron.context_parallel
    world = tp * pp * cp * data_parallel
    dist.init_process_group("fake", store=FakeStore(), rank=stage * (world // pp), world_size=world)
    with _no_gloo():
        parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    cpu.seed_everything(0)
    try:
        yield ProcessGroups(
            device=torch.device(device),
            replicas=data_parallel,
            replica=0,
            context_parallel=cp,
            data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            batch_group=parallel_state.get_data_parallel_group(),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            context_group=parallel_state.get_context_parallel_group() if cp > 1 else None,
            control=dist.group.WORLD,
            node=Node(dist.group.WORLD),
            sampling=dist.group.WORLD,
            sampling_node=Node(dist.group.WORLD),
            node_leaders=(0,),
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build(config: dict, megatron: MegatronConfig, layout: ProcessGroups, dtype: str):
    bridge = _bridge(config, megatron, layout, dtype)
    with layout.device:
        return build_model(bridge, layout), bridge


def _bridge(config: dict, megatron: MegatronConfig, layout: ProcessGroups, dtype: str):
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoConfig.for_model(**config).save_pretrained(folder)
        return make_bridge(folder, megatron, layout, dtype=getattr(torch, dtype))


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


def _weigh_optimizer(model, actor: MegatronActor, layout: ProcessGroups) -> dict:
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
