"""The LM head that linear_token_stats reads through: logits = hidden @ weight.T + bias, a chunk of tokens at a time.

The matrix products are the library's. What is ours is when the logits exist: all at once where memory allows it, and
then they are overwritten by their gradient in backward (three products in all); else one chunk, in one buffer that
every chunk reuses, computed again for each pass (four products; with a clamp over a group, whose threshold is not known
before the ranks have talked, five, and one for each further round).

The gradient of the weight adds up in fp32 over the chunks, whatever the dtype: sums in bf16 lose what is small beside
the sum so far, always to the same side, and a policy trained on them loses entropy. On a GPU the product itself adds
into fp32 (torch >= 2.8). On a CPU torch has no such product: there each chunk's product is rounded to the dtype once
before it is added, an error that does not grow with the number of chunks.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from entcov.ops.core import RowSpec, with_huge_pages
from entcov.ops.row_stats import check_target

SAMPLED_VALUES = 4  # of each hidden state, that ranks compare
CHUNK_MULTIPLE = 128  # rows of a chunk: the tiles of the libraries' matrix products
BLOCK_ROWS = 1024  # of the gradient of the weight that go through a temporary, where no product adds into fp32
_ADDS_INTO_FP32 = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


def chunk_size_for(tokens: int, columns: int, itemsize: int, memory_budget: int, sum_bytes: int = 0) -> int:
    """Tokens whose logits exist at a time: all of them, or chunks of equal size within `memory_budget` bytes.

    All if tokens * columns * itemsize <= memory_budget + sum_bytes, `sum_bytes` being what chunks need beside their
    logits: keeping them all then takes no more memory than chunks would, and less time. Otherwise
    fit = memory_budget // (columns * itemsize), at least 1;  n = ceil(tokens / fit) chunks of ceil(tokens / n) tokens,
    rounded up to a multiple of 128 where that still fits.
    """
    if tokens * columns * itemsize <= memory_budget + sum_bytes:
        return max(tokens, 1)
    fit = max(memory_budget // (columns * itemsize), 1)
    even = -(-tokens // -(-tokens // fit))
    rounded = -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return rounded if rounded <= fit else even


class HeadRows:
    """The rows of hidden @ weight.T + bias, as `token_stats.row_statistics` reads them.

    hidden [T, D], weight [V_local, D] and bias [V_local] or None have one dtype. On the CPU, tokens whose target is
    the spec's ignore_index are left out of every product. Elsewhere they are computed and not read: leaving them out would need
    their number, for which the host would have to wait.
    """

    name = "linear_token_stats"

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        spec: RowSpec,
        chunk_size: int | None,
        memory_budget: int,
        sum_bytes: int = 0,
    ):
        self.hidden, self.weight, self.bias, self.target = hidden, weight, bias, target
        self.dtype = hidden.dtype
        self.chunk_size, self.memory_budget, self.sum_bytes = chunk_size, memory_budget, sum_bytes
        self.spec = spec
        self.index: Tensor | None = None  # [K] the tokens that count; None: all
        self.all_logits: Tensor | None = None  # those of the only chunk, once they are computed
        self._prepared = False

    def apply(self, op: Callable, *arguments, per_row: tuple[Tensor, ...] = ()):
        """op(logits, target, *per_row, *arguments), chunk by chunk: a tensor or a list of tensors, one row
        a token; zeros for the tokens left out."""
        self._prepare()
        chunks = []
        for part, logits in self.chunks():
            inputs = (self.rows_of(x, part) for x in (self.target, *per_row))
            chunks.append(op(logits, *inputs, *arguments))
        if isinstance(chunks[0], (tuple, list)):
            return [self._joined(pieces) for pieces in zip(*chunks, strict=True)]
        return self._joined(chunks)

    def values(self, ignore_index: int) -> dict[str, Tensor]:
        """What every rank must have alike, for `shards.Partial`: all targets, and the bits of a few values of each
        hidden state that counts. To read them all would cost more than it is worth: other tokens, another layer's
        output or another dropout mask show in a few; a change of other values of a state does not."""
        sampled = self.hidden[:, :: max(1, -(-self.hidden.shape[1] // SAMPLED_VALUES))].contiguous()
        bits = sampled.view(torch.int32 if self.dtype.itemsize == 4 else torch.int16).long()
        bits = bits.masked_fill((self.target == ignore_index)[:, None], 0)
        return {"target": self.target, "hidden": bits.flatten()}

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return self.in_place_of_all(pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _prepare(self) -> None:
        """What looks at the target's values. Not at construction: a rank that fails has a collective to enter first."""
        if self._prepared:
            return
        if self.target.device.type == "cpu":
            check_target(self.target, self.spec)
            counts = self.target != self.spec.ignore_index
            if not counts.all():
                self.index = counts.nonzero()[:, 0]
        self._settle_chunks()

    def restore(self, index: Tensor | None, all_logits: Tensor | None) -> None:
        """Prepared as the forward pass was, with the logits that it kept."""
        self.index, self.all_logits = index, all_logits
        self._settle_chunks()

    def _settle_chunks(self) -> None:
        if self.chunk_size is None:
            self.chunk_size = chunk_size_for(
                self.num_rows, self.weight.shape[0], self.dtype.itemsize, self.memory_budget, self.sum_bytes
            )
        self._prepared = True

    @property
    def num_rows(self) -> int:
        """Tokens that take part."""
        return len(self.target) if self.index is None else len(self.index)

    def rows_of(self, tensor: Tensor, part: slice) -> Tensor:
        """Those of `tensor` [T, ...] that belong to the tokens of a chunk."""
        return tensor[part] if self.index is None else tensor.index_select(0, self.index[part])

    def in_place_of_all(self, rows: Tensor) -> Tensor:
        """[K, ...] -> [T, ...], zeros for the tokens left out."""
        if self.index is None:
            return rows
        return rows.new_zeros((len(self.target), *rows.shape[1:])).index_copy_(0, self.index, rows)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which of the tokens that take part, their logits [n, V_local]), until the next one is asked for."""
        K, width = self.num_rows, self.weight.shape[0]
        if self.chunk_size >= K:
            if self.all_logits is None:
                self.all_logits = self._product(slice(0, K), self._buffer(K, width))
            yield slice(0, K), self.all_logits
            return
        buffer = self._buffer(self.chunk_size, width)
        for start in range(0, K, self.chunk_size):
            part = slice(start, min(start + self.chunk_size, K))
            yield part, self._product(part, buffer[: part.stop - part.start])

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return fresh((rows, columns), self.dtype, self.hidden.device)

    def _product(self, part: slice, out: Tensor) -> Tensor:
        hidden = self.rows_of(self.hidden, part)
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory to be written in full."""
    return with_huge_pages(torch.empty(shape, dtype=dtype, device=device))


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b. `out` may be fp32 where a and b are bf16 or fp16; a GPU then rounds nothing."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and _ADDS_INTO_FP32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for rows in range(0, len(a), BLOCK_ROWS):
            out[rows : rows + BLOCK_ROWS] = torch.mm(a[rows : rows + BLOCK_ROWS], b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, `total` fp32. See the head of this file for what is rounded."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and _ADDS_INTO_FP32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for rows in range(0, len(a), BLOCK_ROWS):
            total[rows : rows + BLOCK_ROWS] += torch.mm(a[rows : rows + BLOCK_ROWS], b)
