"""The LM head of linear_token_stats: logits = hidden @ weight.T + bias, one chunk of tokens at a time.

The matrix products are torch's. This file decides when logits exist. If memory allows, all of them are computed once,
kept, and overwritten by their gradient in backward: 3 products in total. Otherwise one chunk exists at a time, in a
buffer that all chunks share, and is computed again in every pass: 4 products; with a clamp over a group 5, since its
threshold is known only after an all-gather, and one more for every further round.

The gradient of the weight is accumulated over chunks in fp32, whatever the dtype. A sum in bf16 loses terms that are
small beside it; the loss is biased, and a policy trained with it loses entropy. On a GPU the product accumulates into
fp32 directly (torch >= 2.10; older ones have the argument too, and round to the dtype before they add). On a CPU torch
has no such product: each chunk's product is rounded to the dtype once before it is added, an error that does not grow
with the number of chunks.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from entcov.ops.core import RowSpec, with_huge_pages
from entcov.ops.row_stats import check_target

SAMPLED_VALUES = 4  # values of each hidden state that ranks compare
CHUNK_MULTIPLE = 128  # rows of a chunk; the tile size of the libraries' matrix products
BLOCK_ROWS = 1024  # rows of the weight's gradient per temporary, where no product accumulates into fp32
_ADDS_INTO_FP32 = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 10)


def chunk_size_for(tokens: int, columns: int, itemsize: int, memory_budget: int, sum_bytes: int = 0) -> int:
    """The number of tokens whose logits exist at a time: all, or chunks of equal size within `memory_budget` bytes.

    All if tokens * columns * itemsize <= memory_budget + sum_bytes, where `sum_bytes` is the memory that chunks need in
    addition to their logits: keeping all logits then takes no more memory than chunks, and less time. Otherwise
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
    """The rows of hidden @ weight.T + bias, with the interface of `token_stats.LogitRows`.

    hidden [T, D], weight [V_local, D] and bias [V_local] or None have one dtype. On the CPU, tokens whose target is
    spec.ignore_index are left out of every product. On CUDA their logits are computed but not read, because the host
    would have to wait for the number of these tokens.
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
        self.index: Tensor | None = None  # [K] the tokens that are not ignored; None: all
        self.all_logits: Tensor | None = None  # the logits, once they are computed, if there is only one chunk
        self._prepared = False

    def apply(self, op: Callable, *arguments, per_row: tuple[Tensor, ...] = ()):
        """op(logits, target, *per_row, *arguments), chunk by chunk: a tensor or a list of tensors with one row per
        token; zeros for tokens that are left out."""
        self._prepare()
        chunks = []
        for part, logits in self.chunks():
            inputs = (self.rows_of(x, part) for x in (self.target, *per_row))
            chunks.append(op(logits, *inputs, *arguments))
        if isinstance(chunks[0], (tuple, list)):
            return [self._joined(pieces) for pieces in zip(*chunks, strict=True)]
        return self._joined(chunks)

    def values(self, ignore_index: int) -> dict[str, Tensor]:
        """The values that must be equal on all ranks, for `shards.Partial`: all targets, and the bits of a few values
        of each hidden state that is not ignored. A few values suffice to detect different tokens, another layer's
        output or another dropout mask, and reading all would cost too much; differences in other values are not
        detected."""
        sampled = self.hidden[:, :: max(1, -(-self.hidden.shape[1] // SAMPLED_VALUES))].contiguous()
        bits = sampled.view(torch.int32 if self.dtype.itemsize == 4 else torch.int16).long()
        bits = bits.masked_fill((self.target == ignore_index)[:, None], 0)
        return {"target": self.target, "hidden": bits.flatten()}

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return self.in_place_of_all(pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _prepare(self) -> None:
        """Checks targets and chooses chunks. Not in the constructor, because a rank that fails must still enter the
        collective, with a message whose size it knows."""
        if self._prepared:
            return
        if self.target.device.type == "cpu":
            check_target(self.target, self.spec)
            counts = self.target != self.spec.ignore_index
            if not counts.all():
                self.index = counts.nonzero()[:, 0]
        self._settle_chunks()

    def restore(self, index: Tensor | None, all_logits: Tensor | None) -> None:
        """Takes over the state of the forward pass: the index, and the logits if they were kept."""
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
        """K, the number of tokens that are not left out."""
        return len(self.target) if self.index is None else len(self.index)

    def rows_of(self, tensor: Tensor, part: slice) -> Tensor:
        """The rows of `tensor` [T, ...] for the tokens of a chunk."""
        return tensor[part] if self.index is None else tensor.index_select(0, self.index[part])

    def in_place_of_all(self, rows: Tensor) -> Tensor:
        """[K, ...] -> [T, ...], zeros for the tokens left out."""
        if self.index is None:
            return rows
        return rows.new_zeros((len(self.target), *rows.shape[1:])).index_copy_(0, self.index, rows)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of the K tokens, their logits [n, V_local]). The next chunk overwrites the logits."""
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
    """An uninitialised tensor, on the CPU backed by huge pages."""
    return with_huge_pages(torch.empty(shape, dtype=dtype, device=device))


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b. `out` may be fp32 if a and b are bf16 or fp16; on a GPU the product is then not rounded to them."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and _ADDS_INTO_FP32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for rows in range(0, len(a), BLOCK_ROWS):
            out[rows : rows + BLOCK_ROWS] = torch.mm(a[rows : rows + BLOCK_ROWS], b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with total in fp32. The head of this file says what is rounded."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and _ADDS_INTO_FP32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for rows in range(0, len(a), BLOCK_ROWS):
            total[rows : rows + BLOCK_ROWS] += torch.mm(a[rows : rows + BLOCK_ROWS], b)
