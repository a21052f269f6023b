"""Controls that select over the mini-batch: the same choice and the same gradient, bit for bit, for every split."""

from dataclasses import replace

import pytest
import torch

from entcov import arguments
from entcov.controls import SENT, EntroPIC, HighEntropyTokens, mini_batch_totals, select
from entcov.objective.policy_loss import policy_loss
from entcov.objective.token_means import token_means, token_scores
from entcov.objective.tokens import PolicyLossConfig
from entcov.stats import ranks as agreement
from tests.support.objective_oracle import NoHostRead, hash64, make_batch, part
from tests.support.thread_ranks import ThreadRanks

CONFIG = PolicyLossConfig()
CONTROLS = {
    "80/20, kept": HighEntropyTokens(seed=3),
    "80/20, all": HighEntropyTokens(0.1, denominator="all"),
    "sent, reference": SENT(kl_cov_ratio=0.02),
    "sent, paper": SENT(kl_cov_ratio=0.02, semantics="paper", seed=1),
    "entropic, reference": EntroPIC(0.4, prob_threshold=0.5),
    "entropic, paper": EntroPIC(0.4, prob_threshold=0.5, semantics="paper"),
}


def batch():
    """A rollout batch with entropies that often tie."""
    tokens, sequence = make_batch(0)
    g = torch.Generator().manual_seed(1)
    tokens.entropy = (10 * torch.rand(len(sequence), generator=g)).round() / 10
    tokens.ref_logprob = tokens.old_logprob + 0.1
    tokens.sequence = sequence
    return tokens


def micro_batches(tokens, rank, world, size):
    """The responses of this rank, `size` a micro-batch, their tokens in another order."""
    mine = [s for s in range(24) if s % world == rank]
    out = []
    for i in range(0, len(mine), size):
        index = torch.isin(tokens.sequence, torch.tensor(mine[i : i + size])).nonzero().flatten()
        out.append(part(tokens, index[torch.randperm(len(index), generator=torch.Generator().manual_seed(i))]))
    return out


def chosen(parts, selections):
    """token id -> what the selection says of it."""
    found = {}
    for tokens, (selection,) in zip(parts, selections, strict=True):
        said = [x for x in (selection.mask, selection.drop, selection.weight) if x is not None]
        said = torch.stack([x.double() for x in said]).T[tokens.loss_mask].tolist()
        numbers = tuple(float(x) for x in selection.scalars.values())
        found |= {i: (*row, *numbers) for i, row in zip(tokens.token_id[tokens.loss_mask].tolist(), said, strict=True)}
    return found


def gradients(parts, control, selections, totals):
    """token id -> d loss / d logprob."""
    found = {}
    for tokens, row in zip(parts, selections, strict=True):
        tokens = replace(tokens, logprob=tokens.logprob.clone().requires_grad_())
        policy_loss(tokens, CONFIG, totals=totals, controls=[control], selections=row)[0].backward()
        found |= dict(zip(tokens.token_id.tolist(), tokens.logprob.grad.tolist(), strict=True))
    return found


@pytest.mark.parametrize("name", CONTROLS)
def test_any_split_chooses_the_same_and_has_the_same_gradient(name, monkeypatch):
    control, tokens = CONTROLS[name], batch()
    (row,), metrics = select([control], [tokens], step=5, config=CONFIG)
    totals = mini_batch_totals([tokens], [row])
    expected = chosen([tokens], [row]), {k: float(v) for k, v in metrics.items()}
    gradient = gradients([tokens], control, [row], totals)
    assert len({repr(x) for x in expected[0].values()}) > 1  # some are chosen and some are not
    for size in (1, 5, 24):
        parts = micro_batches(tokens, 0, 1, size)
        selections, metrics = select([control], parts, step=5, config=CONFIG)
        assert (chosen(parts, selections), {k: float(v) for k, v in metrics.items()}) == expected
        assert mini_batch_totals(parts, selections) == totals
        assert gradients(parts, control, selections, totals) == gradient
    ranks = ThreadRanks(2, monkeypatch)

    def on_rank(rank):
        parts = micro_batches(tokens, rank, 2, 5)
        selections, metrics = select([control], parts, step=5, config=CONFIG, group=ranks)
        return chosen(parts, selections), {k: float(v) for k, v in metrics.items()}

    (first, own), (second, others) = ranks.run(on_rank)
    assert ({**first, **second}, own, others) == (*expected, expected[1])


def test_the_order_of_entropies_with_ties_is_exact():
    """Against a sort in Python: the entropy, then the hash of (seed, step, token id)."""
    tokens = batch()
    rows = [
        (float(h), hash64(3, 5, i), i)
        for h, m, i in zip(tokens.entropy, tokens.loss_mask.tolist(), tokens.token_id.tolist(), strict=True)
        if m
    ]
    n = -(-len(rows) // 5)
    (row,), _ = select([CONTROLS["80/20, kept"]], [tokens], step=5, config=CONFIG)
    kept = set(tokens.token_id[tokens.loss_mask & ~row[0].drop].tolist())
    assert kept == {i for _, _, i in sorted(rows, reverse=True)[:n]}
    low = SENT(kl_cov_ratio=0.0, semantics="paper", seed=3)  # all of T_low have the smaller weight
    (row,), _ = select([low], [tokens], step=5, config=CONFIG)
    lowest = sorted((h, -key, i) for h, key, i in rows)[: int(0.8 * len(rows))]
    assert set(tokens.token_id[row[0].weight > 0].tolist()) == {i for _, _, i in lowest}


def test_micro_batch_scope_keeps_a_share_of_every_micro_batch():
    """As the authors' code: ceil(0.2 n) of each, so more in all."""
    tokens = batch()
    parts = micro_batches(tokens, 0, 1, 1)
    counts = [int(p.loss_mask.sum()) for p in parts]
    for control, expected in (
        (HighEntropyTokens(scope="micro_batch"), sum(-(-n // 5) for n in counts)),
        (HighEntropyTokens(), -(-sum(counts) // 5)),
    ):
        selections, _ = select([control], parts, step=0, config=CONFIG)
        assert int(mini_batch_totals(parts, selections).num_tokens) == expected
    alone = SENT(scope="micro_batch")
    selections, _ = select([alone], parts, step=0, config=CONFIG)
    for (selection,) in selections:
        high = int((selection.weight == 0.2).sum())
        assert high <= 1 and int((selection.weight > 0).sum()) <= 2


# --- means over the mini-batch ----------------------------------------------------------------------------------------


def test_token_means_are_those_of_all_ranks_bit_for_bit(monkeypatch):
    tokens = batch()
    mask, n = tokens.loss_mask, int(tokens.loss_mask.sum())
    values = {"entropy": tokens.entropy, "logprob": tokens.logprob}
    whole = token_means(values, mask)
    assert int(whole.num_tokens) == n
    for name, value in values.items():
        assert float(whole.mean[name]) == pytest.approx(float(value[mask].double().mean()), rel=1e-12)
    ranks = ThreadRanks(2, monkeypatch)
    share = [torch.arange(len(mask)) < 7, torch.arange(len(mask)) >= 7]
    found = ranks.run(
        lambda rank: token_means({k: v[share[rank]] for k, v in values.items()}, mask[share[rank]], group=ranks)
    )
    assert [{k: float(v) for k, v in part.mean.items()} for part in found] == [
        {k: float(v) for k, v in whole.mean.items()}
    ] * 2
    scores = token_scores("entropy", tokens.entropy.double(), mask)
    assert torch.equal((-scores).value, -scores.value) and not scores.value[~mask].any()


def test_token_means_name_what_is_wrong():
    mask = torch.tensor([True, True, False])
    with pytest.raises(ValueError, match="entropy must be finite and at most 2.20 .*: 1 of 2 values .* 1 in entropy"):
        token_means({"entropy": torch.tensor([1.0, torch.nan, torch.nan])}, mask)
    with pytest.raises(ValueError, match="mask must have a True token on at least one rank"):
        token_means({"entropy": torch.ones(3)}, ~mask & mask)
    assert token_means({"entropy": torch.ones(3)}, ~mask & mask, empty_ok=True).mean["entropy"].isnan()
    with pytest.raises(TypeError, match="entropy must be torch.float32 or torch.float64"):
        token_means({"entropy": torch.ones(3).half()}, mask)
    for control in CONTROLS.values():
        with pytest.raises(ValueError, match=f"tokens.entropy must be given, control {control.name}"):
            select([control], [replace(batch(), entropy=None)], step=0, config=CONFIG)


def test_a_rank_that_fails_leaves_no_other_rank_waiting_on_an_accelerator(monkeypatch):
    """There the host reads nothing: the failed rank enters every collective of every control, without tokens."""
    monkeypatch.setattr(agreement, "host_may_read", lambda device: False)
    monkeypatch.setattr(arguments, "readable", lambda tensor: False)
    controls = [CONTROLS[name] for name in ("80/20, kept", "sent, reference", "entropic, paper")]
    group = ThreadRanks(2, monkeypatch)

    def on_rank(rank):
        parts = micro_batches(batch(), rank, 2, 24)
        try:
            return select(controls, parts, step=0.5 if rank else 0, config=CONFIG, group=group)[1]
        except TypeError as error:
            return str(error)

    metrics, message = group.run(on_rank)
    assert message == "step must be an integer, got 0.5"
    assert all(metrics[f"actor/cov_{name}"].isnan() for name in ("mean", "max", "p999"))


@pytest.mark.parametrize("name", CONTROLS)
def test_the_host_reads_nothing_on_an_accelerator(name, monkeypatch):
    control, tokens = CONTROLS[name], batch()
    monkeypatch.setattr(arguments, "readable", lambda tensor: False)
    expected = control.select(tokens, step=5, config=CONFIG)
    with NoHostRead():
        selection = control.select(tokens, step=5, config=CONFIG)
        control.apply(tokens.masked(), selection)
    for part_of in ("mask", "drop", "weight"):
        first, second = getattr(expected, part_of), getattr(selection, part_of)
        assert first is second or torch.equal(first, second)
