"""Divisions of a mini-batch: ours do not matter, the reference's do, and the sentences follow the numbers."""

import pytest
import torch

from entcov.cli import main
from entcov.objective.tokens import Tokens
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.studies import base
from entcov.studies.splits import AENT, PAIRS, Data, Splits, clamped_means, divided, step
from tests.support.study_parts import InlinePool


@pytest.fixture(scope="module")
def data():
    """40 responses of 1 to 20 tokens, in another order than their numbers."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 21, (40,), generator=g)
    count = int(lengths.sum())
    hidden, head = torch.randn(count, 12, generator=g), torch.randn(30, 12, generator=g)
    target = torch.randint(30, (count,), generator=g)
    stats = linear_token_stats(hidden, head, target, **AENT.clamp)
    tokens = Tokens(
        stats.logprob, stats.logprob + 0.1 * torch.randn(count, generator=g),
        torch.randn(40, generator=g).repeat_interleave(lengths), torch.ones(count, dtype=torch.bool),
        entropy=stats.entropy, clamped_entropy=stats.clamped_entropy, token_id=torch.arange(count),
        sequence=torch.randperm(40, generator=g).repeat_interleave(lengths),
    )  # fmt: skip
    return Data(tokens, hidden, target, head)


@pytest.mark.parametrize("size, ranks, expected", [(40, 1, 1), (16, 1, 3), (16, 3, 3), (1, 3, 42)])
def test_a_division_takes_every_response_once(data, size, ranks, expected):
    parts = [divided(data, size, rank, ranks) for rank in range(ranks)]
    assert sum(map(len, parts)) == expected
    taken = torch.cat([part.tokens.token_id for own in parts for part in own])
    assert sorted(taken.tolist()) == data.tokens.token_id.tolist()
    for rank, own in enumerate(parts):
        for part in own:
            responses = part.tokens.sequence.unique()
            assert len(responses) <= size and (responses % ranks == rank).all()


def test_a_larger_division_has_empty_micro_batches_only_at_its_end(data):
    assert [len(own.target) > 0 for own in divided(data, 1, 2, 3)] == [True] * 13 + [False]


@pytest.mark.parametrize("method", PAIRS)
def test_ours_is_invariant_and_the_reference_is_not(data, method):
    for who, same in (("ours", True), ("reference", False)):
        control = [getattr(PAIRS[method], who)]
        whole, parts = (step(control, divided(data, size, 0, 1), None) for size in (40, 4))
        assert (whole["ids"] == parts["ids"]) is same
        apart = float((whole["gradient"] - parts["gradient"]).norm() / whole["gradient"].norm())
        assert (apart < 1e-5) is same
        assert abs(whole["loss"] - parts["loss"]) < 1e-6 or not same


def test_mean_of_means_by_hand(data):
    parts = divided(data, 7, 0, 1)
    mean, of_means = clamped_means(parts, None)
    own = [part.tokens.clamped_entropy.double() for part in parts]
    assert mean == pytest.approx(float(torch.cat(own).mean()), rel=1e-9)
    assert of_means == pytest.approx(sum(float(x.mean()) for x in own) / len(own), rel=1e-12)
    assert abs(mean - of_means) > 1e-4


def results(ours=(2, 2), reference=(4, 1)):
    def row(chosen, same):
        moved = 0.0 if chosen == same == 2 else 0.2
        return {"chosen": chosen, "whole": 2, "same": same, "loss": 0.0, "gradient": moved, "of_effect": 10 * moved}

    rows = {
        f"{m} / {who}": [row(2, 2), row(*own)]
        for m in PAIRS
        for who, own in (("entcov", ours), ("reference", reference))
    }
    one = {"tokens": 100, "layouts": [[16, 1], [8, 2]], "rows": rows, "aent": [[1.0, 1.0], [1.0, 1.01]]}
    return {"seed 0": one, "seed 1": one}


def test_statements_follow_the_numbers():
    good = Splits().findings(results()).statements
    assert good[0].startswith("entcov's controls choose the same tokens in each of 12 divisions of 2 mini-batches")
    assert "the choice of 6 of 6 methods depends on the division" in good[1] and "8 responses on 2 ranks" in good[1]
    assert "SENT chooses 2.00 times as many, 50% of the undivided choice" in good[1] and "2.00 ± 0.00" in good[1]
    assert "up to 1.0e-02 nats, which moves the coefficient by 2.0e-05" in good[2]
    assert "other tokens in 12" in Splits().findings(results(ours=(2, 1))).statements[0]
    assert "chooses the same tokens for all 6 methods" in Splits().findings(results(reference=(2, 2))).statements[1]


def test_smoke(tmp_path, monkeypatch):
    """On two real processes."""
    monkeypatch.setattr(base, "ProcessPoolExecutor", InlinePool)
    assert main(["study", "splits", "--smoke", "--out", str(tmp_path)]) == 0
    page = tmp_path / "splits_smoke/page"
    assert sorted(path.name for path in page.iterdir()) == ["splits.png", "study.json", "study.md"]
    assert "entcov's controls choose the same tokens in each of 12 divisions" in (page / "study.md").read_text()
