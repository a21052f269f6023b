"""The policy: any transformers causal language model, from a path or from a configuration with random weights."""

from contextlib import AbstractContextManager, nullcontext
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
from entcov.rl.config import ActorConfig, ModelConfig
from entcov.rl.hf.model_config import model_settings, model_tokenizer
from entcov.rl.hf.packed_attention import boundaries, keeps_apart, use_boundaries
from entcov.rl.recipe import ConfigError
from entcov.rl.record.durable import as_os_error
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.stats.token_stats import TokenStats, token_stats

# Bytes of a micro-batch's logits from which hidden states take their place. They save as much as the logits' gradient,
# in no more time (`python -m benchmarks head`); below, what they save is little beside a model.
LARGE_LOGITS = 1 << 26


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
    model = model.to(device).eval()
    model.plain_head = has_plain_head(model)
    model.train()
    use_boundaries(model, model.compute_dtype)
    return model, tokenizer


def autocast(model: nn.Module) -> AbstractContextManager:
    """The context of a forward pass in the model's `compute_dtype`. Passes inside one share the cast weights."""
    if model.compute_dtype is torch.float32:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=model.compute_dtype)


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


def has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are the product of its last hidden states and its head, and nothing besides.

    Tried on two tokens: some models scale their logits or bound them, each under another key of its configuration.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or body is model or model.device.type == "meta":  # which is never run
        return False
    ids = torch.arange(2, device=model.device)[None]
    with torch.no_grad(), autocast(model):
        hidden = body(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        return torch.equal(head(hidden), forward(model, input_ids=ids, use_cache=False).logits)


def batch_token_stats(model: nn.Module, batch: Batch, *, packing: bool, **stats_options) -> TokenStats:
    """`token_stats` of the batch's K response tokens, in the batch's order ([K] = everything at `batch.loss_mask`).

    Logits are computed for the positions that predict a response token (packed), or for the columns that hold one
    (padded); the others are ignored rows, whose logits are never read. Where they would take more than LARGE_LOGITS
    bytes and the model's head is a plain linear layer, `linear_token_stats` computes those that are read, no more than
    its budget at a time.

    Args:
        packing: no padding. Where the model's attention takes boundaries, one row of N tokens whose positions start
            again at each sequence; elsewhere one sequence after the other. Memory grows with N.
        stats_options: passed to `token_stats`: temperature, clamp_p, top_k, moments.
    """
    passes = _packed(model, batch) if packing else [_padded(batch)]
    head, rows = model.get_output_embeddings(), sum(target.numel() for *_, target in passes)
    with autocast(model):
        if model.plain_head and rows * head.out_features * model.compute_dtype.itemsize > LARGE_LOGITS:
            found = [_hidden(model, *one) for one in passes]
            hidden, target = (torch.cat(parts) for parts in zip(*found, strict=True))
            return linear_token_stats(hidden, head.weight, target, bias=head.bias, **stats_options)
        alone = [_pass_stats(model, *one, stats_options) for one in passes]
    if len(alone) == 1:
        return alone[0]
    return TokenStats(*(None if values[0] is None else torch.cat(values) for values in zip(*alone, strict=True)))


# Of one pass through the model: its arguments, the columns whose logits are wanted (as transformers' logits_to_keep),
# and the targets of these columns.
Pass = tuple[dict[str, Any], int | Tensor, Tensor]


def _packed(model: nn.Module, batch: Batch) -> list[Pass]:
    if keeps_apart(model):
        inputs = {"position_ids": batch.position[None], **boundaries(batch.lengths, model)}
        return [_row(batch.tokens, batch.target, **inputs)]
    each = zip(batch.tokens.split(batch.lengths), batch.target.split(batch.lengths), strict=True)
    return [_row(*sequence) for sequence in each]


def _row(tokens: Tensor, target: Tensor, **inputs: Any) -> Pass:
    keep = (target != IGNORE_INDEX).nonzero()[:, 0]
    return {"input_ids": tokens[None], **inputs}, keep, target[None, keep]


def _padded(batch: Batch) -> Pass:
    rows = partial(pad_sequence, batch_first=True)
    ids, mask = (rows(x.split(batch.lengths)) for x in (batch.tokens, torch.ones_like(batch.tokens)))
    target = rows(batch.target.split(batch.lengths), padding_value=IGNORE_INDEX)
    first = int((target != IGNORE_INDEX).any(0).nonzero()[0, 0])  # leftmost column that predicts a response token
    return {"input_ids": ids, "attention_mask": mask}, ids.shape[1] - first, target[:, first:]


def _pass_stats(
    model: nn.Module, inputs: dict[str, Any], keep: int | Tensor, target: Tensor, options: dict[str, Any]
) -> TokenStats:
    out = forward(model, **inputs, logits_to_keep=keep, use_cache=False)
    stats = token_stats(out.logits, target.contiguous(), ignore_index=IGNORE_INDEX, **options)
    at = _learned(keep, target)
    return TokenStats(*(None if value is None else value[at] for value in stats))


def _hidden(model: nn.Module, inputs: dict[str, Any], keep: int | Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states [k, D] and targets [k] of the columns that have a target."""
    hidden = model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
    at = _learned(keep, target)
    return hidden[:, keep if isinstance(keep, Tensor) else slice(-keep, None)][at], target[at]


def _learned(keep: int | Tensor, target: Tensor) -> int | Tensor:
    """The index of the entries with a target; of a packed row, all of its columns. A mask makes the host wait."""
    return 0 if isinstance(keep, Tensor) else target != IGNORE_INDEX
