"""The policy: any transformers causal language model, from a path or from a configuration with random weights."""

from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from entcov import arguments as check
from entcov.rl.batch import IGNORE_INDEX, Batch
from entcov.rl.config import ConfigError, ModelConfig
from entcov.rl.hf.model_config import model_settings, model_tokenizer
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
    return model.to(device).train(), tokenizer


def forward(model: nn.Module, **inputs):
    """The model's output, computed in its `compute_dtype`; the trainer and its sampler both go through here."""
    lower = model.compute_dtype is not torch.float32
    with torch.autocast(model.device.type, dtype=model.compute_dtype if lower else None, enabled=lower):
        return model(**inputs, return_dict=True)


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
        packing: one row of N tokens whose positions start again at each sequence. Transformers' attention then keeps
            the sequences apart: flash attention without a mask, sdpa by building an [N, N] one.
        stats_options: passed to `token_stats`: temperature, clamp_p, top_k, moments.
    """
    if packing:
        keep = batch.loss_mask.nonzero()[:, 0]
        out = forward(
            model, input_ids=batch.tokens[None], position_ids=batch.position[None], logits_to_keep=keep, use_cache=False
        )
        return token_stats(out.logits[0], batch.target[keep], ignore_index=IGNORE_INDEX, **stats_options)
    rows = partial(pad_sequence, batch_first=True)
    ids, mask = (rows(x.split(batch.lengths)) for x in (batch.tokens, torch.ones_like(batch.tokens)))
    target = rows(batch.target.split(batch.lengths), padding_value=IGNORE_INDEX)
    first = int((target != IGNORE_INDEX).any(0).nonzero()[0, 0])  # leftmost column that predicts a response token
    out = forward(model, input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False)
    target = target[:, first:]
    stats = token_stats(out.logits, target.contiguous(), ignore_index=IGNORE_INDEX, **stats_options)
    kept = target != IGNORE_INDEX
    return TokenStats(*(None if value is None else value[kept] for value in stats))
