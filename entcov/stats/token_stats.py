"""token_stats: log-probability and entropies of a policy whose vocabulary may be split over ranks.

Forward: one local op -> one all-gather -> one merge that also computes the outputs. Backward: one local op, from the
caller's logits and the merged statistics, which an autograd.Function saves. Formulas: docs/math.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entcov.ops.clamped_stats import clamped_stats
from entcov.ops.core import RowSpec, constant_temperature
from entcov.ops.logits_grad import logits_grad
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.row_stats import row_stats
from entcov.stats import derivative
from entcov.stats.ranks import eager
from entcov.stats.sharded_clamp import sharded_clamped_stats
from entcov.stats.shards import Partial, Shard, check_local, gather, resolve_shard


class TokenStats(NamedTuple):
    """The result of `token_stats`: fp32, the shape of `target`, in nats. None: not requested."""

    logprob: Tensor
    entropy: Tensor
    clamped_entropy: Tensor | None
    collision: Tensor | None
    varentropy: Tensor | None
    entropy_drift: Tensor | None


def token_stats(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    clamp_p: float | None = None,
    top_k: int | None = None,
    moments: bool = False,
    ignore_index: int = -100,
) -> TokenStats:
    """Log-probability of each token and entropies of the distribution it was drawn from, with gradients to the logits.

    Equivalent to, in float64 and with all columns on one rank (entcov/verify/reference.py):

        log_p = log_softmax(logits[..., :vocab_size].double() / temperature, -1);  p = log_p.exp()
        logprob = log_p.gather(-1, target[..., None])[..., 0]
        entropy = -(p * log_p).sum(-1)                                 # 0 * -inf is 0
        clamped_entropy = entropy of softmax(topk(logits, k).values / temperature),
                          k = top_k or vocab_size - int(vocab_size * clamp_p)
        collision = (p * p).sum(-1);  varentropy = (p * (log_p + entropy) ** 2).sum(-1)
        entropy_drift = d entropy / d alpha of the step  logits / temperature += alpha * (onehot(target) - p)

    Args:
        logits: [..., V_local] float32, bfloat16 or float16, stride 1 along the vocabulary. This rank's columns.
            Leading dims that can be viewed as one dim are read in place; others are copied. `logits[:, :-1]` is copied:
            shift `target` instead, and fill its end with ignore_index.
        target: [...] int64, global token ids, the same on every rank.
        group: process group over which the vocabulary is split. None: logits have all columns.
        vocab_start: global id of column 0. Default: rank * V_local. Shards may be uneven, empty, and in any order.
        vocab_size: true size of the whole vocabulary; columns from there on are padding and do not exist. Default: all
            columns (world * V_local). Required with vocab_start.
        temperature: divides the logits, as the sampler's does. A constant: a tensor must not require a gradient.
        clamp_p: fraction (not percent) of the vocabulary to leave out of clamped_entropy, lowest logits first; [0, 1).
        top_k: instead of clamp_p, the number of logits to keep.
        moments: also return collision, varentropy and entropy_drift.
        ignore_index: rows with this target are not read: all their outputs and gradients are 0.

    Returns:
        TokenStats: fp32 [...], in nats (entropy_drift: nats per unit of step); bit-identical on all ranks of the group.

    Differentiable: logprob, entropy, clamped_entropy, with respect to logits, in their dtype; once (a second derivative
    is a RuntimeError). The kept set of the clamp is a constant; logits that tie at its threshold share one weight, so
    the gradient is the mean over all ways to break the tie. The moments are detached. Outputs that the loss does not
    use cost nothing in backward.

    Mutated: nothing. Kept for backward: the caller's logits and target, and 16 bytes per token (28 with moments, 16
    more with a clamp); nothing of size V. The logits must not be written before backward. Autograd raises if they are,
    but does not detect writes inside a function compiled by torch.compile. There a changed logit of a target is an
    error on the CPU, and makes the target's gradient NaN on CUDA. With `torch.compiler.disable(token_stats)` in that
    function, autograd detects every write.

    Collectives, in forward, which every rank of the group must enter: one all-gather of 16 bytes per token and rank (28
    with moments) plus 16 bytes. With a clamp: one all-gather of 256 bytes, one of 680 (692 with moments), and one of
    680 for each further round that a row needs. Most rows of bf16 need none, many whose threshold is near 0 or among
    the few hundred largest or smallest logits need one, fp32 with all its bits needs one; never more than 5. On CUDA
    the host waits for the GPU once per round, for the number of such rows; during CUDA graph capture it does not, and
    all 7 rounds run. Backward: none.

    Error against float64 on the same rounded logits: 1e-5 absolute for logprob and entropies at V = 151,936; for peaked
    rows 1e-5 relative as well (entropies down to 1e-6). -inf is a probability of 0; a NaN or +inf makes its row NaN.

    Raises:
        ValueError: shapes, ranges, a target outside the vocabulary, rows without a finite logit. On CUDA the last two
            are not looked for, since that would wait for the GPU: all outputs of such a row and its gradient are NaN.
        TypeError: dtypes; DTensors, of which `entcov.integrations.dtensor.vocab_shard` gives the arguments.
        RuntimeError: ranks called differently (shards that do not cover the vocabulary once, another temperature,
            target, ...): the same error on every rank. Or another rank's arguments are wrong: that rank raises its own
            error, the others one that names it. On CUDA all outputs of all rows that are not ignored, and their
            gradients, are NaN on every rank instead; TORCH_DISTRIBUTED_DEBUG=DETAIL gives the errors there too. See
            `entcov.stats.shards.gather` for different numbers of tokens.

    Source: the one-pass merge is docs/math.md (4), (5); clamped entropy: Shen, arXiv 2509.03493, docs/math.md (10);
    entropy drift: Wang et al., arXiv 2602.03392, theorem 3.3, docs/math.md (9).
    """
    arguments = (logits, target, group, vocab_start, vocab_size, temperature, clamp_p, top_k, moments, ignore_index)
    if group is None:
        rows, tokens, settings = _resolved(*arguments)
        outputs = _TokenStats.apply(rows, tokens, *settings.spec, settings.kept, settings.moments, None)
    else:
        outputs = eager(_sharded_token_stats)(*arguments)
    return named_outputs(outputs, target.shape, clamp_p is not None or top_k is not None)


class Settings(NamedTuple):
    """The arguments of `token_stats` that apply to all rows, with defaults filled in."""

    shard: Shard
    spec: RowSpec
    kept: int | None  # number of logits that the clamp keeps; None: no clamp
    moments: bool


def resolved_settings(
    width, group, vocab_start, vocab_size, temperature, clamp_p, top_k, moments, ignore_index
) -> Settings:
    """Checks the arguments of `token_stats` and fills in defaults. Raises TypeError or ValueError."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    shard = resolve_shard(width, group, vocab_start, vocab_size)
    kept = kept_count(shard.vocab_size, clamp_p, top_k)
    spec = RowSpec(shard.start, shard.vocab_size, constant_temperature(temperature), ignore_index)
    return Settings(shard, spec, kept, bool(moments))


def _resolved(logits, target, group, *arguments) -> tuple[Tensor, Tensor, Settings]:
    """(logits [T, V_local], target [T], settings)"""
    check_local(logits=logits, target=target)
    check_leading_shape("logits", logits, "target", target.shape)
    settings = resolved_settings(logits.shape[-1], group, *arguments)
    if logits.dim() != 2:
        logits, target = logits.reshape(target.numel(), settings.shard.width), target.reshape(-1)
    return logits, target.contiguous(), settings


def _sharded_token_stats(logits, target, group, *arguments):
    *_, clamp_p, top_k, moments, _ = arguments
    flat = None

    def resolve():
        nonlocal flat
        flat, tokens, settings = _resolved(logits, target, group, *arguments)
        return LogitRows(flat.detach(), tokens), settings, {}

    size = (logits.shape[:-1].numel(), logits.device, moments, clamp_p is not None or top_k is not None)
    rows, settings, found = sharded_row_statistics(LogitRows.name, group, *size, resolve)
    return _TokenStats.apply(flat, rows.target, *settings.spec, settings.kept, settings.moments, found)


def check_leading_shape(name: str, logits: Tensor, per_row: str, shape: torch.Size) -> None:
    """ValueError unless logits have the leading shape `shape` and stride 1 along the vocabulary. Called before a
    reshape, which would hide both errors."""
    if logits.dim() < 1 or logits.shape[:-1] != shape:
        raise ValueError(
            f"{per_row} must have the leading shape of {name}, {tuple(logits.shape[:-1])}, got {tuple(shape)}"
        )
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {tuple(logits.stride())}")


def kept_count(vocab_size: int, clamp_p: float | None, top_k: int | None) -> int | None:
    """The number of logits that the clamp keeps; None: no clamp. ValueError for impossible values."""
    if clamp_p is not None and top_k is not None:
        raise ValueError(f"clamp_p and top_k exclude each other, got {clamp_p} and {top_k}")
    if clamp_p is not None:
        if not 0 <= clamp_p < 1:
            raise ValueError(f"clamp_p must be in [0, 1), a fraction, not percent, got {clamp_p}")
        return vocab_size - int(vocab_size * clamp_p)
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be in [1, vocab_size = {vocab_size}], got {top_k}")
    return top_k


def row_statistics(logits, target, spec: RowSpec, kept: int | None, moments: bool) -> list[Tensor]:
    """Statistics and outputs of whole rows: [stats [T, 4 | 7], logprob, entropy, moments...], with a clamp
    [stats, clamp [T, 4], logprob, entropy, clamped_entropy, moments...]. fp32, outputs [T]."""
    if kept is not None:
        return clamped_stats(logits, target, kept, spec, moments)
    return row_stats(logits, target, spec, moments, whole=True)


class LogitRows(NamedTuple):
    """Logits [T, V_local] and targets [T], the input of ops that compute row by row.

    entcov.stats.lm_head.HeadRows has the same interface, and its logits exist for one chunk of tokens at a time.
    """

    logits: Tensor
    target: Tensor
    name = "token_stats"  # of the public function, for messages

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    def apply(self, op: Callable, *arguments, per_row: tuple[Tensor, ...] = ()):
        """op(logits, target, *per_row, *arguments): a tensor or a list of tensors, with one row per token that depends
        on the same row of logits, target and per_row alone."""
        return op(self.logits, self.target, *per_row, *arguments)

    def values(self, ignore_index: int) -> dict[str, Tensor]:
        """The values that must be equal on all ranks, for `shards.Partial`."""
        return {"target": self.target}


def sharded_row_statistics(op, group, T, device, moments, clamped, resolve):
    """(rows, settings, result as of `row_statistics`), for rows that are split over the ranks of `group`.

    Collectives: one all-gather; with a clamp two or more.

    Args:
        op: public name of the caller, for messages.
        T, device, moments, clamped: the number of rows, their device, and which outputs are requested. They determine
            the size of the messages, and are known before any argument is checked.
        resolve: returns (rows, Settings, further arguments that must be equal on all ranks, by name). It may raise
            (`shards.gather`).
    """
    rows = settings = None

    def resolve_once():
        nonlocal rows, settings
        rows, settings, call = resolve()
        return rows, settings, *agreed(rows, settings, call)

    if clamped:
        found = sharded_clamped_stats(op, group, T, device, moments, resolve_once)
        return rows, settings, found

    def prepare():
        rows, settings, *alike = resolve_once()
        with torch.no_grad():
            return Partial(rows.apply(row_stats, settings.spec, settings.moments), settings.shard, *alike)

    messages = gather(op, group, (T, 7 if moments else 4), device, prepare)
    return rows, settings, merge_row_stats(messages, rows.target, settings.spec, settings.moments)


def agreed(rows, settings: Settings, call: dict) -> tuple[dict, dict]:
    """(call, values) of `shards.Partial`: what must be equal on all ranks. `call`: further entries."""
    call = {
        "dtype": str(rows.dtype).removeprefix("torch."),
        "temperature": settings.spec.temperature,
        "ignore_index": settings.spec.ignore_index,
        "number of logits kept (clamp_p, top_k)": settings.kept or 0,
        **call,
    }
    return call, rows.values(settings.spec.ignore_index)


def named_outputs(outputs: tuple[Tensor, ...], shape: torch.Size, clamped: bool) -> TokenStats:
    """The outputs of `row_statistics`, reshaped and named."""
    if len(shape) != 1:
        outputs = tuple(x.view(shape) for x in outputs)
    clamp = outputs[2:3] if clamped else (None,)
    moments = outputs[2 + clamped :] or (None, None, None)
    return TokenStats(*outputs[:2], *clamp, *moments)


def saved_and_outputs(ctx, found: list[Tensor], clamped: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Splits the result of `row_statistics` into (stats, clamp, outputs); marks the moments as not differentiable."""
    stats, clamp, outputs = found[0], found[1] if clamped else None, tuple(found[1 + clamped :])
    ctx.mark_non_differentiable(*outputs[2 + clamped :])
    ctx.set_materialize_grads(False)
    return stats, clamp, outputs


def three_gradients(grads: tuple[Tensor | None, ...], clamped: bool) -> list[Tensor | None]:
    """The gradients of logprob, entropy and clamped_entropy, contiguous; None for those that are 0."""
    given = [None if g is None else g.contiguous() for g in grads[: 2 + clamped]]
    return given if clamped else [*given, None]


class _TokenStats(torch.autograd.Function):
    """Logits [T, V_local] -> the outputs of `row_statistics`. `found`: its result, if there is a group."""

    @staticmethod
    def forward(ctx, logits, target, vocab_start, vocab_size, temperature, ignore_index, kept, moments, found):
        spec = RowSpec(vocab_start, vocab_size, temperature, ignore_index)
        if found is None:
            found = row_statistics(logits, target, spec, kept, moments)
        ctx.spec, ctx.clamped = spec, kept is not None
        stats, clamp, outputs = saved_and_outputs(ctx, found, ctx.clamped)
        ctx.save_for_backward(logits, target, stats, clamp)
        return outputs

    @staticmethod
    @derivative.first_only("token_stats")
    def backward(ctx, *grads):
        logits, target, stats, clamp = ctx.saved_tensors
        grad = logits_grad(logits, target, stats, clamp, three_gradients(grads, ctx.clamped), ctx.spec)
        return grad, *[None] * 8
