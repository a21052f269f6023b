"""verl's Megatron engine in a TrainingWorker on a CPU: Megatron-Core's literals of CUDA mean the CPU, layers are local.

Changed are only: verl's seeding of GPUs, mbridge's layer specification and names of weights (megatron_integration has
them for the same purpose), the tokenizer (a stand-in with a padding id), and verl's refusal of float32.
"""

from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = {  # parameters whose gradients are compared: Megatron's names and Hugging Face's
    "output_layer.weight": "lm_head.weight",
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
}
_on_cpu: AbstractContextManager[None] | None = None


def start(model: str) -> None:
    """Adapts Megatron-Core, mbridge and verl to this process; after `worker.start`. A second call does nothing."""
    global _on_cpu
    if _on_cpu is not None:
        return
    from megatron_integration import bridge, cpu

    _on_cpu = cpu.on_cpu()
    _on_cpu.__enter__()
    from mbridge.models.qwen2 import Qwen2Bridge
    from transformers import AutoConfig
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.megatron import transformer_impl

    transformer_impl.set_random_seed = cpu.seed_everything
    members = bridge._overrides(Qwen2Bridge, AutoConfig.from_pretrained(model), True)
    for name in members.keys() - {"_build_base_config"}:
        setattr(Qwen2Bridge, name, members[name])
    EngineRegistry._engines["language_model"].setdefault("megatron", {})


def make_worker(
    model: str,
    *,
    sequence_parallel: bool = True,
    fused: str | None = None,
    entropy_coeff: float = 0.0,
    policy_loss: Any = None,
) -> Any:
    """A TrainingWorker in float32 whose ranks are all tensor-parallel; `policy_loss` as for `worker.make_worker`."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        HFModelConfig,
        McoreActorConfig,
        McoreEngineConfig,
        McoreOptimizerConfig,
        PolicyLossConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from megatron_integration import cpu

    engine_config = McoreEngineConfig(
        tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=sequence_parallel, use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2, infer_micro_batch_size_per_gpu=2, vanilla_mbridge=True,
        override_transformer_config={**cpu.CONFIG, "sequence_parallel": sequence_parallel},
    )  # fmt: skip
    object.__setattr__(engine_config, "dtype", "float32")
    model_config = HFModelConfig(
        path=model, load_tokenizer=False, use_remove_padding=True, enable_gradient_checkpointing=False,
        use_fused_kernels=fused is not None, fused_kernel_options={"impl_backend": fused},
        override_config={"attn_implementation": "eager"},
    )  # fmt: skip
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine_config,
            optimizer_config=McoreOptimizerConfig(lr=1e-3, total_training_steps=10, clip_grad=1.0),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    worker.engine.model_config.tokenizer = SimpleNamespace(pad_token_id=0)
    actor = McoreActorConfig(
        rollout_n=4, ppo_micro_batch_size_per_gpu=2, entropy_coeff=entropy_coeff,
        policy_loss=policy_loss or PolicyLossConfig(),
    )  # fmt: skip
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def step(worker: Any, batch: Any) -> dict[str, list[float]]:
    """Two updates of verl's trainer on 8 sequences; the gradient norms and losses, on the rank that verl asks."""
    from verl.utils import tensordict_utils as tu

    keys = {"mini_batch_size": 8, "global_batch_size": 8, "epochs": 2, "seed": 1, "compute_loss": True}
    output = worker.train_mini_batch(
        batch.local(**keys, dataloader_kwargs={"shuffle": False}, calculate_entropy=True, temperature=0.7)
    )
    if not worker.engine.is_mp_src_rank_with_outputs():
        return {}
    metrics = tu.get(output, "metrics")
    return {name: [float(x) for x in metrics[name]] for name in ("grad_norm", "loss")}


def gradients(engine: Any) -> dict[str, Tensor]:
    """The gradients of NAMES by Hugging Face's names, whole on every rank."""
    from megatron.core import parallel_state
    from verl.utils.megatron_utils import unwrap_model

    group, found = parallel_state.get_tensor_model_parallel_group(), {}
    for name, parameter in unwrap_model(engine.module[0]).named_parameters():
        if name in NAMES:
            grad = parameter.main_grad.detach().clone()
            if getattr(parameter, "tensor_model_parallel", False):
                shards = [torch.empty_like(grad) for _ in range(dist.get_world_size(group))]
                dist.all_gather(shards, grad, group=group)
                grad = torch.cat(shards)
            found[NAMES[name]] = grad
    return found
