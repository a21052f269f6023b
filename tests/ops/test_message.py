"""message and the signatures that merges compare, against Python's integers and bit by bit."""

import random

import pytest
import torch

from entcov.ops import core
from entcov.ops.core import RowSpec
from entcov.ops.merge_covariance_stats import merge_covariance_stats
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.message import hash_values, message, signatures

MASK = 2**64 - 1


def hash_of(place: int, value: int) -> int:
    x = place * 0x9E3779B97F4A7C15 + value & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def word(values: list[int], call: int) -> int:
    return signed(hash_of(call, sum(hash_of(i, value) for i, value in enumerate(values))) | 1) if call else 0


def own(payload, values=None, call=1, start=0, columns=8):
    return signatures(message(payload, values, call, start, columns)[None])[0].tolist()


@pytest.mark.parametrize("count", [0, 1, 31, 256, 257, 3000, 4096, 4097, 9000])
@pytest.mark.parametrize("call", [1, -3, 2**62 + 1, -(2**63)])
def test_hash_in_integers_of_python(count, call):
    rng = torch.Generator().manual_seed(count)
    values = torch.randint(-(2**63), 2**63 - 1, (count,), generator=rng)
    expected = word(values.tolist(), call)
    assert own(torch.zeros(2, 3), values, call) == [expected, 8 << 32]
    assert hash_values(values, call).shape == () and int(hash_values(values, call)) == expected


def test_hash_sees_every_value_and_the_order():
    values = torch.arange(300) % 7
    seen = {int(hash_values(values)), int(hash_values(values, 2))}
    for i in range(0, 299, 13):
        changed = values.clone()
        changed[i] += 1
        swapped = values.clone()
        swapped[[i, i + 1]] = values[[i + 1, i]]
        seen |= {int(hash_values(changed)), int(hash_values(swapped))}
    seen.add(int(hash_values(torch.cat((values, torch.zeros(1, dtype=torch.int64))))))
    assert len(seen) == 2 + 2 * 23 + 1


def test_a_rank_that_failed_is_marked_and_no_other_is():
    values = torch.arange(5)
    assert own(torch.zeros(1, 1), values, call=0)[0] == 0
    assert all(own(torch.zeros(1, 1), values, call)[0] % 2 for call in range(1, 500))


def test_texts_have_hashes_of_their_own():
    texts = ["", "a", "b", "ab", "abcdefgh", "abcdefgh\0", "abcdefghi", "abcdefghabcdefgh", "ä"]
    assert len({core.hash_text(text) for text in texts}) == len(texts)
    assert all(core.hash_text(text) % 2 for text in texts)


@pytest.mark.parametrize("width, tokens", [(1, 5), (4, 0), (7, 3), (8, 3000), (132, 40)])
def test_messages_carry_the_payload_bit_by_bit(width, tokens):
    payload = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    payload[1::2] = torch.nan
    sent = message(payload, None, 1, 2**31 - 1, 12345)
    assert sent.shape == (tokens * width + 4,)
    assert torch.equal(sent[:-4].view(torch.int32), payload.view(-1).view(torch.int32))
    assert signatures(sent[None]).tolist() == [[word([], 1), (12345 << 32) + 2**31 - 1]]


# ---- merges ---------------------------------------------------------------------------------------------------------

TARGET = torch.tensor([0, -100, 0, 0])


def merged(layout, size, calls=None, values=None):
    """Of shards (start, columns) with one logit each, which is the same everywhere; (row statistics, covariances)."""
    calls, values = calls or [9] * len(layout), values or [TARGET] * len(layout)
    rows = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(4, 1)
    pairs = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]).repeat(4, 1)
    sent = [
        torch.stack([message(payload, x, call, *place) for place, call, x in zip(layout, calls, values, strict=True)])
        for payload in (rows, pairs)
    ]
    spec = RowSpec(0, size)
    return torch.stack(merge_row_stats(sent[0], TARGET, spec)[1:]), torch.stack(
        merge_covariance_stats(sent[1], TARGET >= 0, 4, spec)[1:]
    )


def agrees(*arguments) -> bool:
    found = merged(*arguments)
    nan = [x[:, TARGET >= 0].isnan() for x in found]
    assert all(x.all() or not x.any() for x in nan) and nan[0].all() == nan[1].all()
    assert all((x[:, TARGET < 0] == 0).all() for x in found)  # ignored rows in any case
    return not nan[0].any()


def test_merges_accept_shards_exactly_when_they_cover_the_vocabulary_once():
    rng, right = random.Random(0), 0
    for _ in range(2000):
        size = rng.randint(1, 6)
        layout = []
        for _ in range(rng.randint(1, 4)):
            start = rng.randint(0, size)
            layout.append((start, min(rng.randint(0, 4), size - start)))
        covered = sorted(start + i for start, columns in layout for i in range(columns)) == list(range(size))
        assert agrees(layout, size) == covered, (layout, size)
        right += covered
    assert right > 100


def test_merges_refuse_ranks_that_were_called_differently_or_failed():
    layout = [(4, 3), (0, 4), (7, 1)]
    assert agrees(layout, 8)
    for rank in range(3):
        for call in (8, 0, -9, 9 ^ 1 << 40):
            calls = [9] * 3
            calls[rank] = call
            assert not agrees(layout, 8, calls)
        values = [TARGET] * 3
        values[rank] = TARGET.flip(0)
        assert not agrees(layout, 8, None, values)
    assert not agrees(layout, 8, [0, 0, 0]) and agrees(layout, 8, [7, 7, 7])


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="values must be torch.int64"):
        hash_values(torch.zeros(3))
    with pytest.raises(ValueError, match=r"payload must be \[T, width\], got \(3,\)"):
        message(torch.zeros(3), None, 1, 0, 0)
    with pytest.raises(ValueError, match=r"columns must be in \[0, 2\^31\), got -1"):
        message(torch.zeros(1, 1), None, 1, 0, -1)
    with pytest.raises(ValueError, match=r"start must be in \[0, 2\^31\), got 2147483648"):
        message(torch.zeros(1, 1), None, 1, 2**31, 0)


def test_opcheck():
    arguments = (torch.ones(2, 4), torch.arange(4), 3, 0, 9)
    torch.library.opcheck(torch.ops.entcov.message.default, arguments)
