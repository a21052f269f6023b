"""Runs every kernel of one emulated build on fixed data and prints what it got, as {case: digest of all outputs}.

    python replay.py <extension> <seed of the schedule> [part of the cases' names]

For a process of its own, with a sanitizer preloaded: it needs numpy only. Every array is a heap block of its exact
size, so that AddressSanitizer sees the first byte past its end; what lies between the rows is NaN. That the numbers are
right is tested elsewhere (test_kernels.py, on the plain build); here they must be the same in every build and
schedule.
"""

import ctypes
import hashlib
import importlib.util
import json
import sys

import numpy as np

IGNORE = -100
BF16, FP16, FP32 = 1, 2, 0
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
free = ctypes.CDLL(None).free
free.argtypes = [ctypes.c_void_p]
poison = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)  # there under AddressSanitizer


class Block:
    """A copy of an array on the heap, `offset` bytes behind a 16-byte boundary; the heap's own alignment is 16."""

    def __init__(self, values: np.ndarray, offset: int = 0):
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, values.nbytes
        self.base = malloc(values.nbytes + offset)
        self.pointer = self.base + offset
        if poison is not None:
            poison(ctypes.c_void_p(self.base), ctypes.c_size_t(offset // 8 * 8))  # its grain is 8 bytes
        ctypes.memmove(self.pointer, np.ascontiguousarray(values).ctypes.data, values.nbytes)

    def read(self) -> np.ndarray:
        raw = ctypes.string_at(self.pointer, self.nbytes)
        return np.frombuffer(raw, self.dtype).reshape(self.shape)

    def __del__(self):
        free(self.base)


def narrow(x: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == FP32:
        return x.astype(np.float32)
    if dtype == FP16:
        return x.astype(np.float16)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def logits(rng, T, V, gap, dtype, offset) -> tuple[Block, int]:
    """[T, V] with `gap` columns of NaN between the rows, and awkward values within: -inf, ties, a NaN row, a peak."""
    x = 3 * rng.standard_normal((T, V + gap)) + 5
    x[:, ::7] = -np.inf
    if T > 1:
        x[1] = np.round(x[1])
        x[1, V // 2] = 60.0
    if T > 2:
        x[2, V - 1] = np.nan
    x[:, V:] = np.nan
    flat = narrow(x, dtype).reshape(-1)
    return Block(flat[: len(flat) - gap], offset), V + gap


def one_nan(x: np.ndarray) -> np.ndarray:
    """Which of two NaNs an addition passes on, and so its sign, is the compiler's choice."""
    if x.dtype == np.uint16:  # bf16
        return np.where((x & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), x)
    return np.where(np.isnan(x), x.dtype.type(np.nan), x) if x.dtype.kind == "f" else x


def floats(*shape) -> Block:
    return Block(np.full(shape, np.nan, np.float32))


def pointers(blocks: list[Block], count: int) -> tuple[int, ...]:
    """A struct of `count` pointers, the first of which are given."""
    return (*(block.pointer for block in blocks), *[0] * (count - len(blocks)))


def run_case(cuda, T: int, V: int, columns: int, gap: int, dtype: int, offset: int) -> str:
    rng = np.random.default_rng(V + T)
    size = 4 if dtype == FP32 else 2
    old, stride = logits(rng, T, V, gap, dtype, offset * size)
    new, _ = logits(rng, T, V, gap, dtype, offset * size)
    target = rng.integers(0, max(columns, 1), T)
    target[3:4] = IGNORE
    target, mask = Block(target), Block((target != IGNORE).astype(np.uint8))
    digest = hashlib.sha256()

    def keep(*blocks):
        for block in blocks:
            digest.update(one_nan(block.read()).tobytes())

    segments, spec = cuda.segments(columns), (0, columns or 1, 0.8, IGNORE)
    before, after = (dtype, old.pointer, stride, T, V), (dtype, new.pointer, stride, T, V)
    # V columns, of which `columns` exist; none exist for a shard that starts behind the vocabulary.
    spec = spec if columns else (V, V, 0.8, IGNORE)

    def messages(*payloads):
        """Of ranks that agree, as far as there are columns."""
        sent = [floats(payload.read().size + 4) for payload in payloads]
        for rank, (payload, out) in enumerate(zip(payloads, sent, strict=True)):
            own = (0, spec[1]) if rank == 0 else (spec[1], 0)
            cuda.message(payload.pointer, payload.read().size, target.pointer, T, 7, *own, out.pointer, 0, 0)
        return Block(np.stack([out.read() for out in sent]))

    def view(gathered):
        return gathered.pointer, gathered.shape[0], T, (gathered.shape[1] - 4) // max(T, 1)

    for fields in (4, 7):
        stats, work, merged = floats(T, fields), floats(segments, T, fields), floats(T, fields)
        outputs, again = [floats(T) for _ in range(5)], [floats(T) for _ in range(5)]
        wanted = 5 if fields == 7 else 2
        cuda.row_stats(
            before, target.pointer, spec, fields, stats.pointer, pointers(outputs[:wanted], 5),
            work.pointer if segments > 1 else 0, 0,
        )  # fmt: skip
        gathered = messages(stats, stats)
        cuda.merge_row_stats(
            view(gathered), target.pointer, spec, fields, merged.pointer, pointers(again[:wanted], 5), 0
        )
        keep(stats, merged, gathered, *outputs[:wanted], *again[:wanted])
    gradients = [Block(rng.standard_normal(T).astype(np.float32)) for _ in range(3)]
    clamp = Block(np.tile(np.float32([4.0, 0.5, 1.0, 0.7]), (T, 1)))
    storage = old.read().dtype
    for with_clamp in (False, True):
        grad = Block(np.zeros((T, V), storage))
        written, _ = logits(np.random.default_rng(V + T), T, V, gap, dtype, offset * size)
        for out, out_stride in ((grad, V), (written, stride)):
            cuda.logits_grad(
                before if out is grad else (dtype, out.pointer, stride, T, V), target.pointer, spec, stats.pointer, 7,
                pointers(gradients[: 2 + with_clamp], 3), clamp.pointer if with_clamp else 0, out.pointer, out_stride,
                0,
            )  # fmt: skip
        keep(grad, written)
    for kept in {1, (columns + 1) // 2, columns} if columns else ():
        found, clamped, values = floats(T, 4), floats(T, 4), [floats(T) for _ in range(3)]
        cuda.clamped_stats(
            before, target.pointer, spec, kept, found.pointer, pointers(values[:2], 5), clamped.pointer,
            values[2].pointer, 0,
        )  # fmt: skip
        keep(found, clamped, *values)
    pair, work, merged = floats(T, 8), floats(segments, T, 8), floats(T, 8)
    outputs, again = [floats(T) for _ in range(4)], [floats(T) for _ in range(4)]
    cuda.covariance_stats(
        before, after, mask.pointer, spec, pair.pointer, pointers(outputs, 4), work.pointer if segments > 1 else 0, 0
    )
    gathered = messages(pair, pair)
    cuda.merge_covariance_stats(view(gathered), mask.pointer, spec, merged.pointer, pointers(again, 4), 0)
    grad = Block(np.zeros((T, V), storage))
    cuda.logit_covariance_grad(
        before, after, mask.pointer, spec, pair.pointer, pointers(gradients, 3), grad.pointer, V, 0
    )
    keep(pair, merged, grad, *outputs, *again)
    return digest.hexdigest()[:16]


# Rows that make a selection wrong, by name; k: columns. The bracket that a sample gives straddles zero in some of them,
# holds 1,400 equal logits in others, is one value, or misses.
CLAMP_ROWS = {
    "all equal": lambda k, rng: np.full(len(k), 1.25),
    "two values": lambda k, rng: rng.permutation(np.where(k < len(k) // 3, 2.0, -1.0)),
    "1400 ties": lambda k, rng: rng.permutation(np.where(k < 1400, 0.5, 3 * rng.standard_normal(len(k)))),
    "straddles zero": lambda k, rng: rng.standard_normal(len(k)) * np.exp2(-(k % 40)),
    "denormals": lambda k, rng: rng.permutation(1e-42 * (k - len(k) // 2)),
    "-inf columns": lambda k, rng: np.where(k % 3 == 1, -np.inf, rng.standard_normal(len(k))),
    "descending": lambda k, rng: np.linspace(9, -9, len(k)),
    "ascending": lambda k, rng: np.linspace(-9, 9, len(k)),
    "few values": lambda k, rng: 0.5 * rng.integers(-3, 4, len(k)),
    "no sample shows it": lambda k, rng: np.where(k % 640 < 320, 0.01 * rng.standard_normal(len(k)), 5.0 + k % 7),
}


def run_clamp_case(cuda, V: int, dtype: int) -> str:
    rng, k = np.random.default_rng(V), np.arange(V)
    x = np.stack([make(k, rng) for make in CLAMP_ROWS.values()])
    T = len(x)
    logits, target = Block(narrow(x, dtype)), Block(np.where(np.arange(T) == 4, IGNORE, 0))
    digest = hashlib.sha256()
    for kept in sorted({1, 2, V // 3, V // 2, 2 * V // 3 + 1, V}):
        stats, clamp, values = floats(T, 4), floats(T, 4), [floats(T) for _ in range(3)]
        cuda.clamped_stats(
            (dtype, logits.pointer, V, T, V), target.pointer, (0, V, 0.8, IGNORE), kept, stats.pointer,
            pointers(values[:2], 5), clamp.pointer, values[2].pointer, 0,
        )  # fmt: skip
        for block in (stats, clamp, *values, *clamp_over_shards(cuda, x, kept, dtype, target)):
            digest.update(one_nan(block.read()).tobytes())
    return digest.hexdigest()[:16]


SKETCH, PARTIAL = 64, 166  # floats a row


def gather(cuda, payloads: list[Block], columns: list[tuple[int, int]]) -> tuple[Block, tuple[int, int, int, int]]:
    """The messages of ranks with these (start, columns), and how a launcher takes them."""
    T, width = payloads[0].shape
    sent = [floats(T * width + 4) for _ in payloads]
    for payload, own, out in zip(payloads, columns, sent, strict=True):
        cuda.message(payload.pointer, T * width, 0, 0, 1, *own, out.pointer, 0, 0)
    gathered = Block(np.stack([out.read() for out in sent]))
    return gathered, (gathered.pointer, len(sent), T, width)


def clamp_over_shards(cuda, x: np.ndarray, kept: int, dtype: int, target: Block) -> tuple[Block, ...]:
    """The clamp of three shards, one of them empty: merged statistics and clamp, after as many rounds as it takes."""
    T, V = x.shape
    bounds = (0, V // 3, V // 3, V)
    shards = [(Block(narrow(x[:, i:j], dtype)), i, j - i) for i, j in zip(bounds, bounds[1:], strict=False)]
    views = [(dtype, logits.pointer, width, T, width) for logits, _, width in shards]
    specs, columns = [(start, V, 0.8, IGNORE) for _, start, _ in shards], [(i, n) for _, i, n in shards]
    sketches = [floats(T, SKETCH) for _ in shards]
    for view, spec, sketch in zip(views, specs, sketches, strict=True):
        cuda.clamp_sketch(view, target.pointer, spec, sketch.pointer, 0)
    block, gathered = gather(cuda, sketches, columns)
    bracket, clamp, stats = Block(np.zeros((T, 4), np.int32)), floats(T, 4), floats(T, 4)
    outputs = [floats(T) for _ in range(3)]
    cuda.clamp_bracket(gathered, target.pointer, specs[0], kept, V // 20, bracket.pointer, 0)
    for turn in range(7):
        partials = [floats(T, 4 + PARTIAL) for _ in shards]
        for view, spec, partial in zip(views, specs, partials, strict=True):
            cuda.clamp_partial(view, target.pointer, spec, bracket.pointer, partial.pointer, 0)
        block, gathered = gather(cuda, partials, columns)  # noqa: F841  (block: the memory of gathered)
        if turn == 0:
            cuda.merge_row_stats(gathered, target.pointer, specs[0], 4, stats.pointer, pointers(outputs[:2], 5), 0)
        unfinished, next_bracket, next_clamp = Block(np.zeros(1, np.int32)), Block(bracket.read()), floats(T, 4)
        cuda.clamp_refine(
            gathered, target.pointer, specs[0], stats.pointer, 4, kept, bracket.pointer, clamp.pointer,
            next_bracket.pointer, next_clamp.pointer, outputs[2].pointer, unfinished.pointer, 0,
        )  # fmt: skip
        bracket, clamp = next_bracket, next_clamp
        if unfinished.read()[0] == 0:
            return stats, clamp, *outputs
    raise RuntimeError(f"{unfinished.read()[0]} rows are not done after {turn + 1} rounds")


def run_wrong_clamp_case(cuda, dtype: int) -> str:
    """Brackets and partials that no kernel made. Their result does not matter; nothing else may be touched."""
    V, whole = 3000, (0x007FFFFF, 0xFF800000)  # keys from -inf to +inf
    rng = np.random.default_rng(0)
    brackets = [(*whole, 1), (*whole, 3), (*whole, 7), (*whole[::-1], 1), (0, 0, 0), (0, 2**32 - 1, 1)]
    brackets += [(0x7FFFFFFF - 159, 0x7FFFFFFF, mode) for mode in (0, 1, 3)]  # +0 lies behind the key of -0
    T = len(brackets)
    x = 3 * rng.standard_normal((T, V))
    x[:, ::2] = 0.0
    logits, target, spec = Block(narrow(x, dtype)), Block(np.zeros(T, np.int64)), (0, V, 0.8, IGNORE)
    given = np.array([(*b, 0) for b in brackets], np.uint32)
    bracket, partial = Block(given), floats(T, 4 + PARTIAL)
    cuda.clamp_partial((dtype, logits.pointer, V, T, V), target.pointer, spec, bracket.pointer, partial.pointer, 0)
    own = partial.read()
    stats = Block(np.ascontiguousarray(own[:, :4]))
    for wrong in (161.0, 5000.0, 2.0**24 + 2, 1e30, -5.0, 0.5, np.nan, np.inf, -np.inf):
        for field in (7, 8, 9, 10, 169, slice(4, None)):
            spoiled = own.copy()
            spoiled[:, field] = wrong
            block, gathered = gather(cuda, [Block(spoiled), partial], [(0, V), (V, 0)])  # noqa: F841
            for kept in (1, V // 2, V):
                clamp, entropy, unfinished = floats(T, 4), floats(T), Block(np.zeros(1, np.int32))
                next_bracket, next_clamp = Block(given), floats(T, 4)
                cuda.clamp_refine(
                    gathered, target.pointer, spec, stats.pointer, 4, kept, bracket.pointer, clamp.pointer,
                    next_bracket.pointer, next_clamp.pointer, entropy.pointer, unfinished.pointer, 0,
                )  # fmt: skip
    return "survived"


def run_message_case(cuda, count: int) -> str:
    """A message whose values are hashed by more than one block, if there are more than 4,096."""
    rng = np.random.default_rng(count)
    payload, out = Block(rng.standard_normal(5000).astype(np.float32)), floats(5004)
    values, parts = Block(rng.integers(-(2**62), 2**62, count)), cuda.hash_parts(count)
    room = Block(np.full(parts, -1, np.int64))
    cuda.message(
        payload.pointer, 5000, values.pointer, count, 9, 0, 8, out.pointer, room.pointer if parts > 1 else 0, 0
    )
    return hashlib.sha256(out.read().tobytes()).hexdigest()[:16]


DRAW, LARGEST, QUANTILE = 0, 1, 2
STAGES = {DRAW: (2, 7), LARGEST: (0, 7), QUANTILE: (0, 1)}


def run_select_case(cuda, T: int, ties: bool, apart: bool) -> str:
    """Covariance, summary and both selections of T tokens, with the stages in calls of their own if `apart`."""
    rng = np.random.default_rng(T)
    x, y = rng.standard_normal(T), rng.standard_normal(T)
    if ties:
        x, y = np.round(x), np.sign(y)
    mask, ids = Block((rng.random(T) < 0.8).astype(np.uint8)), Block(rng.permutation(3 * T)[:T] - T)
    exclude = Block((rng.random(T) < 0.2).astype(np.uint8))
    values = Block(x.astype(np.float32)), Block(y)
    view = 2, [block.pointer for block in values]
    sums, scores, mean = Block(np.zeros(8, np.int64)), floats(T), Block(np.full(2, np.nan))
    cuda.token_sums(view, mask.pointer, T, sums.pointer, 0)
    given = Block(sums.read()[:6].copy())
    again = Block(np.full(2, np.nan))
    cuda.token_means(given.pointer, 2, 0.0, 0, again.pointer, 0)
    cuda.token_scores(view, mask.pointer, T, given.pointer, 0.0, 0, scores.pointer, mean.pointer, 0)
    number, digest = Block(given.read()[4:5].copy()), hashlib.sha256()
    kept = [sums, scores, mean, again]
    for kind in (DRAW, LARGEST, QUANTILE):
        work = Block(np.full(cuda.select_workspace(T), -1, np.int64))
        chosen, result, threshold = Block(np.full(T, 7, np.uint8)), Block(np.zeros(3, np.int64)), floats(1)
        tokens = (scores.pointer, mask.pointer, ids.pointer, exclude.pointer if kind == DRAW else 0, number.pointer)
        spec = (kind, True, False, -0.5, 0.7, 0.05, 1, 3, 4)
        first, last = STAGES[kind]
        calls = [(stage, stage) for stage in range(first, last + 1)] if apart else [(first, last)]
        for call in calls:  # the ids of this rank are the first two words of its workspace
            cuda.token_select(
                (*tokens, 0, 0, work.pointer, 0), T, spec, 1, *call, work.pointer,
                (chosen.pointer, result.pointer, threshold.pointer), 0,
            )  # fmt: skip
        if kind == QUANTILE:
            average, extremes = Block(np.full(1, np.nan)), floats(2)
            cuda.token_summary(
                work.pointer, number.pointer, work.pointer, 1, mean.pointer, 0, average.pointer, extremes.pointer, 0
            )
            kept += [average, extremes]
        else:
            kept += [chosen, result] + ([threshold] if kind == LARGEST else [])
    for block in kept:
        digest.update(one_nan(block.read()).tobytes())
    return digest.hexdigest()[:16]


SELECT_CASES = {
    "selection of no token": (0, False, False),
    "selection of one token": (1, False, False),
    "selection of 2048 tokens": (2048, False, True),
    "selection of 5001 tokens": (5001, False, False),
    "selection of 5001 tokens with ties": (5001, True, False),
    "selection of 5001 tokens, stage by stage": (5001, True, True),
}

CLAMP_CASES = {f"clamp, {V} {name}": (V, dtype) for V in (7, 9001) for name, dtype in DTYPES.items()}

MESSAGES = (4096, 4097, 300_000)  # values

# name: T, V, columns that exist, columns between the rows, dtype, elements past a 16-byte boundary
CASES = {
    "no rows": (0, 8, 8, 0, BF16, 0),
    "one column": (5, 1, 1, 0, BF16, 0),
    "all padding": (5, 40, 0, 0, BF16, 0),
    "7 fp32": (5, 7, 7, 0, FP32, 0),
    "8 fp16": (1, 8, 8, 0, FP16, 0),
    "1000 bf16": (5, 1000, 1000, 0, BF16, 0),
    "1000 bf16, unaligned": (5, 1000, 1000, 0, BF16, 3),
    "1000 bf16, padding, odd stride, unaligned": (5, 1000, 991, 3, BF16, 1),
    "1001 fp32, odd stride": (5, 1001, 1001, 0, FP32, 3),
    "2049 fp16, a block a row": (5, 2049, 2049, 0, FP16, 5),
    "5008 bf16, aligned": (5, 5008, 5000, 8, BF16, 0),
    "5003 bf16, unaligned": (5, 5003, 5003, 2, BF16, 7),
    "5001 fp32, unaligned": (5, 5001, 4999, 1, FP32, 1),
    "41003 bf16, segments, unaligned": (2, 41003, 41003, 0, BF16, 3),
    "82000 fp32, segments": (1, 82000, 81999, 0, FP32, 0),
}


def main(extension: str, seed: str, wanted: str = "") -> None:
    spec = importlib.util.spec_from_file_location("_cuda", extension)
    cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda)
    ctypes.CDLL(extension).cuda_emu_set_seed(int(seed))
    with np.errstate(all="ignore"):
        results = {name: run_case(cuda, *case) for name, case in CASES.items() if wanted in name}
        results |= {name: run_clamp_case(cuda, *case) for name, case in CLAMP_CASES.items() if wanted in name}
        results |= {f"message of {n}": run_message_case(cuda, n) for n in MESSAGES if wanted in f"message of {n}"}
        results |= {name: run_select_case(cuda, *case) for name, case in SELECT_CASES.items() if wanted in name}
        wrong = {f"wrong brackets and partials, {name}": dtype for name, dtype in DTYPES.items()}
        results |= {name: run_wrong_clamp_case(cuda, dtype) for name, dtype in wrong.items() if wanted in name}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
