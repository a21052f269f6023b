"""ControlledLoss: with every control, two steps divided over micro-batches and ranks equal the undivided ones."""

import re
from dataclasses import replace

import pytest
import torch

import entcov.controls as controls_module
from entcov.controls import CONTROLS, Progress, begin, make_control, mini_batch_totals, select, selects
from entcov.controls.base import Control
from entcov.integrations import controlled_loss as module
from entcov.integrations import gather
from entcov.integrations.controlled_loss import ControlledLoss, entcov_names
from entcov.integrations.gather import gather_tokens
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.stats import ranks, shards
from tests.support.objective_oracle import part
from tests.support.thread_ranks import ThreadRanks

STEPS, UPDATES, RESPONSES = 2, 2, 24
KNOBS = {  # so that every control acts on some of 24 short responses
    "clip_cov": dict(clip_cov_ratio=0.1, clip_cov_lb=0.0, clip_cov_ub=5.0),
    "kl_cov": dict(kl_cov_ratio=0.1),
    "sent": dict(kl_cov_ratio=0.1),
    "clip_b": dict(mu=0.5),
    "clip_v": dict(mu=0.5, max_frac=0.2),
    "entropic": dict(target=0.4, prob_threshold=0.5),
    "difficulty_bonus": dict(entropy_coef=0.005, rho=0.9),
    "positive_advantage_reweighting": dict(weight=0.4),
    "adaptive_bonus": dict(rule="trl", entropy_coef=0.1, target=1.0),
    "entropy_bonus": dict(entropy_coef=0.01),
    "aent": dict(entropy_coef=0.002, warmup=0),
    "entropy_ratio_clip": dict(entropy_ratio_low=0.01, entropy_ratio_high=0.02),
    "adaptive_clip": dict(epsilon=0.1, step_size=0.1, target=0.5),
}
CASES = [[name] for name in CONTROLS] + [["clip_b", "kl_cov"], ["clip_cov", "aent", "perplexity_shaping"]]
ROLLOUT_SCOPE = ["clip_cov of the rollout"]


def made(names) -> list[Control]:
    if names == ROLLOUT_SCOPE:
        return [make_control("clip_cov", **KNOBS["clip_cov"], scope="rollout")]
    return [make_control(name, **KNOBS.get(name, {})) for name in names]


def config_of(names) -> PolicyLossConfig:
    return PolicyLossConfig(aggregation="seq-mean-token-mean" if len(names) > 1 else "token-mean")


def rollout(step: int) -> Tokens:
    """The tokens of 24 responses to 6 prompts, as the policy that scored them sees them; some are masked."""
    g = torch.Generator().manual_seed(step)
    lengths = torch.randint(2, 12, (RESPONSES,), generator=g)
    sequence = torch.arange(RESPONSES).repeat_interleave(lengths)
    count = len(sequence)
    mask = torch.rand(count, generator=g) < 0.9
    mask[lengths.cumsum(0) - 1] = True
    old = -torch.empty(count).exponential_(generator=g) - 1e-3
    noise = lambda scale: scale * torch.randn(count, generator=g)  # noqa: E731
    return Tokens(
        old,
        old.clone(),
        torch.randn(RESPONSES, generator=g)[sequence],
        mask,
        entropy=torch.rand(count, generator=g),
        clamped_entropy=torch.rand(count, generator=g),
        entropy_drift=noise(1.0),
        collision=torch.rand(count, generator=g),
        ref_logprob=old + noise(0.3),
        rollout_logprob=old + noise(0.1),
        sequence_length=torch.zeros(RESPONSES).index_add_(0, sequence, mask.float()).long()[sequence],
        token_id=torch.randperm(10 * count, generator=g)[:count],
        sequence=sequence,
        position=torch.arange(count) - (lengths.cumsum(0) - lengths)[sequence],
        reward=(torch.rand(RESPONSES, generator=g) < 0.4).float()[sequence],
        group=sequence // 4,
        lag=0 * sequence,
    )


def current(tokens: Tokens, update: int) -> Tokens:
    """The tokens under a policy that has moved, by an amount that depends on the token's id alone."""
    moved = 0.3 * torch.sin(tokens.token_id + 7.0 * update)
    return replace(tokens, logprob=tokens.logprob + moved, entropy=tokens.entropy * (1 + 0.1 * moved))


def undivided(names) -> tuple[dict, list]:
    """(token id and update -> d loss / d logprob, [metrics of each step and update, states]), by entcov's functions."""
    controls, config = made(names), config_of(names)
    gradients, told, done = {}, [], 0
    for step in range(1, STEPS + 1):
        tokens = rollout(step)
        inside = part(tokens, tokens.loss_mask)
        shaped = begin(controls, inside, Progress(step, STEPS, done))
        told.append(shaped.metrics)
        inside.advantage = shaped.advantage
        kept = torch.ones_like(inside.loss_mask) if shaped.drop is None else ~shaped.drop
        everything = part(inside, kept)
        lengths = everything.sequence.bincount(minlength=RESPONSES)
        everything.sequence_length = lengths[everything.sequence]
        scored = {
            "entropy": inside.entropy,
            "clamped_entropy": inside.clamped_entropy,
            "sampled_entropy": -inside.logprob,
        }
        means = {f"scored/{name}": float(value.double().mean()) for name, value in scored.items()}
        sums, weight = {}, 0
        for update in range(UPDATES):
            at = everything.sequence % UPDATES == update
            tokens = current(part(everything, at), update)
            tokens.old_entropy = everything.entropy[at]
            row = [None] * len(controls)
            if any(map(selects, controls)):
                (row,), metrics = select(controls, [tokens], step=done, config=config)
                told.append({name: float(value) for name, value in metrics.items()})
            for i, control in enumerate(controls):
                if control.scope == "rollout":
                    row[i] = controls_module.Selection(shaped.selected[control.name][kept][at])
            totals = mini_batch_totals([tokens], [row])
            tokens.logprob.requires_grad_()
            loss, metrics = policy_loss(tokens, config, totals=totals, controls=controls, selections=row)
            loss.backward()
            for number, gradient in zip(tokens.token_id.tolist(), tokens.logprob.grad.tolist(), strict=True):
                gradients[step, update, number] = gradient
            metrics, done = {name: float(value) for name, value in metrics.items()}, done + 1
            told.append(metrics)
            own = {n: metrics[f"actor/{n}"] for n in ("entropy", "sampled_entropy", "clamped_entropy")}
            weight += int(totals.num_tokens)
            for name, value in own.items():
                sums[name] = sums.get(name, 0.0) + value * int(totals.num_tokens)
            for control in controls:
                control.after_update(own, Progress(step, STEPS, done))
        means |= {f"updated/{name}": value / weight for name, value in sums.items()}
        for control in controls:
            told.append(control.after_step(means, Progress(step, STEPS, done)))
    return gradients, [*told, *(control.state_dict() for control in controls)]


def divided(names, rank: int, world: int, size: int, group=None) -> tuple[dict, list]:
    """The same by ControlledLoss: this rank has every `world`-th response, `size` of them a micro-batch, shuffled."""
    controlled = ControlledLoss(made(names), config_of(names), group=group)
    gradients, told = {}, []
    for step in range(1, STEPS + 1):
        tokens = rollout(step)
        own = part(tokens, tokens.sequence % (2 * world) // 2 == rank)
        told.append(controlled.begin(step=step, steps=STEPS, rollout=own))
        for update in range(UPDATES):
            of_update = (own.sequence % UPDATES == update).nonzero().flatten()
            order = of_update[torch.randperm(len(of_update), generator=torch.Generator().manual_seed(size))]
            numbers = own.sequence[order].unique()
            parts = [
                current(part(own, order[torch.isin(own.sequence[order], numbers[i : i + size])]), update)
                for i in range(0, len(numbers), size)
            ]
            opened = controlled.update(parts)
            if opened.metrics:
                told.append(opened.metrics)
            for i, micro in enumerate(parts):
                micro.logprob.requires_grad_()
                opened.loss(i, micro)[0].backward()
                for number, gradient, inside in zip(
                    micro.token_id.tolist(), micro.logprob.grad.tolist(), micro.loss_mask.tolist(), strict=True
                ):
                    assert inside or gradient == 0
                    if inside:
                        gradients[step, update, number] = gradient
            metrics = opened.finish()
            told.append({name: value for name, value in metrics.items() if name not in opened.metrics})
        told.append(controlled.after_step())
    state = controlled.state_dict()
    assert state["updates"] == STEPS * UPDATES
    return gradients, [*told, *(one["state"] for one in state["controls"])]


def assert_same(got, expected):
    gradients, told = got
    wanted = {key: value for key, value in expected[0].items() if key in gradients}
    assert gradients == pytest.approx({key: wanted.get(key, 0.0) for key in gradients}, rel=1e-5, abs=1e-9)
    assert numbered(told) == pytest.approx(numbered(expected[1]), rel=1e-5, abs=1e-7)


def numbered(rows: list[dict]) -> dict:
    """One dict of those that are not empty: (number, name) -> value."""
    return {(i, name): value for i, row in enumerate(filter(None, rows)) for name, value in row.items()}


@pytest.mark.parametrize("names", [*CASES, ROLLOUT_SCOPE], ids="+".join)
def test_any_division_trains_as_the_undivided_loop(names, monkeypatch):
    expected = undivided(names)
    assert any(expected[0].values())
    for size in (12, 5, 1):
        got = divided(names, 0, 1, size)
        assert set(expected[0]) <= set(got[0])
        assert_same(got, expected)
    modules = (shards, ranks, module, gather, controls_module)
    group = ThreadRanks(2, monkeypatch, modules)
    both = group.run(lambda rank: divided(names, rank, 2, 3, group))
    assert both[0][1] == both[1][1]  # metrics and states, bit for bit
    for got in both:
        assert_same(got, expected)
    assert set(expected[0]) <= set(both[0][0]) | set(both[1][0])


def test_the_divisor_of_a_trainer_that_counts_empty_responses():
    config = PolicyLossConfig(aggregation="seq-mean-token-sum")
    controlled, tokens = ControlledLoss([], config), rollout(1)
    controlled.begin(step=1, steps=1)
    totals = controlled.update([tokens], num_sequences=30).totals
    assert (int(totals.num_tokens), totals.num_sequences) == (int(tokens.loss_mask.sum()), 30)
    loss, _ = controlled._open.loss(0, tokens)
    assert loss == policy_loss(tokens, config, totals=Totals(1, 30))[0]


def test_metrics_under_the_names_of_a_plug_in():
    assert entcov_names({"actor/cov_mean": 1.0, "other": 2.0}) == {"entcov/cov_mean": 1.0, "entcov/other": 2.0}


def fresh(*names, step=None, rollout=None) -> ControlledLoss:
    controlled = ControlledLoss(made(list(names)))
    if step is not None:
        controlled.begin(step=step, steps=2, rollout=rollout)
    return controlled


def other_ids(tokens: Tokens) -> Tokens:
    return replace(tokens, token_id=tokens.token_id + 1_000_000)


def finished(controlled: ControlledLoss, tokens: Tokens) -> None:
    update = controlled.update([tokens])
    update.loss(0, tokens)
    update.finish()


TOKENS = rollout(1)
WRONG = {
    "a name in place of a control": (
        lambda: ControlledLoss(["clip_cov"]), TypeError,
        "controls must hold controls (entcov.controls.make_control), got 'clip_cov'",
    ),
    "controls that do not go together": (
        lambda: fresh("aent", "entropy_bonus"), ValueError, "aent and entropy_bonus both set the entropy bonus"
    ),
    "an objective that the control refuses": (
        lambda: ControlledLoss(made(["kl_cov"]), PolicyLossConfig(objective="sapo")), ValueError,
        "objective must be one of ppo, cispo, gpg, dro for control kl_cov as it is set, got sapo",
    ),
    "no rollout for a control that reads it": (
        lambda: fresh("kl_cov", "clip_b", step=1), ValueError,
        "rollout must be given for control clip_b, which reads all of it; got None",
    ),
    "a step beyond the last": (lambda: fresh(step=3), ValueError, "steps must be at least 3, got 2"),
    "an update outside of a step": (
        lambda: fresh().update([TOKENS]), RuntimeError,
        "update: begin(step=..., steps=...) of this training step must be called first",
    ),
    "after_step outside of a step": (
        lambda: fresh().after_step(), RuntimeError, "after_step: begin(step=..., steps=...) must be called first"
    ),
    "a second update before finish": (
        lambda: [c := fresh(step=1), c.update([TOKENS]), c.update([TOKENS])], RuntimeError,
        "update: finish() of the last update must be called first",
    ),
    "begin before finish": (
        lambda: [c := fresh(step=1), c.update([TOKENS]), c.begin(step=1, steps=2)], RuntimeError,
        "begin: finish() of the last update must be called first",
    ),
    "after_step before finish": (
        lambda: [c := fresh(step=1), c.update([TOKENS]), c.after_step()], RuntimeError,
        "after_step: finish() of the last update must be called first",
    ),
    "finish before every loss": (
        lambda: fresh(step=1).update([TOKENS, TOKENS]).finish(), RuntimeError,
        "finish: loss() must be called for every micro-batch first, missing are [0, 1]",
    ),
    "a micro-batch twice": (
        lambda: [u := fresh(step=1).update([TOKENS]), u.loss(0, TOKENS), u.loss(0, TOKENS)], RuntimeError,
        "loss: micro-batch 0 of this update has been used already",
    ),
    "a micro-batch that does not exist": (
        lambda: fresh(step=1).update([TOKENS]).loss(1, TOKENS), ValueError,
        "number must be below 1, the number of micro-batches; got 1",
    ),
    "other tokens than those of the update": (
        lambda: fresh(step=1).update([TOKENS]).loss(0, other_ids(TOKENS)), ValueError,
        "tokens must be those of micro-batch 0, in its order: their token_id differ",
    ),
    "tokens that begin was not given": (
        lambda: fresh("clip_b", step=1, rollout=TOKENS).update([other_ids(TOKENS)]), ValueError,
        "tokens must be of the rollout that this rank gave to begin:",
    ),
    "no ids for what begin decided": (
        lambda: fresh("clip_b", step=1, rollout=TOKENS).update([replace(TOKENS, token_id=None)]), ValueError,
        "tokens.token_id must be given, what begin remembers is kept by it; got None",
    ),
    "no ids to remember by": (
        lambda: fresh("clip_b", step=1, rollout=replace(TOKENS, token_id=None)), ValueError,
        "tokens.token_id must be given, what begin remembers is kept by it; got None",
    ),
    "no entropy to compare with": (
        lambda: fresh("entropy_ratio_clip", step=1, rollout=replace(TOKENS, entropy=None)), ValueError,
        "tokens.entropy must be given, control entropy_ratio_clip reads it; got None",
    ),
    "no rollout to compare with": (
        lambda: fresh("entropy_ratio_clip", step=1), ValueError,
        "rollout must be given for control entropy_ratio_clip, which reads all of it; got None",
    ),
    "no ids to gather by": (
        lambda: gather_tokens(replace(TOKENS, token_id=None), None), ValueError,
        "tokens.token_id must be given to gather them from all ranks, got None",
    ),
    "ids twice": (
        lambda: gather_tokens(Tokens.cat([TOKENS, TOKENS]), None), ValueError,
        f"token_id must be unique over all ranks: {int(TOKENS.loss_mask.sum())} of {2 * int(TOKENS.loss_mask.sum())}",
    ),
    "a controller without the rollout's entropy": (
        lambda: [c := fresh("aent", step=1), finished(c, replace(TOKENS, clamped_entropy=None)), c.after_step()],
        ValueError, "tokens.clamped_entropy must be given, control aent",
    ),
    "a finished update": (
        lambda: [c := fresh(step=1), u := c.update([TOKENS]), u.loss(0, TOKENS), u.finish(), u.finish()], RuntimeError,
        "finish: this update is closed already",
    ),
    "the state of other controls": (
        lambda: fresh("aent").load_state_dict(fresh("kl_cov").state_dict()), ValueError,
        "state must be that of the controls ['aent'], got that of ['kl_cov']",
    ),
    "a state without the updates": (
        lambda: fresh().load_state_dict({"controls": []}), ValueError,
        "state must have keys controls and updates, got ['controls']",
    ),
    "no sequence": (
        lambda: fresh(step=1).update([replace(TOKENS, sequence=None)]), ValueError, "tokens.sequence must be given"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_a_state_that_is_refused_changes_nothing():
    controlled = fresh("adaptive_bonus", "kl_cov")
    state = fresh("adaptive_bonus", "kl_cov").state_dict()
    state["controls"][0]["state"]["coef"] = 0.3
    state["controls"][1]["state"]["coef"] = 1.0  # kl_cov has no state
    with pytest.raises(ValueError, match="state of control kl_cov must have keys"):
        controlled.load_state_dict(state)
    assert controlled.controls[0].coef == 0.1
    del state["controls"][1]["state"]["coef"]
    controlled.load_state_dict(state)
    assert controlled.controls[0].coef == 0.3


def test_an_abandoned_update_adapts_nothing():
    controlled = fresh("adaptive_bonus", step=1)
    update = controlled.update([TOKENS])
    update.loss(0, TOKENS)
    update.abandon()
    assert controlled.updates == 0 and controlled.after_step() == {}


def test_a_rank_that_fails_is_an_error_on_all(monkeypatch):
    """Ranks that have other fields, and one without ids: neither waits for the other."""
    group = ThreadRanks(2, monkeypatch, (shards, ranks, module, gather, controls_module))
    messages = {}

    def call(rank, odd):
        try:
            gather_tokens(replace(other_ids(TOKENS), **odd) if rank else TOKENS, group)
        except (ValueError, RuntimeError) as error:
            messages[rank] = str(error)

    group.run(lambda rank: call(rank, dict(reward=None)))
    assert all("must be called with the same floating fields" in messages[rank] for rank in (0, 1))
    group.run(lambda rank: call(rank, dict(token_id=None)))
    assert "rank 1 of the group cannot do its part: ValueError: tokens.token_id must be given" in messages[0]
    assert messages[1].startswith("tokens.token_id must be given to gather them")

    for name in ("entropy_ratio_clip", "clip_b"):  # remembers entropies; decides over the rollout
        messages.clear()

        def begin(rank, name=name):
            try:
                own = replace(TOKENS, token_id=None) if rank else TOKENS
                ControlledLoss(made([name]), group=group).begin(step=1, steps=1, rollout=own)
            except (ValueError, RuntimeError) as error:
                messages[rank] = str(error)

        group.run(begin)
        assert messages[1] == "tokens.token_id must be given, what begin remembers is kept by it; got None"
        assert "rank 1 of the group cannot do its part" in messages[0]

    for names in ([], ["kl_cov"]):
        messages.clear()

        def update(rank, names=names):
            controlled = ControlledLoss(made(names), group=group)
            controlled.begin(step=1, steps=1)
            try:
                controlled.update(["no tokens"] if rank else [TOKENS])
            except (TypeError, RuntimeError) as error:
                messages[rank] = str(error)

        group.run(update)
        assert messages[1] == "tokens must be entcov.Tokens, got str"
        assert "rank 1 of the group cannot do its part" in messages[0]


def test_parts_of_a_micro_batch_and_a_loss_that_others_computed_are_the_same_update():
    metrics, gradients = [], []
    for way in ("whole", "parts", "elsewhere"):
        controlled, own = fresh("kl_cov", step=1), replace(TOKENS, logprob=TOKENS.logprob.clone().requires_grad_())
        update = controlled.update([TOKENS])
        if way == "whole":
            update.loss(0, own)[0].backward()
        elif way == "parts":
            for part in (own.sequence < 7, own.sequence > 30, own.sequence >= 7):  # the second one is empty
                index = part.nonzero().flatten()
                moved = {name: value[index] for name, value in vars(own).items() if value is not None}
                update.loss(0, Tokens(**moved), part=index)[0].backward()
        else:
            loss, found = policy_loss(
                own,
                controlled.loss,
                totals=update.totals,
                controls=controlled.controls,
                selections=update.selections[0],
            )
            loss.backward()
            update.computed(0, found)
        with pytest.raises(RuntimeError, match="has been used already"):
            update.loss(0, own)
        with pytest.raises(RuntimeError, match="has been used already"):
            update.computed(0, {})
        metrics.append(update.finish())
        gradients.append(own.logprob.grad)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-12) and metrics[2] == metrics[0]
    assert all(torch.equal(gradients[0], other) for other in gradients)


def test_a_part_that_is_left_out_is_missed():
    update = fresh(step=1).update([TOKENS])
    index = torch.arange(5)
    update.loss(0, part(TOKENS, index), part=index)
    with pytest.raises(RuntimeError, match=re.escape("missing are [0]")):
        update.finish()
    with pytest.raises(ValueError, match="tokens must be those of micro-batch 0"):
        update.loss(0, part(TOKENS, index), part=index + 5)


def test_means_of_the_rollout_without_a_control_that_decides_over_it(monkeypatch):
    """They take one all-reduce, and nothing is gathered."""
    monkeypatch.setattr(module, "gather_tokens", None)
    controlled = ControlledLoss([make_control("adaptive_bonus", target=9.0)])
    assert controlled.begins
    controlled.begin(step=1, steps=2, rollout=TOKENS)
    finished(controlled, TOKENS)
    assert controlled.after_step()["actor/entropy_target"] == 9.0 and controlled.controls[0].coef > 0
    with pytest.raises(ValueError, match="rollout must be given for control adaptive_bonus, which reads all of it"):
        controlled.begin(step=2, steps=2)
