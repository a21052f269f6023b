"""Packing rollouts and dividing the batch: what each token predicts, its id, and what no division may change."""

from __future__ import annotations

import pytest
import torch

from entcov.rl.batch import IGNORE_INDEX, Batch, micro_batches, mini_batches, pack
from entcov.rl.types import Example, Prompt, Rollout
from tests.support import list_batch

EXAMPLE = Example("test", (), "")


def rollout(uid: int, prompt: list[int], response: list[int]) -> Rollout:
    logprob = [-0.1 * (i + 1) for i in range(len(response))]
    return Rollout(Prompt(uid, EXAMPLE, tuple(prompt)), 0, response, logprob, True, 0)


def test_pack_by_hand():
    batch = pack([rollout(0, [5, 6], [7, 8, 9]), rollout(1, [3], [4])])
    batch.assign_advantages(torch.tensor([2.0, -1.0]))
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 0, 1]
    x = IGNORE_INDEX
    assert batch.target.tolist() == [x, 7, 8, 9, x, 4, x]
    assert batch.loss_mask.tolist() == [False, True, True, True, False, True, False]
    assert batch.advantage.tolist() == [0, 2, 2, 2, 0, -1, 0]
    assert batch.rollout_logprob.tolist() == pytest.approx([0, -0.1, -0.2, -0.3, 0, -0.1, 0])
    assert batch.sequence_length.tolist() == [3, 3, 3, 3, 3, 1, 1]
    assert (batch.num_sequences, batch.num_loss_tokens) == (2, 4)
    assert len(set(batch.token_id.tolist())) == 7


def test_subset_keeps_every_field_of_every_token():
    batch = pack([rollout(i, [1] * (i + 1), list(range(10 * i + 2, 10 * i + 4 + i))) for i in range(5)])
    batch.assign_advantages(torch.arange(5.0))
    batch.old_logprob = torch.arange(len(batch.tokens)).float()
    batch.logprob_version = 3
    part = batch.subset([4, 1])
    assert part.lengths == (batch.lengths[4], batch.lengths[1]) and part.logprob_version == 3
    where = [batch.token_id.tolist().index(i) for i in part.token_id.tolist()]
    for name in ("tokens", "position", "target", "advantage", "old_logprob", "sequence_length"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[where]), name


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_hold_every_sequence_once_within_the_budget(padded):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 40, (int(torch.randint(1, 30, (1,), generator=generator)),), generator=generator)
        lengths = lengths.tolist()
        groups = micro_batches(lengths, 60, padded)
        assert sorted(s for g in groups for s in g) == list(range(len(lengths)))
        for g in groups:
            own = [lengths[s] for s in g]
            assert (len(g) * max(own) if padded else sum(own)) <= 60


def test_a_micro_batch_has_one_temperature():
    temperatures = [1.0, 1.2, 1.0, 1.1, 1.2, 1.0]
    for padded in (False, True):
        groups = micro_batches([5, 9, 7, 3, 2, 8], 16, padded, temperatures)
        assert sorted(s for g in groups for s in g) == list(range(6)) and len(groups) == 4 + padded
        assert all(len({temperatures[s] for s in g}) == 1 for g in groups)
        alone = micro_batches([5, 9, 7, 3, 2, 8], 16, padded)
        assert micro_batches([5, 9, 7, 3, 2, 8], 16, padded, [0.7] * 6) == alone != groups  # equal: nothing changes
    rollouts = [rollout(i, [1], [2, 3]) for i in range(3)]
    assert pack(rollouts).temperature is None
    rollouts[1].temperature = 1.2
    batch = pack(rollouts)
    assert batch.subset([1]).temperature == 1.2 and batch.subset([2, 0]).temperature is None
    with pytest.raises(ValueError, match=r"must have one, got \(None, 1.2, None\)"):
        batch.temperature  # noqa: B018


def test_micro_batches_refuse_a_sequence_beyond_the_budget():
    with pytest.raises(ValueError, match="micro_batch_tokens.*got 8 for a sequence of 9"):
        micro_batches([3, 9], 8, padded=False)


def test_mini_batches_keep_groups_whole():
    groups = [7, 7, 3, 3, 9, 9, 1, 1, 2, 2]
    parts = mini_batches(groups, 3)
    assert sorted(s for p in parts for s in p) == list(range(10)) and len(parts) == 3
    for part in parts:
        for s in part:
            assert all(t in part for t in range(10) if groups[t] == groups[s])
    assert len(mini_batches(groups, 8)) == 5  # no more mini-batches than groups


def test_pack_refuses_what_cannot_be_trained_on():
    with pytest.raises(ValueError, match="at least one"):
        pack([])
    with pytest.raises(ValueError, match=r"rollouts\[1\].*0 response tokens"):
        pack([rollout(0, [1], [2]), rollout(1, [1], [])])


def drawn(count: int, generator: torch.Generator) -> list[Rollout]:
    """Groups of up to three responses; single precision shows in every log-probability."""

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most, (1,), generator=generator))

    rollouts: list[Rollout] = []
    while len(rollouts) < count:
        prompt = Prompt(len(rollouts), EXAMPLE, tuple(number(0, 2**31 - 1) for _ in range(number(1, 6))))
        for sample in range(number(1, 4)):
            n = number(1, 40)
            tokens = torch.randint(0, 2**31 - 1, (n,), generator=generator).tolist()
            logprob = (-3 * torch.rand(n, generator=generator)).tolist()
            rollouts.append(Rollout(prompt, sample, tokens, logprob, True, 0, reward=float(sample)))
    return rollouts[:count]


def same_bits(batch: Batch, columns: dict[str, torch.Tensor]) -> None:
    for name, expected in columns.items():
        found = getattr(batch, name)
        assert torch.equal(found.to(expected.dtype), expected), name


def test_arrays_have_the_bits_of_lists():
    """Packing, subsets, dropping, means and the loss's view, against list_batch.py: one Python number at a time."""
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2, 7, 40):
        rollouts = drawn(count, generator)
        batch, columns = pack(rollouts), list_batch.packed(rollouts)
        response_position = columns.pop("response_position")
        same_bits(batch, columns)
        assert (batch.tokens.dtype, batch.rollout_logprob.dtype) == (torch.int32, torch.float32)
        values = torch.randn(len(batch.tokens), generator=generator)
        assert torch.equal(batch.response_means(values), list_batch.means(values, columns, batch.lengths))
        batch.old_logprob = values
        dropped = torch.rand(batch.num_loss_tokens, generator=generator) < 0.3
        dropped[torch.arange(len(dropped)) == len(dropped) // 2] = False  # something is left
        batch.drop(dropped)
        list_batch.drop(columns, dropped, batch.lengths)
        same_bits(batch, columns)
        order = torch.randperm(count, generator=generator)
        for chosen in (
            order.tolist(),
            sorted(order[: count // 2 + 1].tolist()),
            [*range(count)],
            order[:1].tolist(),
            [],
        ):
            index = list_batch.positions(chosen, batch.lengths)
            part = batch.subset(chosen)
            assert torch.equal(batch.positions(chosen), index) and len(part.tokens) == len(index)
            same_bits(part, {name: column[index] for name, column in columns.items() if name != "sequence"})
            assert torch.equal(part.old_logprob, values[index])
            for at in (part.loss_mask, part.loss_mask.nonzero()[:, 0].flip(0)):
                tokens = part.loss_tokens(at, part.old_logprob[at])
                assert torch.equal(tokens.token_id, part.token_id[at]) and tokens.token_id.dtype is torch.int64
                assert torch.equal(tokens.sequence_length, part.sequence_length[at])
                assert torch.equal(tokens.position, response_position[index][at])


def test_a_batch_takes_few_bytes_of_a_token():
    """The batch itself is 13 bytes a token; packing and dividing it make no wider column on the way."""
    from benchmarks.measure import peak_allocated_bytes

    length = 50_000
    prompt = Prompt(0, EXAMPLE, (1,))
    batch = pack([Rollout(prompt, s, [2] * length, [-1.0] * length, True, 0) for s in range(4)])
    columns = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert sum(column.nbytes for column in columns) == 13 * len(batch.tokens)
    assert peak_allocated_bytes(lambda: batch.subset([2, 0])) < 13.5 * 2 * (length + 1)
