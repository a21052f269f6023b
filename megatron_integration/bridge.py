"""Converts Hugging Face models to Megatron-Core and back, through mbridge.

Qwen2, Qwen2.5, Qwen3 and Llama, dense. Changes to mbridge: RoPE is read from transformers 5's
`rope_parameters`, a scaling that Megatron-Core would compute differently is refused, layers work without Transformer
Engine (cpu.py), and the padded vocabulary has one size for every tensor-parallel degree up to 128.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from mbridge.core import LLMBridge
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from entcov.rl.config import MegatronConfig
from entcov.rl.recipe import ConfigError
from entcov.rl.record.durable import as_os_error
from megatron_integration import cpu
from megatron_integration.process_groups import ProcessGroups

BRIDGES = {"qwen2": Qwen2Bridge, "qwen3": Qwen3Bridge, "llama": LLaMABridge}
_VOCABULARY_MULTIPLE = 128
_SHARD_BYTES = 5 << 30  # of one file of a Hugging Face checkpoint


def local_folder(name: str) -> str:
    """The folder of a model: `name` itself, or the cache of the hub's model of that name, downloaded if absent."""
    if Path(name).is_dir():
        return name
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return snapshot_download(name, allow_patterns=patterns)  # processes of one node wait for each other by file locks


def make_bridge(folder: str, config: MegatronConfig, groups: ProcessGroups, *, dtype: torch.dtype) -> LLMBridge:
    """The converter for the Hugging Face model in `folder`; `bridge.config` is the TransformerConfig.

    Args:
        folder: a local folder.
        dtype: of the parameters, torch.float32 or torch.bfloat16.

    Raises:
        ConfigError: an architecture, or a variant of one, that Megatron-Core would compute differently.
    """
    hf_config = AutoConfig.from_pretrained(folder)
    refuse_unsupported(hf_config, config)
    on_gpu = groups.device.type == "cuda"
    local = not on_gpu or config.transformer_impl == "local"
    base = BRIDGES[hf_config.model_type]
    bridge_class = type(f"Entcov{base.__name__}", (base,), _overrides(base, hf_config, local))
    extra: dict[str, Any] = {"deallocate_pipeline_outputs": True} if on_gpu else {}
    if local:
        extra |= cpu.CONFIG
    else:
        _need_transformer_engine()
        extra |= fusions()
    extra |= {
        "sequence_parallel": config.sequence_parallel,
        "calculate_per_token_loss": True,  # gradients are sums, divided once by the mini-batch's number of tokens
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if config.recompute == "selective":
        extra |= {"recompute_granularity": "selective"}
    elif config.recompute == "full":
        extra |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    multiple = math.lcm(_VOCABULARY_MULTIPLE, config.tensor_parallel)
    bridge_class._EXTRA = extra
    return bridge_class(hf_config, dtype=dtype, make_vocab_size_divisible_by=multiple)


def fusions() -> dict[str, bool]:
    """The TransformerConfig fields of fused kernels on a GPU, which Megatron-Core leaves off by default.

    bias_activation_fusion: SwiGLU keeps 3 values of its width a token for the backward pass in place of 5
    apply_rope_fusion: packed sequences; without it each layer reads their bounds on the host, twice
    gradient_accumulation_fusion: only where its kernel (Apex's, built apart) is there: the output layer demands it
    """
    return {
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "gradient_accumulation_fusion": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }


def build_model(bridge: LLMBridge, groups: ProcessGroups) -> MegatronModule:
    """This rank's shard of the model, on its device, with weights still to be loaded."""
    with groups.running():
        model = bridge._model_provider([])(
            parallel_state.is_pipeline_first_stage(ignore_virtual=True),
            parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        )
        for parameter in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        model = model.to(groups.device)
        if bridge.dtype is torch.bfloat16:
            model = Float16Module(bridge.config, model)
    return model


def load_hf_weights(bridge: LLMBridge, model: MegatronModule, folder: str, groups: ProcessGroups) -> None:
    """Fills the model from the safetensors in `folder`. Collective."""
    with groups.running(), torch.no_grad():
        bridge.load_weights([unwrapped(model)], folder, memory_efficient=True)  # one weight at a time


def named_weights(bridge: LLMBridge, model: MegatronModule, groups: ProcessGroups) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole weight) one at a time, each once. Collective: every rank iterates to the end."""
    seen = set()
    weights = bridge.export_weights([unwrapped(model)])
    while True:
        with groups.running(), torch.no_grad():  # not across the yield: the caller's work is not Megatron's
            item = next(weights, None)
        if item is None:
            return
        if item[0] not in seen:
            seen.add(item[0])
            yield item[0], item[1].detach()


def save_hf(
    bridge: LLMBridge, model: MegatronModule, groups: ProcessGroups, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes a folder that `from_pretrained` loads: safetensors of at most 5 GiB, configuration, tokenizer.

    The generation_config.json of the folder that the model came from is copied. Collective; rank 0 writes, and holds
    at most one file's tensors at a time.
    """
    weights = named_weights(bridge, model, groups)
    if dist.get_rank() != 0:
        for _ in weights:
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    written: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        shard = folder / f"shard-{len(written)}"
        with as_os_error(shard):
            save_file(held, shard, metadata={"format": "pt"})
        written.append(list(held))
        held.clear()

    for name, weight in weights:
        if held and size + weight.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        held[name] = weight.to("cpu", copy=True).contiguous()  # export yields views of tensors it will reuse
        size, total = size + weight.nbytes, total + weight.nbytes
    flush()
    names = ["model.safetensors"]
    if len(written) > 1:
        names = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, keys in zip(names, written, strict=True) for key in keys},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    bridge.hf_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (generation := Path(bridge.hf_config.name_or_path) / "generation_config.json").exists():
        shutil.copyfile(generation, folder / generation.name)


def unwrapped(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module
    return model


def _overrides(base: type, hf_config: PretrainedConfig, local: bool) -> dict[str, Any]:
    """The members of our subclass of an mbridge class. The mapping is copied, because mbridge edits the class's."""

    def build_base_config(self, *args, **kwargs):
        self.extra_args = {**self._EXTRA, **self.extra_args}
        return base._build_base_config(self, *args, **kwargs)

    members: dict[str, Any] = {
        "_DIRECT_MAPPING": dict(base._DIRECT_MAPPING),
        "_adjust_mapping_for_shared_weights": lambda self: None,
        "_get_gptmodel_args": lambda self: _gpt_arguments(self.hf_config),
        "_build_base_config": build_base_config,
    }
    if hf_config.tie_word_embeddings:
        members["_DIRECT_MAPPING"]["output_layer.weight"] = "model.embed_tokens.weight"
    if local:  # without Transformer Engine a norm is a separate module, not a part of the next linear layer

        def split(mapping: dict[str, list[str]]) -> dict[str, list[str]]:
            return {name: hf for name, hf in mapping.items() if "layer_norm_weight" not in name}

        norms = "model.layers.{layer_number}."
        members |= {
            "_ATTENTION_MAPPING": split(base._ATTENTION_MAPPING),
            "_MLP_MAPPING": split(base._MLP_MAPPING)
            | {"pre_mlp_layernorm.weight": [norms + "post_attention_layernorm.weight"]},
            "_OTHER_MAPPING": {"input_layernorm.weight": [norms + "input_layernorm.weight"]},
            "has_vp_stage": True,
            "_get_transformer_layer_spec": lambda self, vp_stage=None: cpu.layer_specs(self.config, vp_stage),
        }
    return members


def _gpt_arguments(hf_config: PretrainedConfig) -> dict[str, Any]:
    """GPTModel's arguments, with the rotary embedding that transformers would use."""
    rope = _rope(hf_config)
    arguments = dict(
        vocab_size=hf_config.vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
    )
    if rope["rope_type"] == "linear":
        arguments["seq_len_interpolation_factor"] = rope["factor"]
    elif rope["rope_type"] == "llama3":
        arguments |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return arguments


def _rope(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", **hf_config.rope_parameters}


# The constants of Llama 3.1's scaling that Megatron-Core has built in (RotaryEmbedding._apply_scaling).
_LLAMA3_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def refuse_unsupported(hf_config: PretrainedConfig, config: MegatronConfig) -> None:
    """Raises ConfigError for what Megatron-Core would compute differently, or cannot divide so."""
    kind = hf_config.model_type
    if kind not in BRIDGES:
        raise ConfigError(f"model: its model_type must be one of {', '.join(BRIDGES)} for megatron, got {kind}")

    def require(name: str, wanted: Any, default: Any) -> None:
        value = getattr(hf_config, name, default)
        if value != wanted:
            raise ConfigError(f"model: megatron's {kind} needs {name} = {wanted!r}, its configuration says {value!r}")

    require("hidden_act", "silu", "silu")
    require("use_sliding_window", False, False)
    if kind != "qwen2":
        require("attention_bias", False, False)
    require("mlp_bias", False, False)
    rope = _rope(hf_config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ConfigError(f"model: rope_type must be default, linear or llama3 for megatron, got {rope['rope_type']}")
    if rope["rope_type"] == "llama3":
        for name, value in _LLAMA3_SCALING.items():
            if rope[name] != value:
                raise ConfigError(f"model: megatron's llama3 RoPE has {name} = {value}, the model has {rope[name]}")
    for name, value in (
        ("num_attention_heads", hf_config.num_attention_heads),
        ("num_key_value_heads", hf_config.num_key_value_heads),
        ("intermediate_size", hf_config.intermediate_size),
    ):
        if value % config.tensor_parallel:
            raise ConfigError(
                f"megatron.tensor_parallel: must divide the model's {name} = {value}, got {config.tensor_parallel}"
            )
    if hf_config.num_hidden_layers % config.pipeline_parallel:
        raise ConfigError(
            f"megatron.pipeline_parallel: must divide the model's num_hidden_layers = {hf_config.num_hidden_layers}, "
            f"got {config.pipeline_parallel}"
        )


def _need_transformer_engine() -> None:
    try:
        import transformer_engine  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "megatron on a GPU needs Transformer Engine (packed attention, context parallelism, norms): "
            "pip install 'entcov[megatron-gpu]'; or do without it, slower: megatron.transformer_impl=local"
        ) from error
