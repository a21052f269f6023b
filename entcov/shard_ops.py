"""The ops around the all-gather of `entcov.stats.shards`: one launch each on a GPU, which must not wait for them.

checksum(values [n] int64) -> [] int64
    a hash that sees order, so that ranks can compare their targets by one number
shard_message(payload [T, F] fp32, words, hash) -> [header rows + T, F] fp32
    the bits of `words` (integers of 64 bits) and of `hash` [] int64 or None behind them, zeros up to the end of the
    row, then the payload
accept_shards(shards [R, header rows + T, F], words, alike_from, pieces) -> [R, T, F]
    the payloads of messages whose headers have `words` words; all NaN if headers differ from word `alike_from` on, or
    if their words 1 do not add up to `pieces` modulo 2^64

None of them mutates an argument or has a derivative.
"""

import torch
from torch import Tensor

from entcov import cuda_ops
from entcov.op_registry import check_rows, register

_DERIVATIVE_ERROR = "{} is a building block without a derivative; entcov.token_stats has one"


def header_rows(words: int, fields: int) -> int:
    """Rows of `fields` floats that `words` words of 8 bytes take."""
    return -(-2 * words // fields)


def headers_of(shards: Tensor, words: int) -> Tensor:
    """The headers [R, words] int64 of messages [R, rows, F]."""
    R, _, F = shards.shape
    floats = shards[:, : header_rows(words, F)].reshape(R, -1)[:, : 2 * words]
    return floats.flatten().view(torch.int64).view(R, words)


# ---- checksum -------------------------------------------------------------------------------------------------------


def _checksum_fake(values: Tensor) -> Tensor:
    check_rows(values, "values", torch.int64, (values.numel(),), values)
    return values.new_empty(())


def _checksum_cpu(values: Tensor) -> Tensor:
    _checksum_fake(values)
    mixed = torch.arange(values.numel(), dtype=torch.int64)
    mixed.mul_(-7046029254386353131).add_(values)  # wraps around: a position-dependent offset ...
    mixed.bitwise_xor_(mixed >> 31).mul_(-4658895280553007687)  # ... and two rounds of mixing
    mixed.bitwise_xor_(mixed >> 29).mul_(-7723592293110705685)
    return mixed.sum()


def _checksum_cuda(values: Tensor) -> Tensor:
    out = _checksum_fake(values)
    cuda_ops.checksum(out, values)
    return out


checksum = register(
    "checksum",
    "(Tensor values) -> Tensor",
    _checksum_cpu,
    _checksum_fake,
    cuda=_checksum_cuda,
    derivative_error=_DERIVATIVE_ERROR.format("checksum"),
)


# ---- shard_message --------------------------------------------------------------------------------------------------


def _shard_message_fake(payload: Tensor, words: list[int], hash: Tensor | None) -> Tensor:
    if payload.dim() != 2 or payload.shape[1] < 1:
        raise ValueError(f"payload must be [T, F >= 1], got {tuple(payload.shape)}")
    check_rows(payload, "payload", torch.float32, payload.shape, payload)
    check_rows(hash, "hash", torch.int64, (), payload)
    T, F = payload.shape
    return payload.new_empty((header_rows(len(words) + (hash is not None), F) + T, F))


def _shard_message_cpu(payload: Tensor, words: list[int], hash: Tensor | None) -> Tensor:
    message = _shard_message_fake(payload, words, hash)
    given = torch.tensor(words, dtype=torch.int64)
    header = given if hash is None else torch.cat((given, hash[None]))
    rows = len(message) - len(payload)
    message[:rows] = 0
    message.view(-1)[: 2 * len(header)] = header.view(torch.float32)
    message[rows:] = payload
    return message


def _shard_message_cuda(payload: Tensor, words: list[int], hash: Tensor | None) -> Tensor:
    message = _shard_message_fake(payload, words, hash)
    cuda_ops.shard_message(message, payload, words, hash)
    return message


shard_message = register(
    "shard_message",
    "(Tensor payload, int[] words, Tensor? hash) -> Tensor",
    _shard_message_cpu,
    _shard_message_fake,
    cuda=_shard_message_cuda,
    derivative_error=_DERIVATIVE_ERROR.format("shard_message"),
)


# ---- accept_shards --------------------------------------------------------------------------------------------------


def _accept_shards_fake(shards: Tensor, words: int, alike_from: int, pieces: int) -> Tensor:
    if not 2 <= alike_from <= words:
        raise ValueError(f"alike_from must be in [2, words = {words}], got {alike_from}")
    if shards.dim() != 3 or shards.shape[0] < 1 or shards.shape[2] < 1:
        raise ValueError(f"shards must be [R >= 1, header rows + T, F >= 1], got {tuple(shards.shape)}")
    check_rows(shards, "shards", torch.float32, shards.shape, shards)
    R, rows, F = shards.shape
    if rows < header_rows(words, F):
        raise ValueError(f"shards must have the {header_rows(words, F)} rows of a header of {words} words, got {rows}")
    return shards.new_empty((R, rows - header_rows(words, F), F))


def _accept_shards_cpu(shards: Tensor, words: int, alike_from: int, pieces: int) -> Tensor:
    parts = _accept_shards_fake(shards, words, alike_from, pieces)
    headers = headers_of(shards, words)
    agreed = (headers[:, alike_from:] == headers[0, alike_from:]).all() & (headers[:, 1].sum() == pieces)
    return parts.copy_(shards[:, shards.shape[1] - parts.shape[1] :]).masked_fill_(~agreed, torch.nan)


def _accept_shards_cuda(shards: Tensor, words: int, alike_from: int, pieces: int) -> Tensor:
    parts = _accept_shards_fake(shards, words, alike_from, pieces)
    cuda_ops.accept_shards(parts, shards, words, alike_from, pieces)
    return parts


accept_shards = register(
    "accept_shards",
    "(Tensor shards, int words, int alike_from, int pieces) -> Tensor",
    _accept_shards_cpu,
    _accept_shards_fake,
    cuda=_accept_shards_cuda,
    derivative_error=_DERIVATIVE_ERROR.format("accept_shards"),
)
