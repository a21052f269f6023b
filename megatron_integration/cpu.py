"""Lets Megatron-Core run without CUDA, and on a GPU without Transformer Engine (the last two).

Megatron-Core names the CUDA device literally in a few dozen places, takes its attention and norms from Transformer
Engine, and keeps random states on the GPU. This file has
    `on_cpu()`          a context in which those literals mean the CPU; at its end all changes are undone
    `layer_specs()`     local layers whose norm and attention support packed sequences, context and sequence parallelism
    `CONFIG`            the TransformerConfig fields that switch CUDA kernels off
so that any layout runs on a laptop, with gloo, in float32: slowly, and exactly enough to compare with one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONFIG = {
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "batch_p2p_sync": False,
    "batch_p2p_comm": False,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Maps device="cuda" to the CPU, and lets CPU tensors pass the optimizers' checks of their type's name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, Megatron-Core's references to the current CUDA device mean the CPU. May be nested.

    Raises:
        RuntimeError: CUDA is available; the context would send work to the wrong device.
    """
    if torch.cuda.is_available():
        raise RuntimeError("on_cpu: CUDA is available, and Megatron-Core needs no adaptation to it")
    changed = {
        (torch.cuda, "current_device"): lambda: torch.device("cpu"),
        (torch.cuda, "synchronize"): lambda device=None: None,
        (torch.cuda, "empty_cache"): lambda: None,
        # Activation recomputation saves and restores the GPU's random state; without dropout nothing draws from it.
        (megatron_random, "_get_cuda_rng_state"): lambda *args, **kwargs: torch.zeros(0, dtype=torch.uint8),
        (megatron_random, "_set_cuda_rng_state"): lambda *args, **kwargs: None,
    }
    before = {place: getattr(*place) for place in changed}
    for (owner, name), value in changed.items():
        setattr(owner, name, value)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def seed_everything(seed: int) -> None:
    """The tracker for inference keeps no GPU states: right where dropout is 0 and weights are made on the CPU."""
    megatron_random.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)


def layer_specs(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """This pipeline stage's layers, from Megatron-Core's local layer specification."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


class RMSNorm(nn.Module):
    """RMSNorm whose weight is marked as replicated under sequence parallelism: its gradient is summed over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class CausalAttention(MegatronModule):
    """Causal attention by torch's kernel, for rows of equal length or packed sequences, also under context parallelism.

    Under context parallelism rank r holds chunks r and 2 C - 1 - r of the 2 C chunks of each sequence, as Transformer
    Engine does; keys and values of all chunks are gathered, queries stay.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_unused
    ):
        super().__init__(config)
        self.scale = softmax_scale
        self.group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {}

    def forward(self, query, key, value, attention_mask, *, packed_seq_params=None, **_unused):
        """Rows: [S, B, heads, dim] -> [S, B, heads * dim]. Packed: [T, heads, dim] -> [T, heads * dim]."""
        size = self.group.size()
        if packed_seq_params is None:
            lengths = [query.shape[0]]
        else:
            starts = packed_seq_params.cu_seqlens_q
            lengths = [n // size for n in starts.diff().tolist()]
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        out = torch.cat([self._attend(*part) for part in parts]).flatten(2)
        return out if packed_seq_params is None else out[:, 0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One sequence (or several of equal length): [n, B, heads, dim]."""
        mask = None
        if (size := self.group.size()) > 1:
            rank, half = self.group.rank(), query.shape[0] // 2
            key, value = (_in_order(_Gather.apply(x, self.group), size) for x in (key, value))
            at = torch.arange(half, device=query.device)
            at = torch.cat([rank * half + at, (2 * size - 1 - rank) * half + at])
            mask = at[:, None] >= torch.arange(key.shape[0], device=query.device)
        heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3)


def _in_order(gathered: Tensor, size: int) -> Tensor:
    """Rank after rank's two chunks -> the 2 * size chunks in the sequence's order."""
    chunks = gathered.chunk(2 * size)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])


class _Gather(torch.autograd.Function):
    """All-gather along dim 0, whose backward sums each rank's part.

    torch.distributed.nn's own has a backward that takes a rank of the group for a global one: wrong in subgroups.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
