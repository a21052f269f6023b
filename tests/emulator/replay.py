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
    return np.where(np.isnan(x), x.dtype.type(np.nan), x)


def floats(*shape) -> Block:
    return Block(np.full(shape, np.nan, np.float32))


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

    segments = cuda.segments(columns)
    for fields in (4, 7):
        stats, work, merged = floats(T, fields), floats(segments, T, fields), floats(T, fields)
        cuda.row_stats(
            dtype, old.pointer, stride, T, columns, target.pointer, 0, columns, IGNORE, 1.25, stats.pointer, fields,
            work.pointer if segments > 1 else 0, 0,
        )  # fmt: skip
        shards = Block(np.stack([stats.read(), stats.read()]))
        cuda.merge_row_stats(shards.pointer, T * fields, 2, T, fields, target.pointer, IGNORE, 1.25, merged.pointer, 0)
        keep(stats, merged)
    hash, message = Block(np.zeros(1, np.int64)), floats(14 + 7 * T)  # a header of 6 words, in two rows of 7 floats
    cuda.checksum(target.pointer, T, hash.pointer, 0)
    cuda.shard_message([0, 4, 1, 2, 3], hash.pointer, merged.pointer, 7 * T, 14, message.pointer, 0)
    shards, parts = Block(np.stack([message.read()] * 3)), floats(3, T, 7)
    cuda.accept_shards(shards.pointer, 3, 14 + 7 * T, 14, 6, 2, 12, parts.pointer, 0)
    keep(message, parts)
    gradients = [Block(rng.standard_normal(T).astype(np.float32)) for _ in range(3)]
    clamp = Block(np.tile(np.float32([4.0, 0.5, 1.0, 0.7]), (T, 1)))
    storage = old.read().dtype
    for with_clamp in (False, True):
        grad = Block(np.zeros((T, V), storage))
        written, _ = logits(np.random.default_rng(V + T), T, V, gap, dtype, offset * size)
        for out, out_stride in ((grad, V), (written, stride)):
            cuda.logits_grad(
                dtype, (old if out is grad else out).pointer, stride, T, columns, V, target.pointer, 0, IGNORE,
                stats.pointer, 7, gradients[0].pointer, gradients[1].pointer,
                gradients[2].pointer if with_clamp else 0, clamp.pointer if with_clamp else 0, 1.25, out.pointer,
                out_stride, 0,
            )  # fmt: skip
        keep(grad, written)
    for kept in {1, (columns + 1) // 2, columns} if columns else ():
        found, clamped = floats(T, 4), floats(T, 4)
        cuda.clamped_stats(
            dtype, old.pointer, stride, T, columns, target.pointer, kept, IGNORE, 1.25, found.pointer,
            clamped.pointer, 0,
        )  # fmt: skip
        keep(found, clamped)
    pair, work, merged = floats(T, 8), floats(segments, T, 8), floats(T, 8)
    cuda.covariance_stats(
        dtype, old.pointer, stride, new.pointer, stride, T, columns, mask.pointer, 1.25, pair.pointer,
        work.pointer if segments > 1 else 0, 0,
    )  # fmt: skip
    shards = Block(np.stack([pair.read(), pair.read()]))
    cuda.merge_covariance_stats(shards.pointer, T * 8, 2, T, mask.pointer, 1.25, merged.pointer, 0)
    grad = Block(np.zeros((T, V), storage))
    cuda.logit_covariance_grad(
        dtype, old.pointer, stride, new.pointer, stride, T, columns, V, mask.pointer, pair.pointer,
        *(g.pointer for g in gradients), 1.25, grad.pointer, V, 0,
    )  # fmt: skip
    keep(pair, merged, grad)
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
        stats, clamp = floats(T, 4), floats(T, 4)
        cuda.clamped_stats(
            dtype, logits.pointer, V, T, V, target.pointer, kept, IGNORE, 1.25, stats.pointer, clamp.pointer, 0
        )
        for block in (stats, clamp, *clamp_over_shards(cuda, x, kept, dtype, target)):
            digest.update(one_nan(block.read()).tobytes())
    return digest.hexdigest()[:16]


def clamp_over_shards(cuda, x: np.ndarray, kept: int, dtype: int, target: Block) -> tuple[Block, Block]:
    """The clamp of three shards, one of them empty: merged statistics and clamp, after as many rounds as it takes."""
    T, V = x.shape
    bounds = (0, V // 3, V // 3, V)
    shards = [(Block(narrow(x[:, i:j], dtype)), i, j - i) for i, j in zip(bounds, bounds[1:], strict=False)]
    sketches = [floats(T, 64) for _ in shards]
    for (logits, _, width), sketch in zip(shards, sketches, strict=True):
        cuda.clamp_sketch(dtype, logits.pointer, width, T, width, target.pointer, IGNORE, sketch.pointer, 0)
    gathered, columns = Block(np.stack([s.read() for s in sketches])), Block(np.int64([width for *_, width in shards]))
    bracket, clamp, stats = Block(np.zeros((T, 4), np.int32)), floats(T, 4), floats(T, 4)
    cuda.clamp_guess(
        gathered.pointer, T * 64, 64, 3, T, columns.pointer, target.pointer, IGNORE, V, kept, V // 20, bracket.pointer,
        0,
    )  # fmt: skip
    for turn in range(7):
        parts = [floats(T, 170) for _ in shards]
        for (logits, start, width), part in zip(shards, parts, strict=True):
            cuda.clamp_part(
                dtype, logits.pointer, width, T, width, target.pointer, start, V, IGNORE, bracket.pointer, 1.25,
                part.pointer, 0,
            )  # fmt: skip
        parts = np.stack([part.read() for part in parts])
        if turn == 0:
            own = Block(parts[..., :4].copy())
            cuda.merge_row_stats(own.pointer, T * 4, 3, T, 4, target.pointer, IGNORE, 1.25, stats.pointer, 0)
        parts, unfinished = Block(parts[..., 4:].copy()), Block(np.zeros(1, np.int32))
        cuda.clamp_narrow(
            parts.pointer, T * 166, 166, 3, T, target.pointer, stats.pointer, 4, IGNORE, kept, 1.25, bracket.pointer,
            clamp.pointer, unfinished.pointer, 0,
        )  # fmt: skip
        if unfinished.read()[0] == 0:
            return stats, clamp
    raise RuntimeError(f"{unfinished.read()[0]} rows are not done after {turn + 1} rounds")


def run_wrong_clamp_case(cuda, dtype: int) -> str:
    """Brackets and parts that no kernel made: what comes of them does not matter, but that nothing else is touched."""
    V, whole = 3000, (0x007FFFFF, 0xFF800000)  # keys from -inf to +inf
    rng = np.random.default_rng(0)
    brackets = [(*whole, 1), (*whole, 3), (*whole, 7), (*whole[::-1], 1), (0, 0, 0), (0, 2**32 - 1, 1)]
    brackets += [(0x7FFFFFFF - 159, 0x7FFFFFFF, mode) for mode in (0, 1, 3)]  # +0 lies behind the key of -0
    T = len(brackets)
    x = 3 * rng.standard_normal((T, V))
    x[:, ::2] = 0.0
    logits, target = Block(narrow(x, dtype)), Block(np.zeros(T, np.int64))
    given = np.array([(*b, 0) for b in brackets], np.uint32)
    bracket, part = Block(given), floats(T, 170)
    cuda.clamp_part(
        dtype, logits.pointer, V, T, V, target.pointer, 0, V, IGNORE, bracket.pointer, 1.25, part.pointer, 0
    )
    own = part.read()[:, 4:]
    stats = Block(np.ascontiguousarray(part.read()[:, :4]))
    for wrong in (161.0, 5000.0, 2.0**24 + 2, 1e30, -5.0, 0.5, np.nan, np.inf, -np.inf):
        for field in (3, 4, 5, 6, 165, slice(None)):
            parts = own.copy()
            parts[:, field] = wrong
            parts, again, clamp = Block(np.stack([parts, own])), Block(given), floats(T, 4)
            unfinished = Block(np.zeros(1, np.int32))
            for kept in (1, V // 2, V):
                cuda.clamp_narrow(
                    parts.pointer, T * 166, 166, 2, T, target.pointer, stats.pointer, 4, IGNORE, kept, 1.25,
                    again.pointer, clamp.pointer, unfinished.pointer, 0,
                )  # fmt: skip
    return "survived"


CLAMP_CASES = {f"clamp, {V} {name}": (V, dtype) for V in (7, 9001) for name, dtype in DTYPES.items()}

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
        wrong = {f"wrong brackets and parts, {name}": dtype for name, dtype in DTYPES.items()}
        results |= {name: run_wrong_clamp_case(cuda, dtype) for name, dtype in wrong.items() if wanted in name}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
