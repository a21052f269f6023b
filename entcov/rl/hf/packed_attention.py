"""Attention over sequences that lie end to end in one row, without a mask of [N, N] entries.

`use_boundaries` gives a model on a GPU the implementation NAME, which takes the sequences' boundaries and runs torch's
variable-length flash attention; of padded rows and while generating it is transformers' sdpa. `keeps_apart` says
whether a model's attention reads boundaries: NAME, and transformers' flash attention, do.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

NAME = "entcov_packed"
_HALF = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability that flash attention needs


def use_boundaries(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Replaces sdpa by NAME where torch's flash attention can take its place: a GPU that has it, half precision."""
    if model.config._attn_implementation != "sdpa" or model.device.type != "cuda" or compute_dtype not in _HALF:
        return
    # The size of a sliding window is an argument of torch 2.11 and later.
    known = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters
    if known and torch.cuda.get_device_capability(model.device) >= _OLDEST and _says_all(model):
        model.set_attn_implementation(NAME)


def keeps_apart(model: nn.Module) -> bool:
    """Whether the model, given `boundaries`, computes each sequence of a packed row as if it were alone."""
    name = model.config._attn_implementation or ""
    return not model._is_stateful and (name == NAME or "flash" in name)


def boundaries(lengths: tuple[int, ...], model: nn.Module) -> dict[str, Any]:
    """The keyword arguments of the model's forward pass that tell a packed row's sequences apart."""
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(model.device)
    longest = max(lengths)
    found = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    if model.config._attn_implementation == NAME:
        # transformers passes a mask of four dimensions on as it is, and makes none itself.
        found["attention_mask"] = torch.empty((1, 1, 0, 0), device=model.device)
    return found


def _says_all(model: nn.Module) -> bool:
    """Whether its layers tell the attention all that a mask would, as transformers' flash attention needs too."""
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    fits = size % 8 == 0 and size <= 256 and getattr(text, "v_head_dim", None) in (None, size)
    return fits and model._supports_flash_attn and model._can_set_attn_implementation() and not model._is_stateful


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D], as transformers calls and expects it."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    kind = value.dtype  # a rotary embedding may have made float32 of the others
    if torch.amp.is_autocast_available(query.device.type) and torch.is_autocast_enabled(query.device.type):
        kind = torch.get_autocast_dtype(query.device.type)
    query, key, value = (x[0].transpose(0, 1).to(kind) for x in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # a token itself is one of the window's
    limits = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    grouped = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, *limits, scale=scaling, window_size=window, enable_gqa=grouped)
    return out[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
