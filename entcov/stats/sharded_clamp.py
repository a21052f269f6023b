"""The clamped entropy of rows that are split over ranks, in rounds (csrc/clamp.h). The same on every device.

One all-gather carries a sketch of every shard, before the pass over the logits. The next ones carry what each shard has in
the bracket that the sketches yield, the first with the row statistics; most rows need one of these.
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

# A row that its sample misled has 2^32 keys left: 160 times fewer each round, and one round to add up what is kept.
MOST_ROUNDS = 7


def sharded_clamped_stats(op, group, T, device, moments, resolve) -> list[Tensor]:
    """What `clamped_stats` returns, over the ranks of `group`.

    Args:
        resolve: () -> (rows, Settings, call, values) of `shards.Partial`; it may raise. For the others see
            stats.token_stats.sharded_row_statistics.

    Two all-gathers, of 4 * SKETCH and 4 * (4 | 7 + PARTIAL) bytes a token and rank, and one more of 4 * (4 + PARTIAL) for
    every further round. The host reads one number a round, how many rows want another; captured in a CUDA graph, where it
    cannot, it runs as many rounds as any data may need.
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
        if failure is not None and not ranks.host_may_read(device):  # the others go on, with NaN: not alone
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
            # What ranks must agree on goes with every partial: a disagreement makes them all NaN each time.
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
    """Four and a half deviations of the estimated rank of a logit.

    It errs by the sample, one logit in 20 and at most 8,192 a shard, taken to be worth two thirds of that since
    neighbours are alike; and by the grid of the quantiles."""
    share = kept / vocab_size
    sampled = min(vocab_size / 20, 8192 * world) / 1.5
    deviation = vocab_size * math.sqrt(share * (1 - share) / sampled + 1 / (12 * SKETCH**2 * world))
    return math.ceil(4.5 * deviation) + 1
