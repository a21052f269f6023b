"""The clamped entropy of rows that are split over ranks, in rounds (csrc/clamp.h); the same code for CPU and CUDA.

The first all-gather exchanges a sketch of every shard, from which all ranks compute the same bracket. Each round is
then one pass over the logits and one all-gather of the partials: what every shard has above the bracket and inside it.
The partials of the first round include the row statistics. Most rows need one round.
"""

import math

import torch
from torch import Tensor

from entcov.ops.clamp_bracket import clamp_bracket
from entcov.ops.clamp_partial import PARTIAL, clamp_partial
from entcov.ops.clamp_refine import clamp_refine
from entcov.ops.clamp_sketch import SKETCH, clamp_sketch
from entcov.ops.core import RowSpec
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.row_stats import row_stats
from entcov.stats import ranks
from entcov.stats.shards import Partial, gather

# If the bracket of the sketches missed, up to 2^32 keys are left. Each round divides them by 160; a last one sums.
MOST_ROUNDS = 7


def sharded_clamped_stats(op, group, T, device, moments, resolve) -> list[Tensor]:
    """The result of `ops.clamped_stats`, for rows that are split over the ranks of `group`.

    Args:
        resolve: returns (rows, Settings, call, values), the last two for `shards.Partial`; it may raise. The other
            arguments are those of token_stats.sharded_row_statistics.

    Collectives: two all-gathers, of 4 * SKETCH and 4 * (4 | 7 + PARTIAL) bytes per token and rank, and one of
    4 * (4 + PARTIAL) bytes for every further round. The host waits once per round, to read the number of unfinished
    rows. During CUDA graph capture it cannot, so MOST_ROUNDS rounds run, which suffice for any data.
    """
    rows = settings = alike = failure = None

    def sketch():
        nonlocal rows, settings, alike, failure
        try:
            rows, settings, *alike = resolve()
            with torch.no_grad():
                return Partial(rows.apply(clamp_sketch, settings.spec), settings.shard, *alike)
        except Exception as error:
            failure = error
            raise

    def fail():
        raise failure

    fields = 7 if moments else 4
    try:
        sketches = gather(op, group, (T, SKETCH), device, sketch)
    except Exception:
        # On a GPU the other ranks have no error and continue with NaN: enter their next collective too.
        if failure is not None and not ranks.host_may_read(device):
            gather(op, group, (T, fields + PARTIAL), device, fail)
        raise
    shard, spec, kept, _ = settings
    target = rows.target
    margin = _margin(spec.vocab_size, kept, len(sketches))
    bracket = clamp_bracket(sketches, target, kept, margin, spec)
    clamp = torch.full((len(target), 4), torch.nan, dtype=torch.float32, device=target.device)
    found = None
    for _ in range(MOST_ROUNDS):
        with_moments = moments and found is None

        @torch.no_grad()
        def partial(bracket=bracket, with_moments=with_moments):
            # Every message is signed: if the ranks do not agree in a round, merge and refine give NaN.
            return Partial(rows.apply(_partial, spec, with_moments, per_row=(bracket,)), shard, *alike)

        partials = gather(op, group, (T, (7 if with_moments else 4) + PARTIAL), device, partial)
        if found is None:
            found = merge_row_stats(partials, target, spec, moments)
        bracket, clamp, clamped_entropy, unfinished = clamp_refine(
            partials, target, found[0], bracket, clamp, kept, spec
        )
        if not _captured(target) and int(unfinished) == 0:
            break
    stats, logprob, entropy, *scaled = found
    return [stats, clamp, logprob, entropy, clamped_entropy, *scaled]


def _partial(logits: Tensor, target: Tensor, bracket: Tensor, spec: RowSpec, moments: bool) -> Tensor:
    partial = clamp_partial(logits, target, bracket, spec)
    return torch.cat((row_stats(logits, target, spec, True), partial[:, 4:]), dim=1) if moments else partial


def _captured(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _margin(vocab_size: int, kept: int, world: int) -> int:
    """In ranks of the sorted row: 4.5 standard deviations of the rank that the sketches estimate for a logit.

    Its variance comes from the sample (one logit in 20, at most 8,192 per shard; counted as two thirds, since adjacent
    logits are correlated) and from the grid of quantiles."""
    share = kept / vocab_size
    sampled = min(vocab_size / 20, 8192 * world) / 1.5
    deviation = vocab_size * math.sqrt(share * (1 - share) / sampled + 1 / (12 * SKETCH**2 * world))
    return math.ceil(4.5 * deviation) + 1
