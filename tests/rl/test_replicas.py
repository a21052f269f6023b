"""Replicas as threads: each scores its own sequences, and all of them know and choose what one process would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from entcov.controls import Control, make_control
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl import trained_model
from entcov.rl.actor import PolicyActor
from entcov.rl.batch import Batch, pack
from entcov.rl.config import ActorConfig
from entcov.rl.types import Example, Prompt, Rollout
from entcov.stats import ranks
from tests.support.thread_ranks import ThreadRanks

CONTROLS = [
    ("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.01, "clip_cov_ub": 50.0}),
    ("high_entropy_tokens", {"top_entropy_quantile": 0.3}),
]


class Replica(PolicyActor):
    """Scores a token by its id alone. Sequence s belongs to replica s modulo their number; a micro-batch has two."""

    device = torch.device("cpu")

    def __init__(self, replica: int, replicas: int, group: ThreadRanks | None):
        controls: list[Control] = [make_control(name, **knobs) for name, knobs in CONTROLS]
        super().__init__(nn.Linear(1, 1), ActorConfig(), PolicyLossConfig(), controls, temperature=1.0)
        self.replica, self.replicas, self.batch_group, self.held = replica, replicas, group, 0

    def _division(self, batch: Batch) -> list[list[list[int]]]:
        own = [[*range(batch.num_sequences)][r :: self.replicas] for r in range(self.replicas)]
        return [[share[i : i + 2] for i in range(0, len(share), 2)] for share in own]

    def _score(self, model, micro_batches: Sequence[Batch], names: Sequence[str], **options) -> list[Tensor]:
        self.held = sum(len(micro.tokens) for micro in micro_batches)
        ids = [micro.token_id[micro.loss_mask].double() for micro in micro_batches]
        return [torch.stack([(own + n).sin().float() for n in range(len(names))]) for own in ids]

    def _backward(self, batch, selections, totals):
        raise NotImplementedError

    def _take_step(self):
        raise NotImplementedError


def packed(groups: int) -> Batch:
    generator = torch.Generator().manual_seed(5)
    rollouts = []
    for uid in range(groups):
        prompt = Prompt(uid, Example("test", (), ""), (1,) * (1 + uid % 3))
        for sample in range(4):
            n = int(torch.randint(3, 30, (1,), generator=generator))
            rollouts.append(Rollout(prompt, sample, [7] * n, [-1.0] * n, True, 0))
    batch = pack(rollouts)
    batch.assign_advantages(torch.randn(len(rollouts), generator=generator))
    return batch


def everything(actor: Replica, batch: Batch) -> tuple[dict, list[dict[str, set[int]]], dict, list[int]]:
    """The scores; of the first update (by these) and of a later one the tokens chosen, by control, and all metrics."""
    scored = actor.compute_logprobs(batch)
    batch.assign_scores(scored, 0)
    chosen, metrics, totals = [], {}, []
    for version in (0, 1):
        actor.weight_version = version
        picked: dict[str, set[int]] = {}

        def keep(name, token_id, selection, picked=picked):
            for part in (selection.mask, selection.drop):
                if part is not None:
                    picked.setdefault(name, set()).update(token_id[part].tolist())

        actor.on_selection = keep
        _, found, total = actor._select(batch)
        chosen.append(picked)
        metrics |= {f"{name} {version}": float(value) for name, value in found.items()}
        totals += [int(total.num_tokens), int(total.num_sequences)]
    return scored, chosen, metrics, totals


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_know_and_choose_what_one_process_does(monkeypatch, replicas):
    scored, chosen, metrics, totals = everything(Replica(0, 1, None), packed(6))
    assert all(min(map(len, picked.values())) > 3 for picked in chosen) and chosen[0] != chosen[1]
    group = ThreadRanks(replicas, monkeypatch, (ranks, trained_model))
    actors = [Replica(rank, replicas, group) for rank in range(replicas)]
    found = group.run(lambda rank: everything(actors[rank], packed(6)))
    for own_scored, _, own_metrics, own_totals in found:
        assert own_metrics == metrics and own_totals == totals
        assert all(torch.equal(own_scored[name], scored[name]) for name in scored)
    for version, picked in enumerate(chosen):
        parts = [own_chosen[version] for _, own_chosen, _, _ in found]
        for name, ids in picked.items():
            assert set().union(*(part[name] for part in parts)) == ids, name
            assert sum(len(part[name]) for part in parts) == len(ids)  # each token by the replica that has it


def test_what_a_device_holds_does_not_grow_with_the_replicas(monkeypatch):
    held = {}
    for replicas in (1, 2, 4):
        group = ThreadRanks(replicas, monkeypatch, (ranks, trained_model))
        actors = [Replica(rank, replicas, group) for rank in range(replicas)]
        batch = packed(3 * replicas)
        group.run(lambda rank, actors=actors, batch=batch: actors[rank].compute_logprobs(batch))
        held[replicas] = max(actor.held for actor in actors)
        assert sum(actor.held for actor in actors) == len(batch.tokens)
        assert group.largest <= 1.3 * held[replicas] * 4 * 4  # bytes of one message: four numbers of one share
    assert max(held.values()) < 1.4 * min(held.values())


def test_a_process_that_does_not_lead_its_node_holds_no_table(monkeypatch):
    group, batch, made = ThreadRanks(4, monkeypatch, (ranks, trained_model)), packed(6), {}
    actors = [Replica(rank, 4, group) for rank in range(4)]
    for rank, actor in enumerate(actors):
        actor.leads_node = rank in (0, 2)
        actor.once_a_node = lambda make, rank=rank: made.setdefault(rank, make())
    group.run(lambda rank: actors[rank].compute_logprobs(batch))
    assert [made[rank]["logprob"].shape for rank in range(4)] == [(len(batch.tokens),), (0,)] * 2
    assert torch.equal(made[0]["entropy"], made[2]["entropy"]) and made[0]["entropy"].any()
