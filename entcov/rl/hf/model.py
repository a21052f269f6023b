"""The policy: any transformers causal language model, from a path or from a configuration with random weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from entcov import arguments as check
from entcov.rl.batch import IGNORE_INDEX, Batch
from entcov.rl.config import ActorConfig, ConfigError, ModelConfig
from entcov.rl.hf.model_config import model_settings, model_tokenizer
from entcov.rl.hf.packed_attention import boundaries, keeps_apart, use_boundaries
from entcov.rl.record.durable import as_os_error
from entcov.stats.token_stats import TokenStats, token_stats


def build_model(config: ModelConfig, *, seed: int, device: torch.device) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model in training mode on `device`, and its tokenizer.

    Dropout is off: the policy that is trained must be the one that was sampled and scored.
    A model from `config.config` gets random weights from `seed`, and the tokenizer's vocabulary size and special
    tokens.

    Raises:
        ConfigError: the recipe's model cannot be loaded, or cannot be built; the message names the key.
    """
    transformers.logging.disable_progress_bar()  # its bars would cut through the run's own display
    tokenizer = model_tokenizer(config)
    settings = model_settings(config, tokenizer)
    options = {"dtype": torch.float32, "attn_implementation": config.attn_implementation}
    if config.path is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(config.path, config=settings, **options)
        except Exception as error:  # missing, damaged or unsafe weights, in any library's words
            raise ConfigError(
                f"model.path: transformers cannot load the model in {config.path!r} ({check.one_line(error)})"
            ) from error
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(settings, **options)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.compute_dtype = getattr(torch, config.compute_dtype)
    model = model.to(device).train()
    use_boundaries(model, model.compute_dtype)
    return model, tokenizer


def autocast(model: nn.Module) -> torch.autocast:
    """The context of a forward pass in the model's `compute_dtype`. Passes inside one share the cast weights."""
    lower = model.compute_dtype is not torch.float32
    return torch.autocast(model.device.type, dtype=model.compute_dtype if lower else None, enabled=lower)


def forward(model: nn.Module, **inputs):
    """The model's output, computed in its `compute_dtype`; the trainer and its sampler both go through here."""
    with autocast(model):
        return model(**inputs, return_dict=True)


def adamw(model: nn.Module, config: ActorConfig, *, lr: float) -> torch.optim.AdamW:
    """On a GPU one kernel takes the step of many weights; on a CPU its last bits would be others."""
    fused = True if model.device.type == "cuda" else None
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused
    )


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights (safetensors), configuration and tokenizer: a folder that `from_pretrained` loads."""
    with as_os_error(folder):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batch_token_stats(model: nn.Module, batch: Batch, *, packing: bool, **stats_options) -> TokenStats:
    """`token_stats` of the batch's K response tokens, in the batch's order ([K] = everything at `batch.loss_mask`).

    Logits are computed for the positions that predict a response token (packed), or for the columns that hold one
    (padded); the others are ignored rows, whose logits are never read.

    Args:
        packing: no padding. Where the model's attention takes boundaries, one row of N tokens whose positions start
            again at each sequence; elsewhere one sequence after the other. Memory grows with N.
        stats_options: passed to `token_stats`: temperature, clamp_p, top_k, moments.
    """
    if packing:
        if keeps_apart(model):
            inputs = {"position_ids": batch.position[None], **boundaries(batch.lengths, model)}
            return _row_stats(model, batch.tokens, batch.target, inputs, stats_options)
        each = zip(batch.tokens.split(batch.lengths), batch.target.split(batch.lengths), strict=True)
        with autocast(model):
            alone = [_row_stats(model, *sequence, {}, stats_options) for sequence in each]
        return TokenStats(*(None if values[0] is None else torch.cat(values) for values in zip(*alone, strict=True)))
    rows = partial(pad_sequence, batch_first=True)
    ids, mask = (rows(x.split(batch.lengths)) for x in (batch.tokens, torch.ones_like(batch.tokens)))
    target = rows(batch.target.split(batch.lengths), padding_value=IGNORE_INDEX)
    first = int((target != IGNORE_INDEX).any(0).nonzero()[0, 0])  # leftmost column that predicts a response token
    out = forward(model, input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False)
    target = target[:, first:]
    stats = token_stats(out.logits, target.contiguous(), ignore_index=IGNORE_INDEX, **stats_options)
    kept = target != IGNORE_INDEX
    return TokenStats(*(None if value is None else value[kept] for value in stats))


def _row_stats(
    model: nn.Module, tokens: Tensor, target: Tensor, inputs: dict[str, Any], options: dict[str, Any]
) -> TokenStats:
    """`token_stats` of the entries of one row that have a target; `inputs` are further arguments of the model."""
    keep = (target != IGNORE_INDEX).nonzero()[:, 0]
    out = forward(model, input_ids=tokens[None], logits_to_keep=keep, use_cache=False, **inputs)
    return token_stats(out.logits[0], target[keep], ignore_index=IGNORE_INDEX, **options)
