"""The clamped entropy of rows split over ranks: the local ops, and the rounds of them. The same on every device.

The statistics travel with what the clamp needs, so that it costs one all-gather more: of a sketch, before the pass over
the logits. csrc/clamp.h says what the ops compute; shapes and errors are those of entcov/ops.py.

clamp_sketch(logits, target, vocab_start, vocab_size, ignore_index) -> [T, SKETCH]
    quantiles of a sample of this shard, descending; -inf for a shard without columns
clamp_guess(sketches [R, T, SKETCH], columns [R], target, vocab_size, kept, margin, ignore_index) -> [T, 4] int32
    a bracket of keys that reaches `margin` ranks beyond the kept-th logit on either side, by estimate
clamp_part(logits, target, bracket, vocab_start, vocab_size, temperature, ignore_index) -> [T, 4 + PART]
    the shard's row statistics, its sums above the bracket, and what lies in it
clamp_narrow(parts [R, T, PART], target, stats, bracket, clamp, kept, temperature, ignore_index)
    -> (bracket [T, 4] int32, clamp [T, 4], [1] int32)
    the clamp of the rows that the parts suffice for (columns as of clamp_ops.clamped_stats; others keep theirs),
    the next brackets, and how many rows want one more round

None of them mutates an argument or has a derivative.
"""

import math

import torch
from torch import Tensor

from entcov import ops
from entcov.clamp_ops import DERIVATIVE_ERROR, launch
from entcov.op_registry import (
    DTYPES,
    check_columns,
    check_logits,
    check_rows,
    check_shard,
    check_temperature,
    num_columns,
    register,
)
from entcov.stats import ranks
from entcov.stats.shards import Part, gather

SKETCH, PART = 64, 6 + 160  # floats a row: csrc/clamp.h
# A row that its sample misled has 2^32 keys left: 160 times fewer each round, and one round to add up what is kept.
MOST_ROUNDS = 7


def _check_bracket(bracket, target, like) -> None:
    check_rows(bracket, "bracket", torch.int32, (target.shape[0], 4), like)


def _check_gathered(tensor: Tensor, name: str, width: int) -> None:
    if tensor.dim() != 3 or tensor.shape[0] < 1 or tensor.shape[2] != width or tensor.stride(2) != 1:
        raise ValueError(
            f"{name} must be [R >= 1, T, {width}] with stride 1 along the last, got {tuple(tensor.shape)} with strides "
            f"{tuple(tensor.stride())}"
        )
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {tensor.dtype}")


def _clamp_sketch_fake(logits, target, vocab_start, vocab_size, ignore_index):
    check_logits(logits)
    check_columns(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    check_shard(vocab_start, vocab_size)
    return logits.new_empty((logits.shape[0], SKETCH), dtype=torch.float32)


def _clamp_sketch(logits, target, vocab_start, vocab_size, ignore_index):
    sketch = _clamp_sketch_fake(logits, target, vocab_start, vocab_size, ignore_index)
    launch(
        "clamp_sketch", logits.device, DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        num_columns(logits, vocab_start, vocab_size), target.data_ptr(), ignore_index, sketch.data_ptr(),
    )  # fmt: skip
    return sketch


def _clamp_sketch_cpu(*args):
    _clamp_sketch_fake(*args)
    _, target, _, vocab_size, ignore_index = args
    ops.check_target(target, vocab_size, ignore_index)
    return _clamp_sketch(*args)


def _clamp_guess_fake(sketches, columns, target, vocab_size, kept, margin, ignore_index):
    _check_gathered(sketches, "sketches", SKETCH)
    check_rows(columns, "columns", torch.int64, sketches.shape[:1], sketches)
    check_rows(target, "target", torch.int64, sketches.shape[1:2], sketches)
    if not 1 <= kept <= vocab_size < 2**25:  # 64 times that is counted in 32 bits
        raise ValueError(f"kept and vocab_size must have 1 <= kept <= vocab_size < 2^25, got {kept} and {vocab_size}")
    if not 0 <= margin <= 2**25:
        raise ValueError(f"margin must be in [0, 2^25] (ranks), got {margin}")
    return sketches.new_empty((sketches.shape[1], 4), dtype=torch.int32)


def _clamp_guess(sketches, columns, target, vocab_size, kept, margin, ignore_index):
    bracket = _clamp_guess_fake(sketches, columns, target, vocab_size, kept, margin, ignore_index)
    R, T, _ = sketches.shape
    launch(
        "clamp_guess", sketches.device, sketches.data_ptr(), sketches.stride(0), sketches.stride(1), R, T,
        columns.data_ptr(), target.data_ptr(), ignore_index, vocab_size, kept, margin, bracket.data_ptr(),
    )  # fmt: skip
    return bracket


def _clamp_part_fake(logits, target, bracket, vocab_start, vocab_size, temperature, ignore_index):
    check_logits(logits)
    check_columns(logits)
    check_rows(target, "target", torch.int64, logits.shape[:1], logits)
    _check_bracket(bracket, target, logits)
    check_temperature(temperature)
    check_shard(vocab_start, vocab_size)
    return logits.new_empty((logits.shape[0], 4 + PART), dtype=torch.float32)


def _clamp_part(logits, target, bracket, vocab_start, vocab_size, temperature, ignore_index):
    part = _clamp_part_fake(logits, target, bracket, vocab_start, vocab_size, temperature, ignore_index)
    launch(
        "clamp_part", logits.device, DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), logits.shape[0],
        num_columns(logits, vocab_start, vocab_size), target.data_ptr(), vocab_start, vocab_size, ignore_index,
        bracket.data_ptr(), 1.0 / temperature, part.data_ptr(),
    )  # fmt: skip
    return part


def _clamp_narrow_fake(parts, target, stats, bracket, clamp, kept, temperature, ignore_index):
    _check_gathered(parts, "parts", PART)
    T = parts.shape[1]
    check_rows(target, "target", torch.int64, (T,), parts)
    if stats.dim() != 2 or stats.shape[1] not in (4, 7):
        raise ValueError(f"stats must be [T, 4 or 7] as merge_row_stats returns them, got {tuple(stats.shape)}")
    check_rows(stats, "stats", torch.float32, (T, stats.shape[1]), parts)
    _check_bracket(bracket, target, parts)
    check_rows(clamp, "clamp", torch.float32, (T, 4), parts)
    if not 1 <= kept < 2**25:
        raise ValueError(f"kept must be in [1, 2^25), got {kept}")
    check_temperature(temperature)
    return torch.empty_like(bracket), torch.empty_like(clamp), bracket.new_empty(1)


def _clamp_narrow(parts, target, stats, bracket, clamp, kept, temperature, ignore_index):
    _clamp_narrow_fake(parts, target, stats, bracket, clamp, kept, temperature, ignore_index)
    found = bracket.clone(), clamp.clone(), bracket.new_zeros(1)
    R, T, _ = parts.shape
    launch(
        "clamp_narrow", parts.device, parts.data_ptr(), parts.stride(0), parts.stride(1), R, T, target.data_ptr(),
        stats.data_ptr(), stats.shape[1], ignore_index, kept, 1.0 / temperature, *(x.data_ptr() for x in found),
    )  # fmt: skip
    return found


def _register(name: str, schema: str, kernel, fake, cpu=None):
    return register(
        name, schema, cpu or kernel, fake, cuda=kernel, derivative_error=DERIVATIVE_ERROR.format(name)
    )  # fmt: skip


clamp_sketch = _register(
    "clamp_sketch",
    "(Tensor logits, Tensor target, SymInt vocab_start, SymInt vocab_size, int ignore_index) -> Tensor",
    _clamp_sketch,
    _clamp_sketch_fake,
    _clamp_sketch_cpu,
)
clamp_guess = _register(
    "clamp_guess",
    "(Tensor sketches, Tensor columns, Tensor target, SymInt vocab_size, SymInt kept, SymInt margin, "
    "int ignore_index) -> Tensor",
    _clamp_guess,
    _clamp_guess_fake,
)
clamp_part = _register(
    "clamp_part",
    "(Tensor logits, Tensor target, Tensor bracket, SymInt vocab_start, SymInt vocab_size, float temperature, "
    "int ignore_index) -> Tensor",
    _clamp_part,
    _clamp_part_fake,
)
clamp_narrow = _register(
    "clamp_narrow",
    "(Tensor parts, Tensor target, Tensor stats, Tensor bracket, Tensor clamp, SymInt kept, float temperature, "
    "int ignore_index) -> (Tensor, Tensor, Tensor)",
    _clamp_narrow,
    _clamp_narrow_fake,
)


# ---- the rounds -----------------------------------------------------------------------------------------------------


def sharded_clamped_statistics(op, group, T, device, moments, resolve, agreed):
    """(rows, settings, merged row statistics [T, 4 | 7], clamp [T, 4]) over the ranks of `group`. For the arguments see
    stats.token_stats.sharded_row_statistics; `agreed` is its function of that name.

    Two all-gathers, of 4 * SKETCH and 4 * (4 | 7 + PART) bytes a token and rank, and one more of the latter for every
    further round. The host reads one number a round, how many rows want another; captured in a CUDA graph, where it
    cannot, it runs as many rounds as any data may need.
    """
    fields = 7 if moments else 4
    rows = settings = alike = failure = None

    def prepare():
        nonlocal rows, settings, alike, failure
        try:
            rows, settings, call = resolve()
            shard = settings.shard
            sketch = rows.apply(clamp_sketch, shard.start, shard.vocab_size, settings.ignore_index)
            alike = agreed(rows, settings, call)
            return Part(sketch, shard, *alike)
        except Exception as error:
            failure = error
            raise

    def fail():
        raise failure

    try:
        sketches, layout = gather(op, group, (T, SKETCH), device, prepare)
    except Exception:
        if failure is not None and not ranks.host_may_read(device):  # the others go on, with NaN: not alone
            gather(op, group, (T, fields + PART), device, fail)
        raise
    shard, kept, temperature, _, ignore_index = settings
    target = rows.target
    start, width = layout.unbind(-1)
    columns = (shard.vocab_size - start).clamp(min=0).minimum(width)
    margin = _margin(shard.vocab_size, kept, len(layout))
    bracket = clamp_guess(sketches, columns, target, shard.vocab_size, kept, margin, ignore_index)
    clamp = torch.full((len(target), 4), torch.nan, dtype=torch.float32, device=target.device)
    stats = None
    for _ in range(MOST_ROUNDS):
        arguments = (shard, temperature, moments and stats is None, ignore_index)
        width = PART + (4 if stats is not None else fields)

        def narrow(arguments=arguments, bracket=bracket):
            # What ranks must agree on goes with every part: a disagreement makes them all NaN each time.
            return Part(rows.apply(_part, *arguments, per_row=(bracket,)), shard, *alike)

        parts, _ = gather(op, group, (T, width), device, narrow)
        if stats is None:
            stats = ops.merge_row_stats(parts[..., :fields].contiguous(), target, temperature, ignore_index)
        parts = parts[..., -PART:]
        bracket, clamp, unfinished = clamp_narrow(parts, target, stats, bracket, clamp, kept, temperature, ignore_index)
        if not _captured(target) and int(unfinished) == 0:
            break
    return rows, settings, stats, clamp


def _part(logits, target, bracket, shard, temperature, moments, ignore_index):
    part = clamp_part(logits, target, bracket, shard.start, shard.vocab_size, temperature, ignore_index)
    if not moments:
        return part
    stats = ops.row_stats(logits, target, shard.start, shard.vocab_size, temperature, True, ignore_index)
    return torch.cat((stats, part[:, 4:]), dim=1)


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
