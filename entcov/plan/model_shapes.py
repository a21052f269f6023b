"""Shapes of decoder-only models and what one rank of a Megatron layout holds of them, by arithmetic alone.

docs/large_models.md has the formulas. The first pipeline stage has the embedding, the last one the output matrix (the
embedding again where they are tied) and the last norm.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entcov import arguments as check

_KNOWN_TYPES = ("qwen2", "qwen3", "llama")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide memory and work; names as in a Hugging Face configuration."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def from_config(cls, config: dict[str, Any], name: str = "model") -> ModelShape:
        """From a Hugging Face configuration (its `config.json` as a mapping).

        Raises:
            ValueError: a model type whose parameters are not known here, or a size that is missing.
        """
        kind = config.get("model_type")
        if kind not in _KNOWN_TYPES:
            raise ValueError(f"{name}: model_type must be one of {', '.join(_KNOWN_TYPES)}, got {kind!r}")
        sizes = {}
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
            value = config.get(key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {key} must be an integer >= 1, got {value!r}")
            sizes[key] = value
        return cls(
            name=name,
            num_key_value_heads=config.get("num_key_value_heads") or sizes["num_attention_heads"],
            head_dim=config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
            qk_norm=kind == "qwen3",
            **sizes,
        )

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the whole published model, without padding; a tied embedding counts once."""
        padding = self.padded_vocab(1) - self.vocab_size
        return self.parameters_on_rank(1, 1, 0) - padding * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding in megatron_integration: the next multiple of 128 and of the number of ranks."""
        multiple = math.lcm(128, tensor_parallel)
        return math.ceil(self.vocab_size / multiple) * multiple

    def parameters_on_rank(self, tensor_parallel: int, pipeline_parallel: int, stage: int) -> int:
        """Parameters of every tensor-parallel rank of pipeline stage `stage`."""
        h, t = self.hidden_size, tensor_parallel
        qkv = self.query_width + 2 * self.key_value_width
        divided = qkv * h + self.query_width * h + 3 * self.intermediate_size * h + (qkv if self.qkv_bias else 0)
        layer = divided // t + 2 * h + (2 * self.head_dim if self.qk_norm else 0)
        vocabulary = self.padded_vocab(t) // t * h
        total = self.num_hidden_layers // pipeline_parallel * layer
        if stage == 0:
            total += vocabulary
        if stage == pipeline_parallel - 1:
            total += h
            # A tied embedding is one matrix on a single stage. The last of several stages has a copy.
            total += vocabulary if not self.tie_word_embeddings or pipeline_parallel > 1 else 0
        return total

    def layout_errors(self, tensor_parallel: int, pipeline_parallel: int) -> list[str]:
        """Why the model cannot be divided so; empty if it can."""
        errors = []
        for what, size in (("heads", self.num_attention_heads), ("key-value heads", self.num_key_value_heads)):
            if size % tensor_parallel:
                errors.append(f"megatron.tensor_parallel={tensor_parallel} does not divide {size} {what}")
        if self.num_hidden_layers % pipeline_parallel:
            layers = self.num_hidden_layers
            errors.append(f"megatron.pipeline_parallel={pipeline_parallel} does not divide {layers} layers")
        return errors

    def forward_flops(self, tokens: float, context: float) -> float:
        """Operations, a multiply-add counted as two: 2 for every weight of a matrix, and those of attention.

        `context` is the mean number of earlier tokens that attention reads: half the length for whole sequences.
        """
        matrices = self.num_hidden_layers * (
            (self.query_width * 2 + 2 * self.key_value_width + 3 * self.intermediate_size) * self.hidden_size
        )
        head = self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * 2 * self.query_width * context
        return 2.0 * tokens * (matrices + head + attention)

    def kv_bytes_per_token(self, tensor_parallel: int, bytes_per_value: int = 2) -> int:
        """Keys and values of one token in all layers on one of `tensor_parallel` ranks; each has at least one head."""
        heads = max(1, self.num_key_value_heads // tensor_parallel)
        return 2 * self.num_hidden_layers * heads * self.head_dim * bytes_per_value


def _published(kind: str, layers: int, h: int, f: int, heads: int, kv: int, vocab: int, *, d=None, tied=False) -> dict:
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": h, "intermediate_size": f,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "head_dim": d,
        "tie_word_embeddings": tied,
    }  # fmt: skip


# From the config.json of each published model, so that a plan needs no network. Training reads that file itself.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-1.5B": _published("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _published("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-Math-1.5B": _published("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _published("qwen2", 28, 1536, 8960, 12, 2, 151936),
    "Qwen/Qwen2.5-7B": _published("qwen2", 28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-32B": _published("qwen2", 64, 5120, 27648, 40, 8, 152064),
    "Qwen/Qwen3-8B-Base": _published("qwen3", 36, 4096, 12288, 32, 8, 151936, d=128),
    "Qwen/Qwen3-32B": _published("qwen3", 64, 5120, 25600, 64, 8, 151936, d=128),
    "meta-llama/Llama-3.1-8B": _published("llama", 32, 4096, 14336, 32, 8, 128256),
}


def shape_of(path: str | None, config: dict[str, Any] | None) -> ModelShape:
    """The shape of a recipe's model: of `config`, of a folder's config.json, or a published one by its name.

    Raises:
        ValueError: `path` is neither a folder with a config.json nor among `PUBLISHED`.
    """
    if path is None:
        return ModelShape.from_config(dict(config or {}), "model.config")
    file = Path(path) / "config.json"
    if file.is_file():
        return ModelShape.from_config(json.loads(file.read_text()), path)
    if path in PUBLISHED:
        return ModelShape.from_config(PUBLISHED[path], path)
    raise ValueError(
        f"model.path: must be a folder with a config.json or one of {', '.join(PUBLISHED)}, got {check.shown(path)}; "
        "another model's shape goes in model.config, with model.path=null"
    )
