"""The ops around the all-gather, against Python's integers and bit by bit."""

import pytest
import torch

from entcov import shard_ops

WORDS = [0, -3, 2**62 + 1, -(2**63), 2**63 - 1, 7, 1]  # any bits: many of them are NaNs as floats


def signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def hash_of(values: list[int]) -> int:
    total = 0
    for i, value in enumerate(values):
        x = signed(i * 0x9E3779B97F4A7C15 + value)
        x = signed((x ^ x >> 31) * 0xBF58476D1CE4E5B9)
        total += signed((x ^ x >> 29) * 0x94D049BB133111EB)
    return signed(total)


@pytest.mark.parametrize("count", [0, 1, 31, 256, 257, 3000])
def test_checksum_in_integers_of_python(count):
    rng = torch.Generator().manual_seed(count)
    values = torch.randint(-(2**63), 2**63 - 1, (count,), generator=rng)
    assert shard_ops.checksum(values).shape == () and int(shard_ops.checksum(values)) == hash_of(values.tolist())


def test_checksum_sees_every_value_and_the_order():
    values = torch.arange(300) % 7
    seen = {int(shard_ops.checksum(values))}
    for i in range(0, 299, 13):
        changed = values.clone()
        changed[i] += 1
        swapped = values.clone()
        swapped[[i, i + 1]] = values[[i + 1, i]]
        seen |= {int(shard_ops.checksum(changed)), int(shard_ops.checksum(swapped))}
    seen.add(int(shard_ops.checksum(torch.cat((values, torch.zeros(1, dtype=torch.int64))))))
    assert len(seen) == 1 + 2 * 23 + 1


@pytest.mark.parametrize("fields, tokens", [(1, 5), (4, 0), (7, 3), (8, 3000), (132, 40)])
@pytest.mark.parametrize("hashed", [False, True])
def test_messages_carry_words_and_payload_bit_by_bit(fields, tokens, hashed):
    payload = torch.randn(tokens, fields, generator=torch.Generator().manual_seed(1))
    payload[1::2] = torch.nan
    given = torch.tensor(-5) if hashed else None
    message = shard_ops.shard_message(payload, WORDS, given)
    n = len(WORDS) + hashed
    rows = shard_ops.header_rows(n, fields)
    assert message.shape == (rows + tokens, fields) and (rows - 1) * fields < 2 * n <= rows * fields
    assert shard_ops.headers_of(message[None], n).tolist() == [WORDS + [-5] * hashed]
    assert torch.equal(message[rows:].view(torch.int32), payload.view(torch.int32))
    assert (message[:rows].reshape(-1)[2 * n :].view(torch.int32) == 0).all()


@pytest.mark.parametrize("fields, tokens", [(1, 3), (4, 3), (7, 700), (132, 20)])
def test_shards_are_accepted_if_their_headers_agree(fields, tokens):
    ranks, rng = 3, torch.Generator().manual_seed(2)
    payloads = [torch.randn(tokens, fields, generator=rng) for _ in range(ranks)]
    payloads[1][0] = -torch.inf

    def shards(change=None):
        messages = []
        for rank, payload in enumerate(payloads):
            words = [rank, 2**63 - 1 - rank, 5 * rank, 5, 40, -1, 2**40]
            if change and change[0] == rank:
                words[change[1]] = signed(words[change[1]] ^ change[2])
            messages.append(shard_ops.shard_message(payload, words, torch.tensor(99)))
        return torch.stack(messages)

    def accepted(change=None):
        return shard_ops.accept_shards(shards(change), 8, 4, signed(3 * 2**63 - 6))

    assert torch.equal(accepted(), torch.stack(payloads))
    for rank in range(ranks):
        assert torch.equal(accepted((rank, 0, 2)), accepted()) and torch.equal(accepted((rank, 3, 2)), accepted())
        for word in (1, 4, 5, 6):
            for bit in (0, 31, 32, 63):
                assert accepted((rank, word, 1 << bit)).isnan().all(), (rank, word, bit)
    other_hash = shards()
    other_hash[2].view(-1)[14:16] = torch.tensor([98]).view(torch.float32)
    assert shard_ops.accept_shards(other_hash, 8, 4, signed(3 * 2**63 - 6)).isnan().all()


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="values must be torch.int64"):
        shard_ops.checksum(torch.zeros(3))
    with pytest.raises(ValueError, match=r"payload must be \[T, F >= 1\], got \(3,\)"):
        shard_ops.shard_message(torch.zeros(3), [1], None)
    with pytest.raises(ValueError, match=r"alike_from must be in \[2, words = 3\], got 1"):
        shard_ops.accept_shards(torch.zeros(1, 2, 4), 3, 1, 0)
    with pytest.raises(ValueError, match="must have the 2 rows of a header of 3 words, got 1"):
        shard_ops.accept_shards(torch.zeros(1, 1, 4), 3, 2, 0)


def test_opcheck():
    library = torch.ops.entcov
    hash = library.checksum(torch.arange(4))
    message = library.shard_message(torch.ones(2, 4), [1, 2, 3], hash)
    for op, args in (
        (library.checksum, (torch.arange(4),)),
        (library.shard_message, (torch.ones(2, 4), [1, 2, 3], hash)),
        (library.accept_shards, (message[None], 4, 2, 2)),
    ):
        torch.library.opcheck(op.default, args)
