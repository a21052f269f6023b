"""Entropy controls: hand values, traces of the adaptive ones, reference counts, invariants, validation, state."""

import json
import math

import pytest
import torch

from entcov.controls import (
    CONTROLS,
    AdaptiveBonus,
    AEnt,
    ClipCov,
    DifficultyBonus,
    EntroPIC,
    EntropyBonus,
    KLCov,
    NoControl,
    PositiveAdvantageReweighting,
    clamp_arguments,
    make_control,
    needs,
    select,
)
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.rl.load_config import parse_config
from tests.support.objective_oracle import PROGRESS, top_by_hash
from tests.support.tiny_run import recipe

CONFIG = PolicyLossConfig()


def hand_example():
    """Two rows of four tokens, the last of row 1 masked; log-probabilities are ln of these."""
    log = lambda *p: torch.tensor(p, dtype=torch.float64).log()  # noqa: E731
    return Tokens(
        logprob=log(0.9, 0.5, 0.1, 0.8, 0.2, 0.95, 0.6, 0.05),
        old_logprob=log(0.8, 0.5, 0.2, 0.8, 0.2, 0.9, 0.7, 0.05),
        advantage=torch.tensor([1.5] * 4 + [-0.5] * 4, dtype=torch.float64),
        loss_mask=torch.tensor([True] * 3 + [False] + [True] * 4),
        token_id=torch.arange(8),
    )


def random_tokens(sequences, length, seed=0, on_policy=False):
    g = torch.Generator().manual_seed(seed)
    t = sequences * length
    logprob = -torch.empty(t).exponential_(generator=g)
    old = logprob.clone() if on_policy else logprob + 0.2 * torch.randn(t, generator=g)
    advantage = torch.randn(sequences, generator=g).repeat_interleave(length)
    return Tokens(
        logprob,
        old,
        advantage,
        torch.ones(t, dtype=torch.bool),
        entropy=torch.rand(t, generator=g),
        clamped_entropy=torch.rand(t, generator=g),
        token_id=torch.arange(t),
    )


def split(tokens, parts):
    size = len(tokens.loss_mask) // parts
    return [
        Tokens(**{n: v[i * size : (i + 1) * size] for n, v in vars(tokens).items() if v is not None})
        for i in range(parts)
    ]


def run(tokens, control, config=CONFIG):
    """(loss, gradient of logprob, metrics) of the batch in one piece."""
    selections, extra = select([control], [tokens], step=0, config=config)
    logprob = tokens.logprob.detach().clone().requires_grad_()
    tokens = Tokens(**vars(tokens) | {"logprob": logprob})
    loss, metrics = policy_loss(tokens, config, controls=[control], selections=selections[0])
    loss.backward()
    return loss.item(), logprob.grad, metrics | extra


# --- KL-Cov and Clip-Cov on the hand example ------------------------------------------------------------------------


def test_kl_cov_hand_values():
    loss, gradient, metrics = run(hand_example(), KLCov(kl_cov_ratio=2 / 7))
    assert loss == pytest.approx(-0.2661954, abs=5e-8)
    assert float(metrics["actor/pg_loss"]) == pytest.approx(-0.2830215, abs=5e-8)
    assert float(metrics["actor/cov_klfrac"]) == pytest.approx(2 / 7)
    assert float(metrics["actor/cov_threshold"]) == pytest.approx(1.22953, abs=6e-6)
    plain = run(hand_example(), KLCov(kl_cov_ratio=2 / 7, ppo_kl_coef=0.0))
    assert plain[0] == pytest.approx(-0.2830215, abs=5e-8)
    # The penalty is ln(0.9 / 0.8) / 7 from the first token; the other pick has ratio 1, penalty 0 and sign 0.
    assert loss - plain[0] == pytest.approx(math.log(0.9 / 0.8) / 7, rel=1e-12)
    assert (gradient - plain[1]).tolist() == pytest.approx([1 / 7] + [0.0] * 7)


def test_kl_cov_has_no_ppo_clip_in_reference_semantics():
    """Row 1 token 3 has ratio 1/2 and A > 0; row 1 token 1 ratio 1.125: a clip of 0.1 stops only the latter."""
    tight = PolicyLossConfig(clip_low=0.1, clip_high=0.1)
    assert run(hand_example(), KLCov(kl_cov_ratio=2 / 7), tight)[0] == pytest.approx(-0.2661954, abs=5e-8)
    paper = run(hand_example(), KLCov(kl_cov_ratio=2 / 7, semantics="paper"), tight)
    assert float(paper[2]["actor/pg_clipfrac"]) > 0


def test_kl_cov_paper_penalty_is_the_kl_estimate():
    """r - 1 - ln r at r = 9/8, and its gradient r - 1; 0 at the other pick, whose ratio is 1."""
    with_penalty = run(hand_example(), KLCov(kl_cov_ratio=2 / 7, semantics="paper"))
    without = run(hand_example(), KLCov(kl_cov_ratio=2 / 7, semantics="paper", ppo_kl_coef=0.0))
    assert with_penalty[0] - without[0] == pytest.approx((0.125 - math.log(1.125)) / 7, rel=1e-12)
    assert (with_penalty[1] - without[1]).tolist() == pytest.approx([0.125 / 7] + [0.0] * 7, abs=1e-15)


@pytest.mark.parametrize("semantics", ["paper", "reference"])
def test_clip_cov_hand_values(semantics):
    """Bounds 1 and 5: the two candidates are row 1 token 1 and row 2 token 4. Five of the seven terms remain."""
    control = ClipCov(clip_cov_ratio=0.3, semantics=semantics)
    loss, gradient, metrics = run(hand_example(), control)
    plain = run(hand_example(), NoControl())
    assert loss == pytest.approx(plain[0] - (-1.5 * 0.9 / 0.8 + 0.5) / 7, rel=1e-12)
    assert gradient[0] == 0 and gradient[7] == 0
    assert torch.equal(gradient[1:7], plain[1][1:7])
    assert float(metrics["actor/cov_clipfrac"]) == pytest.approx(2 / 7)
    one = run(hand_example(), ClipCov(clip_cov_ratio=0.2, semantics=semantics))  # int(1.4): one of the two
    assert [float(g) == 0 for g in one[1]].count(True) == 2  # it and the masked token


# --- counts: what micro-batching does to the reference, and not to ours -----------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_reference_counts_depend_on_the_split_and_ours_do_not(parts):
    """8192 tokens: the floor of one token a micro-batch turns 1 into `parts`; a ratio of 2e-3 hides it (16 each)."""
    tokens = random_tokens(64, 128)
    per_micro_batch = dict(semantics="reference", scope="micro_batch")
    cases = [
        (ClipCov(clip_cov_ratio=2e-4, clip_cov_lb=-9.0, clip_cov_ub=9.0, **per_micro_batch), parts),
        (KLCov(kl_cov_ratio=2e-4, **per_micro_batch), parts),
        (KLCov(kl_cov_ratio=2e-3, **per_micro_batch), 16),
        (ClipCov(clip_cov_ratio=2e-4, clip_cov_lb=-9.0, clip_cov_ub=9.0), 1),
        (KLCov(kl_cov_ratio=2e-4), 1),
        (KLCov(kl_cov_ratio=2e-3), 16),
    ]
    selections, _ = select([c for c, _ in cases], split(tokens, parts), step=0, config=CONFIG)
    for k, (control, expected) in enumerate(cases):
        assert sum(int(row[k].mask.sum()) for row in selections) == expected, control


def test_one_sequence_a_micro_batch_selects_nothing_in_the_reference():
    """The centred advantage of one sequence is 0, so is every covariance. Over the mini-batch there are candidates."""
    tokens = random_tokens(32, 64)
    parts = split(tokens, 32)
    controls = [
        ClipCov(clip_cov_ratio=0.01, semantics="reference", scope="micro_batch"),
        ClipCov(clip_cov_ratio=0.01, semantics="reference"),
        ClipCov(clip_cov_ratio=0.01),
    ]
    selections, _ = select(controls, parts, step=0, config=CONFIG)
    assert [sum(int(row[k].mask.sum()) for row in selections) for k in range(3)] == [0, 20, 20]


def test_micro_batch_scope_is_select_on_each_alone():
    tokens = random_tokens(16, 20)
    parts = split(tokens, 4)
    control = KLCov(kl_cov_ratio=0.05, scope="micro_batch")
    selections, metrics = select([control], parts, step=2, config=CONFIG)
    alone = KLCov(kl_cov_ratio=0.05)
    for part, row in zip(parts, selections, strict=True):
        assert torch.equal(row[0].mask, select([alone], [part], step=2, config=CONFIG)[0][0][0].mask)
    assert "actor/cov_threshold" not in metrics


def test_micro_batch_scope_with_an_empty_micro_batch():
    first, second = split(random_tokens(2, 30), 2)
    second.loss_mask = torch.zeros_like(second.loss_mask)
    controls = [KLCov(kl_cov_ratio=0.1, scope="micro_batch"), ClipCov(scope="micro_batch", semantics="reference")]
    selections, _ = select(controls, [first, second], step=0, config=CONFIG)
    assert [[int(chosen.mask.sum()) for chosen in row] for row in selections] == [[3, 0], [0, 0]]


def test_reference_clip_cov_excludes_ppo_clipped_tokens():
    """Covariance of all is 2; the first two tokens are beyond the clip on the side where it acts."""
    logprob = torch.tensor([-1.0, -3.0, -1.0, -3.0])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0])
    old = logprob - torch.tensor([0.5, -0.5, -0.5, 0.5])  # ratios 1.65, 0.61, 0.61, 1.65
    tokens = Tokens(logprob, old, advantage, torch.ones(4, dtype=torch.bool), token_id=torch.arange(4))

    def chosen(config=CONFIG, **knobs):
        return select([ClipCov(clip_cov_ratio=0.5, **knobs)], [tokens], step=0, config=config)[0][0][0].mask.tolist()

    assert chosen(semantics="reference") == [False, False, True, True]
    assert sum(chosen()) == 2
    # With the authors' clip of 1 (ratios in [0, 2]) nothing is excluded: over many draws all four tokens appear.
    wide = PolicyLossConfig(clip_low=1.0, clip_high=1.0)
    draws = {tuple(chosen(wide, semantics="reference", seed=s)) for s in range(40)}
    assert [any(column) for column in zip(*draws, strict=True)] == [True] * 4


def test_kl_cov_settles_ties_by_seed_and_step():
    """All four covariances are 2: which two are taken is the hash's choice."""
    logprob, advantage = torch.tensor([-1.0, -3.0, -1.0, -3.0]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    tokens = Tokens(logprob, logprob, advantage, torch.ones(4, dtype=torch.bool), token_id=torch.tensor([7, 8, 40, 41]))
    for seed, step in ((0, 0), (0, 1), (0, 2), (3, 2), (4, 2)):
        selections, _ = select([KLCov(kl_cov_ratio=0.5, seed=seed)], [tokens], step=step, config=CONFIG)
        assert set(tokens.token_id[selections[0][0].mask].tolist()) == top_by_hash([7, 8, 40, 41], 2, seed, step)


# --- invariants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["paper", "reference"])
def test_kl_cov_is_plain_policy_gradient_on_policy(semantics):
    tokens = random_tokens(8, 50, on_policy=True)
    _, gradient, metrics = run(tokens, KLCov(kl_cov_ratio=0.1, semantics=semantics))
    assert torch.equal(gradient, run(tokens, NoControl())[1])
    assert float(metrics["actor/cov_klfrac"]) == pytest.approx(0.1)


def test_clip_cov_ratio_zero():
    """The paper's form drops nothing; the reference's still drops one token."""
    tokens = random_tokens(8, 50)
    plain = run(tokens, NoControl())
    paper = run(tokens, ClipCov(clip_cov_ratio=0.0))
    assert paper[0] == plain[0] and torch.equal(paper[1], plain[1])
    reference = run(tokens, ClipCov(clip_cov_ratio=0.0, semantics="reference"))
    assert int((reference[1] != plain[1]).sum()) == 1


@pytest.mark.parametrize(
    "control", [EntropyBonus(0.0), AEnt(entropy_coef=0.0, adaptive=False), AdaptiveBonus()], ids=lambda c: c.name
)
def test_zero_coefficient_keeps_no_graph(control):
    tokens = random_tokens(2, 5)
    tokens.entropy.requires_grad_()
    tokens.clamped_entropy.requires_grad_()
    tokens.logprob.requires_grad_()
    loss, _ = policy_loss(tokens, controls=[control])
    assert loss.item() == policy_loss(tokens)[0].item()
    used = torch.autograd.grad(loss, [tokens.entropy, tokens.clamped_entropy], allow_unused=True)
    assert used == (None, None)


def test_bonuses_subtract_the_mean_entropy():
    tokens = random_tokens(4, 10)
    plain, _ = policy_loss(tokens)
    for control, field in ((EntropyBonus(0.3), "entropy"), (AEnt(entropy_coef=5e-3), "clamped_entropy")):
        values = getattr(tokens, field).clone().requires_grad_()
        bonus = policy_loss(Tokens(**vars(tokens) | {field: values}), controls=[control])[0]
        assert bonus.item() == pytest.approx(float(plain - control.entropy_coef * values.detach().mean()), abs=1e-7)
        bonus.backward()
        assert values.grad.tolist() == pytest.approx([-control.entropy_coef / 40] * 40, rel=1e-6)


# --- adaptive controls ------------------------------------------------------------------------------------------------


def test_skywork_trace():
    control = AdaptiveBonus()
    used, coef, gate = [], [], []
    for entropy in (0.15, 0.19, 0.21, 0.15):
        used.append(control.applied)
        metrics = control.after_step({"scored/sampled_entropy": entropy, "updated/entropy": 99.0}, PROGRESS)
        assert metrics == {"actor/entropy_coef": used[-1], "actor/entropy_target": 0.2}
        coef.append(control.coef)
        gate.append(control.enabled)
    used.append(control.applied)
    assert coef == pytest.approx([1e-4, 2e-4, 1e-4, 2e-4])
    assert gate == [True, True, False, True]
    assert used == pytest.approx([0, 1e-4, 2e-4, 0, 2e-4])


def test_trl_trace():
    """The same with <=, its own delta, and the analytic entropy of each update; it starts switched off."""
    control = AdaptiveBonus(rule="trl")
    used = []
    for entropy in (0.15, 0.2, 0.21, 0.15):
        used.append(control.applied)
        control.after_update({"entropy": entropy, "sampled_entropy": 99.0}, PROGRESS)
        metrics = control.after_step({"updated/entropy": 99.0, "scored/sampled_entropy": 99.0}, PROGRESS)
        assert metrics == {"actor/entropy_coef": used[-1], "actor/entropy_target": 0.2}
    assert [*used, control.applied] == pytest.approx([0, 5e-3, 1e-2, 0, 1e-2])
    at_target = AdaptiveBonus()
    at_target.after_step({"scored/sampled_entropy": 0.2}, PROGRESS)
    assert at_target.coef == 0.0 and not at_target.enabled  # Skywork's rule is strict
    first = [AdaptiveBonus(rule=rule, entropy_coef=2e-3).applied for rule in ("skywork", "trl")]
    assert first == [2e-3, 0.0]  # before any measurement


def test_the_rule_of_skywork_moves_once_a_step_and_that_of_trl_once_an_update():
    moves = {"skywork": 1, "trl": 3}
    for rule, times in moves.items():
        control = AdaptiveBonus(rule=rule)
        for _ in range(3):
            control.after_update({"entropy": 0.1, "sampled_entropy": 0.1}, PROGRESS)
        used = control.after_step({"scored/sampled_entropy": 0.1, "updated/entropy": 0.1}, PROGRESS)
        assert control.coef == pytest.approx(times * control.delta)
        assert used["actor/entropy_coef"] == pytest.approx((times - 1) * control.delta)  # in the last update


def adapt(control, entropy):
    """One update and one step at this entropy, of every kind."""
    names = ("entropy", "sampled_entropy", "clamped_entropy")
    control.after_update(dict.fromkeys(names, entropy), PROGRESS)
    both = {f"{when}/{name}": entropy for when in ("scored", "updated") for name in names}
    return control.after_step(both, PROGRESS)


@pytest.mark.parametrize("rule, delta, top", [("skywork", 1e-4, 5e-3), ("trl", 5e-3, 1.0)])
def test_adaptive_bonus_stays_in_its_box(rule, delta, top):
    control = AdaptiveBonus(rule=rule, coef_min=2 * delta, entropy_coef=2 * delta)
    for _ in range(300):
        adapt(control, 0.0)
    assert control.coef == top
    for _ in range(300):
        adapt(control, 1.0)
    assert control.coef == 2 * delta


def test_aent_trace():
    control = AEnt(warmup=0)
    coef = []
    for entropy in (0.30, 0.26, 0.20, 0.12, 0.08, 0.05):
        control.after_step({"updated/clamped_entropy": entropy, "updated/entropy": 99.0}, PROGRESS)
        coef.append(control.coef)
    assert coef == pytest.approx([0.00188, 0.00184, 0.00184, 0.00190, 0.00204, 0.00224], abs=1e-12)


def test_aent_warmup_counts_steps_that_leave_the_coefficient_alone():
    for warmup in (0, 1, 3):
        control = AEnt(warmup=warmup)
        changed = []
        for _ in range(5):
            before = control.coef
            assert control.after_step({"updated/clamped_entropy": 0.3}, PROGRESS) == {"actor/entropy_coef": before}
            changed.append(control.coef != before)
        assert changed == [False] * warmup + [True] * (5 - warmup)


def test_aent_stays_in_its_box_and_fixed_when_not_adaptive():
    control = AEnt(warmup=0, coef_lr=1.0)
    control.after_step({"updated/clamped_entropy": 5.0}, PROGRESS)
    assert control.coef == 6e-4
    control.after_step({"updated/clamped_entropy": 0.0}, PROGRESS)
    assert control.coef == 9e-3
    fixed = AEnt(adaptive=False, warmup=0)
    fixed.after_step({"updated/clamped_entropy": 5.0}, PROGRESS)
    assert fixed.coef == 2e-3


@pytest.mark.parametrize(
    "control, moment, key",
    [
        (AEnt(), "after_step", "updated/clamped_entropy"),
        (AdaptiveBonus(), "after_step", "scored/sampled_entropy"),
        (AdaptiveBonus(rule="trl"), "after_update", "entropy"),
        (EntroPIC(), "after_update", "entropy"),
        (PositiveAdvantageReweighting(), "after_step", "scored/entropy"),
        (DifficultyBonus(), "after_step", "scored/entropy"),
    ],
    ids=str,
)
def test_a_controller_needs_its_mean(control, moment, key):
    before = control.state_dict()
    with pytest.raises(ValueError, match=rf"means must hold '{key}' for control {control.name}, got \['x'\]"):
        getattr(control, moment)({"x": 1.0}, PROGRESS)
    with pytest.raises(ValueError, match=rf"means\['{key}'\] must be finite for control {control.name}, got nan"):
        getattr(control, moment)({key: math.nan}, PROGRESS)
    assert control.state_dict() == before


# --- state, registry, validation --------------------------------------------------------------------------------------

KNOBS = {
    "aent": {"warmup": 1}, "adaptive_bonus": {"rule": "skywork"}, "entropic": {}, "positive_advantage_reweighting": {},
    "difficulty_bonus": {"entropy_coef": 0.005}, "adaptive_clip": {},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_state_survives_json_and_continues_alike(name):
    entropies = (0.1, 0.05, 0.3, 0.6, 0.15)
    whole, first = make_control(name, **KNOBS.get(name, {})), make_control(name, **KNOBS.get(name, {}))
    for h in entropies[:3]:
        adapt(whole, h)
        adapt(first, h)
    resumed = make_control(name, **KNOBS.get(name, {}))
    assert not first.state or first.state_dict() != resumed.state_dict()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [adapt(whole, h) for h in entropies[3:]] == [adapt(resumed, h) for h in entropies[3:]]
    assert whole.state_dict() == resumed.state_dict()
    assert bool(whole.state_dict()) == (name in KNOBS)


@pytest.mark.parametrize(
    "state, error, message",
    [
        ({"coef": 1.0}, ValueError, r"state of control aent must have keys \['coef', 'steps'\], got \['coef'\]"),
        ({"coef": math.nan, "steps": 1}, ValueError, "coef must be finite, got nan"),
        ({"coef": "1", "steps": 1}, TypeError, "coef must be a float, got '1'"),
        ({"coef": 1.0, "steps": 1.5}, TypeError, "steps must be a int, got 1.5"),
    ],
)
def test_state_errors_leave_the_state_alone(state, error, message):
    control = AEnt()
    with pytest.raises(error, match=message):
        control.load_state_dict(state)
    assert control.state_dict() == {"coef": 2e-3, "steps": 0}


def test_registry():
    assert set(CONTROLS) == {
        "none", "entropy_bonus", "adaptive_bonus", "difficulty_bonus", "aent", "entropic", "clip_cov", "kl_cov", "sent",
        "clip_b", "clip_v", "high_entropy_tokens", "entropy_advantage", "positive_advantage_reweighting",
        "relative_entropy", "perplexity_shaping", "position_shaping", "entropy_ratio_clip", "adaptive_clip",
    }  # fmt: skip
    assert all(cls.name == name and cls().name == name for name, cls in CONTROLS.items())
    assert make_control("kl_cov", kl_cov_ratio=0.01) == KLCov(kl_cov_ratio=0.01)
    with pytest.raises(ValueError, match="control name must be one of none, entropy_bonus, .*; got 'klcov'"):
        make_control("klcov")
    with pytest.raises(ValueError, match="control kl_cov has no knob 'k_percent'; it has kl_cov_ratio, ppo_kl_coef"):
        make_control("kl_cov", k_percent=0.2)
    with pytest.raises(ValueError, match="control none has no knob 'x'; it has none"):
        make_control("none", x=1)


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_is_built_from_a_recipe(name):
    knobs = KNOBS.get(name, {})
    config = parse_config(recipe("unused", control=[name], **{f"controls.{name}": knobs}))
    (control,) = config.build_controls()
    assert control == make_control(name, **knobs)


def test_needs_and_clamp_arguments():
    assert needs([]) == needs([NoControl()]) == frozenset()
    assert needs([ClipCov(), AEnt(), EntropyBonus()]) == {"selection", "entropy", "clamped_entropy"}
    assert clamp_arguments([ClipCov(), EntropyBonus()]) == {}
    assert clamp_arguments([ClipCov(), AEnt(clamp_p=0.2)]) == {"clamp_p": 0.2}
    with pytest.raises(ValueError, match="controls must agree on the clamped entropy"):
        clamp_arguments([AEnt(clamp_p=0.2), type("Other", (AEnt,), {"name": "other"})(clamp_p=0.3)])


def test_select_measures_without_controls():
    tokens = random_tokens(8, 50)
    selections, metrics = select([NoControl()], split(tokens, 4), step=0, config=CONFIG)
    assert selections == [[None]] * 4
    x, a = tokens.logprob.double(), tokens.advantage.double()
    value = (x - x.mean()) * (a - a.mean())
    assert float(metrics["actor/cov_mean"]) == pytest.approx(float(value.mean()), rel=1e-6)
    assert float(metrics["actor/cov_max"]) == pytest.approx(float(value.max()), rel=1e-6)


@pytest.mark.parametrize("control", [ClipCov(), KLCov()], ids=lambda c: c.name)
def test_select_names_the_missing_field(control):
    tokens = random_tokens(2, 5)
    tokens.token_id = None
    with pytest.raises(ValueError, match=f"tokens.token_id must be given, control {control.name}"):
        select([control], [tokens], step=0, config=CONFIG)


@pytest.mark.parametrize(
    "name, knobs, error, message",
    [
        ("clip_cov", {"clip_cov_ratio": 2.0}, ValueError, "clip_cov_ratio must be in .0, 0.5., got 2.0; it is"),
        ("clip_cov", {"clip_cov_ratio": -1e-4}, ValueError, "clip_cov_ratio must be in .* got -0.0001"),
        ("clip_cov", {"clip_cov_ratio": math.nan}, ValueError, "clip_cov_ratio must be in .* got nan"),
        ("clip_cov", {"clip_cov_lb": 5.0, "clip_cov_ub": 1.0}, ValueError, "clip_cov_ub must be in .5, inf., got 1.0"),
        ("clip_cov", {"semantics": "verl"}, ValueError, "semantics must be one of paper, reference; got 'verl'"),
        ("clip_cov", {"scope": "rank"}, ValueError, "scope must be one of global, micro_batch, rollout; got 'rank'"),
        ("clip_cov", {"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ("kl_cov", {"kl_cov_ratio": 0.6}, ValueError, "kl_cov_ratio must be in .0, 0.5., .* not a percent"),
        ("kl_cov", {"ppo_kl_coef": -1}, ValueError, "ppo_kl_coef must be in .* got -1"),
        ("kl_cov", {"kl_cov_ratio": "2e-3"}, TypeError, "kl_cov_ratio must be a number, got '2e-3'"),
        ("entropy_bonus", {"entropy_coef": -0.01}, ValueError, "entropy_coef must be in .* got -0.01"),
        ("adaptive_bonus", {"rule": "pid"}, ValueError, "rule must be one of skywork, trl; got 'pid'"),
        ("adaptive_bonus", {"target": 0.0}, ValueError, "target must be greater than 0"),
        ("adaptive_bonus", {"delta": -1e-4}, ValueError, "delta must be in .* got -0.0001"),
        ("adaptive_bonus", {"coef_max": -1.0}, ValueError, "coef_max must be in .*; the lower end is coef_min"),
        ("adaptive_bonus", {"entropy_coef": 0.1}, ValueError, "entropy_coef must be in .0, 0.005., got 0.1"),
        ("aent", {"clamp_p": 33}, ValueError, "clamp_p must be in .0, 1., got 33; it is a fraction, not a percent"),
        ("aent", {"clamp_p": 1.0}, ValueError, "clamp_p must be below 1, or nothing is left"),
        ("aent", {"entropy_low": 0.3}, ValueError, "entropy_high must be in .0.3, inf., got 0.24"),
        ("aent", {"entropy_coef": 0.1}, ValueError, "entropy_coef must be in .* the ends are coef_min, coef_max"),
        ("aent", {"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ("aent", {"coef_lr": -1.0}, ValueError, "coef_lr must be in .* got -1"),
        ("aent", {"adaptive": 1}, TypeError, "adaptive must be True or False, got 1"),
        ("clip_b", {"mu": -1.0}, ValueError, "mu must be in .0, inf., got -1.0"),
        ("clip_v", {"max_frac": 2}, ValueError, "max_frac must be in .0, 1., got 2; it is a fraction"),
        ("high_entropy_tokens", {"top_entropy_quantile": 0}, ValueError, "top_entropy_quantile must be greater than 0"),
        ("high_entropy_tokens", {"top_entropy_quantile": 20}, ValueError, "got 20; it is a fraction, not a percent"),
        ("high_entropy_tokens", {"denominator": "al"}, ValueError, "denominator must be one of kept, all; got 'al'"),
        ("high_entropy_tokens", {"scope": "rollout"}, ValueError, "scope must be one of global, micro_batch; got"),
        ("sent", {"kl_cov_ratio": 0.6}, ValueError, "kl_cov_ratio must be in .0, 0.5., .* not a percent"),
        ("sent", {"high_cov_coef": 0.1}, ValueError, "high_cov_coef must be in .* the lower end is low_cov_coef"),
        ("sent", {"semantics": "v1"}, ValueError, "semantics must be one of paper, reference; got 'v1'"),
        ("sent", {"low_entropy_ratio": 80}, ValueError, "low_entropy_ratio must be in .0, 1., got 80"),
        ("entropy_advantage", {"kappa": 0.5}, ValueError, "kappa must be in .1, inf., got 0.5; below 1 the bonus"),
        ("entropy_advantage", {"alpha": "0.4"}, TypeError, "alpha must be a number, got '0.4'"),
        (
            "positive_advantage_reweighting",
            {"schedule": "linear"},
            ValueError,
            "one of entropy, stage, epoch; got 'lin",
        ),
        ("positive_advantage_reweighting", {"weight": 1.5}, ValueError, "weight must be in .0, 1., got 1.5"),
        ("positive_advantage_reweighting", {"delta": -0.1}, ValueError, "delta must be in .0, 1., got -0.1"),
        ("perplexity_shaping", {"ppl_coef": -1}, ValueError, "ppl_coef must be in .* got -1"),
        ("position_shaping", {"start": 2.0}, ValueError, "start must be in .0, 1., got 2.0"),
        ("position_shaping", {"steepness": math.inf}, ValueError, "steepness must be in .* got inf"),
        ("entropic", {"target": 0.0}, ValueError, "target must be greater than 0"),
        ("entropic", {"prob_threshold": 95}, ValueError, "prob_threshold must be in .0, 1., got 95; it is a fraction"),
        ("entropic", {"ki": -0.1}, ValueError, "ki must be in .* got -0.1"),
        ("difficulty_bonus", {"tau": 4}, ValueError, "tau must be in .0, 1., got 4"),
        ("difficulty_bonus", {"coef_lr": 0.0}, ValueError, "coef_lr must be greater than 0"),
        ("difficulty_bonus", {"entropy_coef": 0.1}, ValueError, "entropy_coef must be in .0, 0.01., got 0.1"),
    ],
)
def test_knob_errors_name_key_rule_and_value(name, knobs, error, message):
    with pytest.raises(error, match=message):
        make_control(name, **knobs)
