"""linear_token_stats: token_stats from hidden states and a shard of the LM head.

entcov/stats/lm_head.py computes the logits, all at once or one chunk of tokens at a time. Statistics and collectives
are those of entcov/stats/token_stats.py. This file adds the two products of the backward pass, and the all-reduce of
the gradient of the hidden states.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from entcov.ops.core import DTYPES
from entcov.ops.logits_grad import logits_grad_
from entcov.ops.row_stats import check_values, row_stats
from entcov.stats import derivative
from entcov.stats.lm_head import HeadRows, add_product, fresh, product_into
from entcov.stats.ranks import eager
from entcov.stats.shards import check_local
from entcov.stats.token_stats import (
    Settings,
    TokenStats,
    named_outputs,
    resolved_settings,
    row_statistics,
    saved_and_outputs,
    sharded_row_statistics,
    three_gradients,
)

MEMORY_BUDGET = 2**30  # bytes of logits: 3,533 tokens of 151,936 columns in bf16, or 28,244 of a shard of 19,008


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    clamp_p: float | None = None,
    top_k: int | None = None,
    moments: bool = False,
    ignore_index: int = -100,
    memory_budget: int = MEMORY_BUDGET,
    chunk_size: int | None = None,
    reduce_hidden_grad: bool = True,
    main_grad: Tensor | None = None,
) -> TokenStats:
    """`token_stats` of the logits that an LM head makes, without all of the logits at once.

    Equivalent to `token_stats(torch.nn.functional.linear(hidden, weight, bias), target, ...)`, whose docstring defines
    the outputs, with its arguments of the same names.

    Args:
        hidden: [..., D] float32, bfloat16 or float16, with the same bits on every rank of the group; four values per
            token are compared over the ranks.
        weight: [V_local, D], this rank's rows of the LM head, in the dtype of hidden. Under autocast both may have any
            of the three dtypes and are cast as `linear` would cast them.
        target: [...] int64, global token ids.
        bias: [V_local] of the same dtype.
        group, vocab_start, vocab_size, temperature, clamp_p, top_k, moments, ignore_index: as for `token_stats`.
        memory_budget: bytes of logits that may exist at a time. If the logits of all tokens fit, or take no more than
            chunks and their fp32 sum (see Memory), they are kept for backward, which overwrites them by their gradient:
            3 matrix products in total. Otherwise they are computed in chunks, and again in backward: 4 products, 5 with
            a clamp over a group. There are n = ceil(T / (memory_budget // (V_local * itemsize))) chunks of ceil(T / n)
            tokens, rounded up to a multiple of 128 if that fits (`entcov.stats.lm_head.chunk_size_for`). On a GPU,
            chunks of much less than 1,000 tokens are slow, because every chunk reads the weight.
        chunk_size: tokens per chunk, overrides memory_budget. If it is at least T, all logits are kept.
        reduce_hidden_grad: a rank's columns give a partial sum of the gradient of hidden. True: it is all-reduced over
            the group, as in Megatron's column-parallel head. False: each rank gets its partial sum, for a caller whose
            own backward reduces it (sequence parallelism: the reduce-scatter of its all-gather).
        main_grad: [V_local, D] float32, to which backward adds the gradient of weight; weight.grad is then not set. For
            optimizers that accumulate gradients in fp32 over micro-batches (Megatron's `weight.main_grad`).

    Returns:
        TokenStats: fp32, the shape of target; bit-identical on all ranks of the group.

    Differentiable: logprob, entropy, clamped_entropy, with respect to hidden, weight and bias, once (a second
    derivative is a RuntimeError). The weight's gradient is summed over chunks in fp32 and rounded to its dtype once.

    Mutated: main_grad, in backward. Kept for backward: hidden, weight, bias, target, and 16 bytes per token (28 with
    moments, 16 more with a clamp); the logits if the budget allows it; under autocast the casts. A second backward
    through the same graph (retain_graph) computes the logits again.

    Memory beyond arguments and gradients: one chunk of logits. In backward also 4 V_local D bytes for the fp32 sum, if
    there are several chunks, weight is not fp32 and main_grad is None.

    Collectives: forward as `token_stats`, whatever the number of chunks: one all-gather; with a clamp two or more.
    Backward: one all-reduce of 4 D bytes per token (fp32) if hidden requires a gradient and reduce_hidden_grad is set,
    else none. Every rank of the group must enter them; hidden must require a gradient on all ranks or on none.

    Tokens whose target is ignore_index are left out of the products on the CPU. On CUDA they cost as much as others,
    since the host does not know their number; if you know them, pass only the other rows of hidden and target. The host
    does not wait for the GPU, except with a clamp over a group, as in `token_stats`. The products are torch's, so a
    row's last bits may depend on the number of rows, and so on whether logits are kept or computed in chunks. Under
    torch.compile it runs eagerly (a graph break).

    Error: that of `token_stats` given the logits in the dtype of the product.

    Raises: as `token_stats`, and ValueError, TypeError for shapes, dtypes and devices that do not fit together.

    Source: docs/math.md (4) to (12); the choice between kept and chunked logits: docs/performance.md.
    """
    return eager(_linear_token_stats)(
        hidden, weight, target, bias, group, vocab_start, vocab_size, temperature, clamp_p, top_k, moments,
        ignore_index, memory_budget, chunk_size, reduce_hidden_grad, main_grad,
    )  # fmt: skip


def _linear_token_stats(
    hidden, weight, target, bias, group, vocab_start, vocab_size, temperature, clamp_p, top_k, moments, ignore_index,
    memory_budget, chunk_size, reduce_hidden_grad, main_grad,
) -> TokenStats:  # fmt: skip
    flat = operands = None
    autocast = _autocast_dtype(hidden.device.type)
    reduces = group is not None and reduce_hidden_grad and torch.is_grad_enabled() and hidden.requires_grad

    def resolve():
        nonlocal flat, operands
        dtype = _check(hidden, weight, target, bias, main_grad, autocast)
        for name, value in (("memory_budget", memory_budget), ("chunk_size", chunk_size)):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        settings = resolved_settings(
            weight.shape[0], group, vocab_start, vocab_size, temperature, clamp_p, top_k, moments, ignore_index
        )
        sums = torch.is_grad_enabled() and weight.requires_grad and weight.dtype != torch.float32 and main_grad is None
        sum_bytes = 4 * weight.numel() if sums else 0
        flat = hidden.reshape(-1, hidden.shape[-1])
        operands = tuple(None if x is None else x.detach().to(dtype) for x in (flat, weight, bias))
        rows = HeadRows(
            *operands, target.reshape(-1).contiguous(), settings.spec, chunk_size, memory_budget, sum_bytes
        )  # fmt: skip
        return rows, settings, {"reduction of hidden's gradient (0: none)": int(reduces)}

    clamped = clamp_p is not None or top_k is not None
    with _without_autocast(hidden.device.type):
        if group is None:
            rows, settings, _ = resolve()
            found = _unsharded(rows, settings)
        else:
            T = hidden.shape[:-1].numel()
            rows, settings, found = sharded_row_statistics(
                HeadRows.name, group, T, hidden.device, moments, clamped, resolve
            )
    outputs = _LinearTokenStats.apply(
        flat, weight, bias, operands, rows, found, settings, group if reduces else None, main_grad
    )
    return named_outputs(outputs, target.shape, clamped)


@torch.no_grad()
def _unsharded(rows: HeadRows, settings: Settings) -> list[Tensor]:
    """`row_statistics` of all rows, without a group."""
    try:
        return rows.apply(row_statistics, settings.spec, settings.kept, settings.moments)
    except ValueError:  # its message counts the rows of one chunk only; raise one that counts all rows
        check_values(rows.apply(row_stats, settings.spec), rows.target, settings.spec, whole=True)
        raise


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def _check(hidden, weight, target, bias, main_grad, autocast) -> torch.dtype:
    """Checks shapes, dtypes and devices. Returns the dtype of the products: `autocast`'s, or without it hidden's."""
    check_local(hidden=hidden, weight=weight, target=target, bias=bias, main_grad=main_grad)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {tensor.device}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [..., D] and weight [V_local, D], got shapes "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be torch.int64, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have the leading shape of hidden, {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}"
        )
    if target.device != hidden.device:
        raise ValueError(f"target must be on {hidden.device} like hidden, got {target.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])} (one a column), got {tuple(bias.shape)}")
    if main_grad is not None:
        if torch.is_grad_enabled() and not weight.requires_grad:
            raise ValueError("main_grad must be None where weight does not require a gradient, got a tensor")
        if main_grad.dtype != torch.float32:
            raise TypeError(f"main_grad must be float32, got {main_grad.dtype}")
        if main_grad.shape != weight.shape or main_grad.device != weight.device:
            raise ValueError(
                f"main_grad must be {tuple(weight.shape)} on {weight.device} like weight, got "
                f"{tuple(main_grad.shape)} on {main_grad.device}"
            )
    if autocast is not None:
        return autocast
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden ({hidden.dtype}), got {tensor.dtype}; cast one, or use "
                "torch.autocast"
            )
    return hidden.dtype


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Disables autocast: the operands have been cast already. The meta device has no autocast."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


class _LinearTokenStats(torch.autograd.Function):
    """(hidden, weight, bias) -> the outputs of `row_statistics`, which are computed already (`found`)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, operands, rows, found, settings, group, main_grad):
        ctx.clamped = settings.kept is not None
        stats, clamp, outputs = saved_and_outputs(ctx, found, ctx.clamped)
        # Operands that were not cast are saved as the arguments, so that autograd detects writes to them.
        mine = [x if y is None or x.dtype == y.dtype else y
                for x, y in zip((hidden, weight, bias), operands, strict=True)]  # fmt: skip
        ctx.save_for_backward(*mine, rows.target, rows.index, stats, clamp)
        # Not a saved tensor, because backward overwrites and then frees it.
        ctx.all_logits = rows.all_logits
        ctx.head = (settings.spec, rows.chunk_size, rows.memory_budget)
        ctx.spec, ctx.columns, ctx.group, ctx.main_grad = settings.spec, settings.shard.columns, group, main_grad
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return outputs

    @staticmethod
    @derivative.first_only("linear_token_stats")
    def backward(ctx, *grads):
        hidden, weight, bias, target, index, stats, clamp = ctx.saved_tensors
        rows = HeadRows(hidden, weight, bias, target, *ctx.head)
        rows.restore(index, ctx.all_logits)
        ctx.all_logits = None
        with _without_autocast(hidden.device.type):
            return *_gradients(ctx, rows, stats, clamp, three_gradients(grads, ctx.clamped)), *[None] * 6


def _gradients(ctx, rows: HeadRows, stats: Tensor, clamp: Tensor | None, grads: list) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias; None for those that do not require one."""
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    (V, D), device, K = rows.weight.shape, rows.weight.device, rows.num_rows
    exists = slice(0, ctx.columns)  # without padding columns: their weights may be NaN
    existing_weight = rows.weight[exists]
    several = rows.chunk_size < K
    hidden_grad = weight_grad = bias_grad = reduction = None
    if wants_hidden:
        hidden_grad = fresh((K, D), torch.float32 if ctx.group is not None else rows.dtype, device)
    if wants_weight:
        weight_grad = ctx.main_grad
        if weight_grad is None:
            weight_grad = fresh((V, D), torch.float32 if several else ctx.dtypes[1], device)
            weight_grad[ctx.columns if K else 0 :].zero_()
    if wants_bias:
        bias_grad = torch.zeros(V, dtype=torch.float32, device=device)
    for part, logits in rows.chunks():
        target_, stats_, clamp_, *grads_ = (
            None if x is None else rows.rows_of(x, part) for x in (rows.target, stats, clamp, *grads)
        )
        logits_grad_(logits, target_, stats_, clamp_, grads_, ctx.spec)
        logits = logits[:, exists]
        if wants_hidden:
            product_into(hidden_grad[part], logits, existing_weight)
            if part.stop == K and ctx.group is not None:  # overlaps with the product for the weight's gradient
                reduction = dist.all_reduce(hidden_grad, group=ctx.group, async_op=True)
        if wants_weight:
            into = product_into if part.start == 0 and ctx.main_grad is None else add_product
            into(weight_grad[exists], logits.t(), rows.rows_of(rows.hidden, part))
        if wants_bias:
            bias_grad[exists] += logits.sum(0, dtype=torch.float32)
    if reduction is not None:
        reduction.wait()
    return (
        rows.in_place_of_all(hidden_grad).to(ctx.dtypes[0]) if wants_hidden else None,
        weight_grad.to(ctx.dtypes[1]) if wants_weight and ctx.main_grad is None else None,
        bias_grad.to(ctx.dtypes[2]) if wants_bias else None,
    )
