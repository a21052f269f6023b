"""entcov's statistics and losses in a plain Megatron-LM training script, without entcov's trainer.

The statistics are computed from the vocabulary-parallel logits of the output layer, with one all-gather of some bytes a
token; the vocabulary is never gathered. README.md has an example.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from entcov.integrations.plugin import Patches
from entcov.objective.tokens import Tokens, Totals
from entcov.stats.token_stats import TokenStats, token_stats


def logits_stats(
    logits: Tensor, target: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None = None, **options: Any
) -> TokenStats:
    """`entcov.token_stats` of this tensor-parallel rank's logits.

    Equivalent to gathering the vocabulary over the tensor-parallel group and `token_stats` of the whole rows, whose
    docstring says what comes back, what is differentiable, and which collectives there are.

    Args:
        logits: [batch, sequence, V_padded / TP], as GPTModel returns them without labels; any float dtype, and best
            before an upcast: `Float16Module(..., fp32_output=False)`, or `keep_logits_dtype(model)`.
        target: [batch, sequence] int64, the next token of each position; -100 where there is none (the last token of
            each sequence; shift inside each sequence before context parallelism splits it).
        vocab_size: of the tokenizer, without the columns that pad the vocabulary to a multiple: those do not exist.
        group: default: Megatron's tensor-parallel group.
        options: temperature, clamp_p, top_k, moments.

    Mutated: nothing. (`vocab_parallel_cross_entropy` would overwrite float32 logits with their softmax.)

    Raises: as `token_stats`, and like it on every rank, whichever rank's arguments are wrong.
    """
    group = parallel_state.get_tensor_model_parallel_group() if group is None else group
    alone = dist.get_world_size(group) == 1
    return token_stats(logits, target, group=None if alone else group, vocab_size=vocab_size, **options)


def per_token_loss(
    loss: Tensor, tokens: Tokens, totals: Totals, metrics: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's 3-tuple for a loss of `policy_loss`, whose denominators are already those of the whole mini-batch.

    With `calculate_per_token_loss=True` Megatron adds gradients up over micro-batches, data and context parallel ranks
    and divides them once by the sum of all second entries. That sum is `totals.num_tokens`, so the loss is multiplied
    by it here, and the result is the gradient of `loss`, for every aggregation.

    Args:
        loss: 0-d, from `policy_loss(tokens, totals=totals, ...)`.
        tokens: this rank's tokens of the micro-batch. A token must be in the loss of one data-parallel rank, one
            context-parallel rank and one micro-batch.
        totals: of the mini-batch over all of them.
    Returns: (loss * totals.num_tokens, number of this rank's loss tokens as int32, metrics).
    """
    return loss * totals.num_tokens, tokens.loss_mask.sum().to(torch.int32), metrics


def keep_logits_dtype(model: nn.Module) -> Patches:
    """Lets the model's mixed-precision wrapper return bf16 or fp16 logits, where it would make a float32 copy of them.

    For training scripts whose `forward_step` cannot pass `fp32_output=False`. Only this model is changed, and only
    until the handle is removed.

    Args:
        model: a model, or what Megatron has wrapped around it.

    Raises:
        ValueError: there is no Float16Module in it: a float32 model has nothing to keep.
        RuntimeError: it is installed already.
    """
    wrappers = [module for module in model.modules() if isinstance(module, Float16Module)]
    if not wrappers:
        raise ValueError("model: must hold a Float16Module (bf16 or fp16 training), and has none")
    for wrapper in wrappers:
        if "forward" in wrapper.__dict__:
            raise RuntimeError("keep_logits_dtype: this model's forward is replaced already; remove that handle first")
    handle = Patches()
    for wrapper in wrappers:
        wrapper.forward = partial(wrapper.forward, fp32_output=False)
        handle.callback(delattr, wrapper, "forward")
    return handle
