"""Random rows of logits and how they are passed, from a seed: what the fuzzers of this folder draw their cases from."""

import os
import random
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)  # fp32 has most ways to go wrong


def seeds(default: int, run: int = 0) -> Iterator[int]:
    """The seeds of one fuzzer's cases: ENTCOV_FUZZ_CASES of them (unless set: `default`), from ENTCOV_FUZZ_SEED on
    (unless set, other ones for each `run` of the fuzzer)."""
    count = int(os.environ.get("ENTCOV_FUZZ_CASES", default))
    first = int(os.environ.get("ENTCOV_FUZZ_SEED", run * count))
    return iter(range(first, first + count))


class Draw(random.Random):
    """A source of random choices, and of tensors that follow from the same seed."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.torch)

    def chance(self, p: float) -> bool:
        return self.random() < p

    def size(self, most: int) -> int:
        """1 to `most`, small ones more often."""
        return min(most, int(2 ** self.uniform(0, 1 + torch.tensor(float(most)).log2().item())))

    def columns(self, most: int) -> int:
        """Any width up to `most`: a handful, or hundreds, where a shard's sketch has ranks a few apart."""
        return self.size(most) if self.chance(0.5) else self.randint(most // 8, most)

    def temperature(self) -> float:
        return self.choice((1.0, 10 ** self.uniform(-1, 1), 10 ** self.uniform(-3, 6)))


def _gaussian(draw: Draw, T: int, V: int) -> Tensor:
    return 10 ** draw.uniform(-3, 1.3) * draw.normal(T, V)


def _peaked(draw, T, V):
    z = draw.normal(T, V)
    z[torch.arange(T), torch.randint(0, V, (T,), generator=draw.torch)] += draw.uniform(5, 60)
    return z


def _masked(draw, T, V):
    z = _gaussian(draw, T, V).masked_fill(torch.rand(T, V, generator=draw.torch) < draw.random(), -torch.inf)
    z[:, draw.randrange(V)] = draw.gauss(0, 2)
    return z


def _ties(draw, T, V):
    levels = draw.size(60)
    return draw.choice((0.25, 0.37)) * torch.randint(-levels, levels + 1, (T, V), generator=draw.torch)


def _shared_upper_bits(draw, T, V):
    spread = 10 ** -draw.choice((draw.uniform(0, 1.5), draw.uniform(1, 7)))  # a few such columns or many in each share
    return draw.choice((-3.0, 0.7, 3.0, 20.0)) + spread * draw.normal(T, V)


def _offset(draw, T, V):
    return draw.choice((1e4, -1e4, 300.0, -3e4)) + _gaussian(draw, T, V)


def _huge(draw, T, V):
    """Any size up to the limit of the dtype, where the difference of two logits overflows it."""
    z = (2 * torch.rand(T, V, generator=draw.torch) - 1) * draw.choice((10 ** draw.uniform(4, 38), 3e38, 3.4e38))
    return torch.where(torch.rand(T, V, generator=draw.torch) < draw.choice((0.0, 0.5)), z.sign() * z.abs().max(), z)


def _tiny(draw, T, V):
    return 10 ** draw.uniform(-41, -30) * draw.normal(T, V)


def _constant(draw, T, V):
    return torch.full((T, V), draw.gauss(0, 5))


KINDS = (_gaussian, _gaussian, _peaked, _masked, _ties, _shared_upper_bits, _shared_upper_bits, _offset, _huge, _huge)
KINDS += (_tiny, _constant)


def logits(draw: Draw, T: int, V: int, dtype: torch.dtype) -> Tensor:
    """[T, V]: every row has a finite logit, and none is +inf or NaN. Rows of several kinds may be together."""
    pieces = [draw.choice(KINDS)(draw, T, V) for _ in range(draw.choice((1, 1, 2)))]
    z = torch.where(torch.arange(T)[:, None] % len(pieces) == 0, pieces[0], pieces[-1])
    most = torch.finfo(dtype).max
    return torch.where(z == -torch.inf, z, z.clamp(-most, most)).to(dtype)


def near_threshold(draw: Draw, T: int, V: int) -> Tensor:
    """[T, V] of which many share their upper bits, or are equal: what selecting the k-th largest can get wrong."""
    return draw.choice((_shared_upper_bits, _shared_upper_bits, _gaussian, _ties))(draw, T, V).to(draw.choice(DTYPES))


def target(draw: Draw, z: Tensor) -> Tensor:
    """A column a row, the largest one in some rows; possible or not."""
    some = torch.randint(0, z.shape[1], (len(z),), generator=draw.torch)
    return torch.where(torch.rand(len(z), generator=draw.torch) < 0.3, z.float().argmax(-1), some)


def spread_out(draw: Draw, z: Tensor, padding: int) -> Tensor:
    """The same [T, V] and `padding` columns of rubbish, as rows of a larger tensor: another row stride, any alignment,
    and NaN around them."""
    T, V = z.shape
    step, left, right = draw.choice((1, 1, 2)), draw.randrange(9), draw.randrange(9)
    memory = torch.full((step * T + 1, left + V + padding + right), torch.nan, dtype=z.dtype)
    rows = memory[: step * T : step, left : left + V + padding]
    rows[:, :V] = z
    if padding and draw.chance(0.5):
        rows[:, V:] = torch.inf
    return rows


def bounds(draw: Draw, V: int) -> list[int]:
    """Where the columns are cut for 2 to 4 ranks; some may get none."""
    return [0, *sorted(draw.randint(0, V) for _ in range(draw.choice((1, 1, 2, 3)))), V]
