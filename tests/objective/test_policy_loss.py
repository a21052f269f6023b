"""The policy loss: against a loop in Python floats, hand values, and the same gradient for every split of the batch."""

import math

import pytest
import torch

from entcov.controls import AEnt, ClipCov, Control, Effect, EntropyBonus, KLCov, Selection, select
from entcov.objective.policy_loss import kl_estimate, policy_loss
from entcov.objective.tokens import AGGREGATIONS, KL_ESTIMATORS, PolicyLossConfig, Tokens, Totals
from tests.support.objective_oracle import NoHostRead, make_tokens, part

INF = math.inf


def tiny(logprob, old, advantage, **more):
    """Unmasked tokens from lists."""
    make = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    mask = torch.ones(len(logprob), dtype=torch.bool)
    more = {name: make(value) for name, value in more.items()}
    return Tokens(make(logprob).requires_grad_(), make(old), make(advantage), mask, **more)


def loop_loss(tokens, sequence, config):
    """The mini-batch loss, token by token in Python floats."""
    rows = [i for i, m in enumerate(tokens.loss_mask.tolist()) if m]
    sequences = sorted({int(sequence[i]) for i in rows})
    per_sequence = {s: sum(int(sequence[i]) == s for i in rows) for s in sequences}
    at = {name: value.tolist() for name, value in vars(tokens).items() if value is not None}
    total = 0.0
    for i in rows:
        r = math.exp(max(-20.0, min(20.0, at["logprob"][i] - at["old_logprob"][i])))
        a = at["advantage"][i]
        loss = max(-a * r, -a * max(1 - config.clip_low, min(1 + config.clip_high, r)))
        if config.dual_clip is not None and a < 0:
            loss = min(loss, -a * config.dual_clip)
        if config.tis_cap is not None:
            loss *= min(math.exp(at["old_logprob"][i] - at["rollout_logprob"][i]), config.tis_cap)
        d = at["ref_logprob"][i] - at["logprob"][i]
        loss += (
            config.kl_coef
            * (r if config.kl_weight == "ratio" else 1)
            * {
                "k1": -d,
                "abs": abs(d),
                "k2": d * d / 2,
                "k3": math.exp(d) - d - 1,
                "k1+": -d,
                "k3+": math.exp(d) - d - 1,
            }[config.kl_estimator]
        )
        total += (
            loss
            * {
                "token-mean": 1 / len(rows),
                "token-sum": 1,
                "seq-mean-token-sum": 1 / len(sequences),
                "seq-mean-token-mean": 1 / (len(sequences) * per_sequence[int(sequence[i])]),
                "seq-mean-token-sum-norm": 1 / (len(sequences) * (config.max_response_length or 1)),
            }[config.aggregation]
        )
    return total


def config_for(aggregation, **knobs):
    length = 11 if aggregation == "seq-mean-token-sum-norm" else None
    return PolicyLossConfig(aggregation=aggregation, max_response_length=length, **knobs)


VARIANTS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.28},
    {"clip_low": 1.0, "clip_high": INF},
    {"dual_clip": 1.5},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_weight": "ratio"},
    {"tis_cap": 1.1},
    {"clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.1, "kl_estimator": "k2", "tis_cap": 2.0},
]


# --- value and gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", VARIANTS, ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_matches_loop(aggregation, knobs):
    tokens, sequence = make_tokens()
    config = config_for(aggregation, **knobs)
    loss, metrics = policy_loss(tokens, config)
    assert loss.item() == pytest.approx(loop_loss(tokens, sequence, config), rel=1e-12)
    assert float(metrics["actor/loss"]) == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("knobs", VARIANTS, ids=str)
def test_gradient_matches_finite_differences(knobs):
    """Central differences of the loop oracle at every unmasked token; no token sits on a corner of the clip."""
    tokens, sequence = make_tokens(seed=3)
    config = config_for("seq-mean-token-mean", **knobs)
    tokens.logprob.requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(tokens, config)[0], tokens.logprob)
    assert not gradient[~tokens.loss_mask].any()
    base = tokens.logprob.detach()
    for i in tokens.loss_mask.nonzero().flatten().tolist():
        step = torch.zeros_like(base)
        step[i] = 1e-6
        ends = []
        for moved in (base + step, base - step):
            tokens.logprob = moved
            ends.append(loop_loss(tokens, sequence, config))
        assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_clip_hand_values():
    """A ratio of 1.5 or 0.5 against [0.8, 1.28], for both signs of the advantage: loss and d loss / d logprob."""
    logs = [math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)]
    tokens = tiny(logs, [0.0] * 4, [1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy_loss(tokens, PolicyLossConfig(clip_low=0.2, clip_high=0.28))
    assert loss.item() == pytest.approx((-1.28 + 1.5 - 0.5 + 0.8) / 4)
    loss.backward()
    assert tokens.logprob.grad.tolist() == pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0])
    assert float(metrics["actor/pg_clipfrac"]) == 0.5
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(-sum(logs) / 4)


def test_dual_clip_hand_values():
    tokens = tiny([math.log(5.0), math.log(5.0), math.log(2.0)], [0.0] * 3, [-1.0, 1.0, -1.0])
    loss, metrics = policy_loss(tokens, PolicyLossConfig(dual_clip=3.0))
    assert loss.item() == pytest.approx((3.0 - 1.2 + 2.0) / 3)
    loss.backward()
    assert tokens.logprob.grad.tolist() == pytest.approx([0.0, 0.0, 2.0 / 3])
    assert float(metrics["actor/pg_clipfrac_lower"]) == pytest.approx(1 / 3)


def test_log_ratio_is_clamped():
    tokens = tiny([0.0, 0.0], [-200.0, 200.0], [-1.0, -1.0])
    loss, _ = policy_loss(tokens, PolicyLossConfig(clip_low=1.0, clip_high=INF))
    assert loss.item() == pytest.approx((math.exp(20) + math.exp(-20)) / 2)
    loss.backward()
    assert tokens.logprob.grad.tolist() == [0.0, 0.0]


def test_tis_weight_is_capped_and_constant():
    tokens = tiny([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], rollout_logprob=[-1.0 - math.log(8), -1.0 + math.log(2)])
    tokens.rollout_logprob.requires_grad_()
    loss, metrics = policy_loss(tokens, PolicyLossConfig(tis_cap=2.0))
    assert loss.item() == pytest.approx(-(2.0 + 0.5) / 2)
    loss.backward()
    assert tokens.logprob.grad.tolist() == pytest.approx([-1.0, -0.25])
    assert tokens.rollout_logprob.grad is None
    assert float(metrics["actor/tis_weight"]) == pytest.approx(1.25)
    assert float(metrics["actor/tis_capfrac"]) == 0.5
    assert float(metrics["actor/mismatch"]) == pytest.approx((math.log(8) + math.log(2)) / 2)


def test_the_importance_weight_has_no_floor():
    """A token that the sampler took a thousand, or a hundred million, times as likely counts that much less."""
    tokens = tiny([-9.0, -20.0], [-9.0, -20.0], [1.0, 1.0], rollout_logprob=[-9 + math.log(1e3), -20 + math.log(1e8)])
    loss, metrics = policy_loss(tokens, PolicyLossConfig(tis_cap=2.0))
    loss.backward()
    assert tokens.logprob.grad.tolist() == pytest.approx([-1e-3 / 2, -1e-8 / 2], rel=1e-12, abs=0)
    assert float(metrics["actor/tis_weight"]) == pytest.approx((1e-3 + 1e-8) / 2, rel=1e-12, abs=0)


def test_kl_hand_values():
    """d = ref - logprob = ln 2, and far out where the bounds act."""
    logprob, ref = torch.zeros(1, dtype=torch.float64), torch.tensor([math.log(2)], dtype=torch.float64)
    ln2 = math.log(2)
    expected = {"k1": -ln2, "abs": ln2, "k2": ln2**2 / 2, "k3": 1 - ln2, "k1+": -ln2, "k3+": 1 - ln2, "abs+": ln2}
    assert set(expected) == set(KL_ESTIMATORS)
    for name, value in expected.items():
        assert float(kl_estimate(logprob, ref, name)) == pytest.approx(value, rel=1e-14)
    assert float(kl_estimate(logprob, ref + 50, "k3")) == 10.0
    assert float(kl_estimate(logprob, ref - 50, "k3")) == 10.0
    assert float(kl_estimate(logprob, ref - 5, "k3")) == pytest.approx(math.exp(ln2 - 5) + 5 - ln2 - 1)


def test_kl_gradients():
    """d/dlogprob: k1 1, abs -sign d, k2 -d, k3 1 - exp(d); the "+" forms have k2's."""
    d = 0.5
    expected = {"k1": 1.0, "abs": -1.0, "k2": -d, "k3": 1 - math.exp(d), "k1+": -d, "k3+": -d, "abs+": -d}
    for name, value in expected.items():
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        kl_estimate(x, torch.full((1,), d, dtype=torch.float64), name).sum().backward()
        assert float(x.grad) == pytest.approx(value, rel=1e-14), name


def test_kl_weighted_by_the_ratio():
    """k3 at d = ln 2 is 1 - ln 2; r = 3 multiplies it, and d(r k3) = r (k3 + 1 - e^d) = -3 ln 2: that of -r d."""
    tokens = tiny([0.0], [-math.log(3)], [0.0], ref_logprob=[math.log(2)])
    loss, metrics = policy_loss(tokens, PolicyLossConfig(kl_coef=0.5, kl_weight="ratio"))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 3 * (1 - math.log(2)))
    assert tokens.logprob.grad.item() == pytest.approx(-0.5 * 3 * math.log(2))
    assert float(metrics["actor/kl_loss"]) == pytest.approx(3 * (1 - math.log(2)))


def test_token_sum_by_hand():
    """A token weighs 1, whatever the mini-batch's denominators are."""
    tokens = tiny([0.0, 0.0], [0.0, 0.0], [1.0, -3.0])
    loss, metrics = policy_loss(tokens, PolicyLossConfig(aggregation="token-sum"), totals=Totals(100, 7))
    loss.backward()
    assert (loss.item(), tokens.logprob.grad.tolist()) == (2.0, [-1.0, 3.0])
    assert float(metrics["actor/pg_clipfrac"]) == 0 and float(metrics["actor/pg_loss"]) == 2.0


# --- splits ---------------------------------------------------------------------------------------------------------

SPLITS = {
    "whole": lambda sequence: [[0, 1, 2, 3, 4, 5]],
    "one sequence each": lambda sequence: [[s] for s in range(6)],
    "uneven": lambda sequence: [[3], [0, 5, 1, 4], [2]],
    "with an empty one": lambda sequence: [[1, 2, 3], [], [0, 4, 5]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_gives_equal_gradients(aggregation, split):
    """With every feature on and four controls in the list; float64, so only the order of additions may differ."""
    tokens, sequence = make_tokens(seed=1)
    config = config_for(aggregation, dual_clip=2.0, kl_coef=0.2, tis_cap=1.5)
    controls = [EntropyBonus(0.01), AEnt(), KLCov(kl_cov_ratio=0.2), ClipCov(clip_cov_ratio=0.2, clip_cov_lb=0.1)]
    totals = Totals(int(tokens.loss_mask.sum()), 6)

    def run(groups):
        parts = [
            part(tokens, torch.isin(sequence, torch.tensor(g, dtype=torch.int64)).nonzero().flatten()) for g in groups
        ]
        selections, _ = select(controls, parts, step=0, config=config)
        gradient, loss, sums = {}, 0.0, {}
        for p, s in zip(parts, selections, strict=True):
            leaves = [p.logprob.requires_grad_(), p.entropy.requires_grad_(), p.clamped_entropy.requires_grad_()]
            value, metrics = policy_loss(p, config, totals=totals, controls=controls, selections=s)
            value.backward()
            loss += value.item()
            for i, token in enumerate(p.token_id.tolist()):
                gradient[token] = [float(leaf.grad[i]) for leaf in leaves]
            for name, m in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(m)
        return loss, gradient, sums

    loss, gradient, sums = run(SPLITS[split](sequence))
    expected_loss, expected_gradient, expected_sums = run([[0, 1, 2, 3, 4, 5]])
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert gradient == {k: pytest.approx(v, rel=1e-12, abs=1e-300) for k, v in expected_gradient.items()}
    assert sums == {k: pytest.approx(v, rel=1e-12) for k, v in expected_sums.items()}
    assert any(g[0] for g in gradient.values()) and any(g[1] for g in gradient.values())
    # totals=None means: this is all of it
    selections, _ = select(controls, [tokens], step=0, config=config)
    alone, _ = policy_loss(tokens, config, controls=controls, selections=selections[0])
    assert float(alone) == pytest.approx(expected_loss, rel=1e-12)


def test_metrics_hand_values():
    """Means over unmasked tokens, whatever the aggregation."""
    tokens, _ = make_tokens(seed=2)
    mask = tokens.loss_mask
    _, metrics = policy_loss(tokens, config_for("seq-mean-token-sum"))
    for name, value in {
        "actor/entropy": tokens.entropy,
        "actor/clamped_entropy": tokens.clamped_entropy,
        "actor/sampled_entropy": -tokens.old_logprob,
        "actor/ppo_kl": tokens.old_logprob - tokens.logprob,
        "actor/mismatch": (tokens.old_logprob - tokens.rollout_logprob).abs(),
    }.items():
        assert float(metrics[name]) == pytest.approx(float(value[mask].mean()), rel=1e-12), name
    assert all(m.dim() == 0 and not m.requires_grad for m in metrics.values())


def test_micro_batch_without_loss_tokens():
    tokens, _ = make_tokens()
    tokens.loss_mask = torch.zeros_like(tokens.loss_mask)
    tokens.logprob.requires_grad_()
    for p in (tokens, part(tokens, slice(0, 0))):
        loss, metrics = policy_loss(p, totals=Totals(10, 2))
        loss.backward()
        assert loss.item() == 0.0 and not any(float(m) for m in metrics.values())
    assert not tokens.logprob.grad.any()
    for p in (tokens, part(tokens, slice(0, 0))):
        with pytest.raises(ValueError, match="loss_mask must have a True token when totals is None"):
            policy_loss(p)


def test_totals_may_be_tensors():
    tokens, _ = make_tokens()
    config = config_for("seq-mean-token-mean")
    n = int(tokens.loss_mask.sum())
    by_int, _ = policy_loss(tokens, config, totals=Totals(n, 6))
    by_tensor, _ = policy_loss(tokens, config, totals=Totals(torch.tensor(n), torch.tensor(6)))
    assert float(by_int) == float(by_tensor)


def test_float32_tokens():
    """The trainer's dtype, against the float64 loop: 1e-6 is 8 ulp of the largest token loss here."""
    tokens, sequence = make_tokens(dtype=torch.float32)
    config = config_for("token-mean", kl_coef=0.1, tis_cap=2.0)
    loss, metrics = policy_loss(tokens, config)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loop_loss(tokens, sequence, config), rel=1e-6, abs=1e-6)


# --- controls in the loss -------------------------------------------------------------------------------------------


class Fixed(Control):
    """A control with a given effect."""

    name = "fixed"

    def __init__(self, **effect):
        self.effect = effect

    def apply(self, tokens, selected):
        return Effect(**self.effect)


def test_dropped_token_has_no_value_and_no_gradient_but_counts():
    tokens = tiny([-0.9, -0.5, -0.2], [-1.0, -0.6, -0.2], [1.0, -2.0, 0.5])
    full, _ = policy_loss(tokens)
    keep = torch.tensor([True, False, True])
    loss, metrics = policy_loss(tokens, controls=[Fixed(keep=keep)])
    assert loss.item() == pytest.approx(full.item() - 2.0 * math.exp(0.1) / 3, rel=1e-12)  # still divided by 3
    loss.backward()
    assert tokens.logprob.grad[1] == 0 and tokens.logprob.grad[0] == pytest.approx(-math.exp(0.1) / 3)
    assert float(metrics["actor/pg_loss"]) == pytest.approx(loss.item())


def test_dropped_token_keeps_its_penalty():
    tokens = tiny([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])
    keep = torch.tensor([False, True])
    loss, _ = policy_loss(tokens, controls=[Fixed(keep=keep), Fixed(penalty=torch.tensor([3.0, 0.0]).double())])
    assert loss.item() == pytest.approx((3.0 - 1.0) / 2)


def test_composition():
    """Multipliers multiply, keep masks intersect, penalties add, one `unclipped` is enough; order does not matter."""
    tokens = tiny([math.log(2.0)] * 3, [0.0] * 3, [1.0, 1.0, -1.0])
    make = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    controls = [
        Fixed(multiplier=make(2.0, 1.0, 1.0), keep=torch.tensor([True, False, True])),
        Fixed(multiplier=make(3.0, 5.0, -1.0), penalty=make(0.1, 0.2, 0.3)),
        Fixed(keep=torch.tensor([True, True, False]), penalty=make(1.0, 1.0, 1.0)),
    ]
    expected = (-6 * 1.2 + 1.1 + 1.2 + 1.3) / 3  # ratio 2 is clipped at 1.2
    for order in (controls, controls[::-1]):
        assert policy_loss(tokens, controls=order)[0].item() == pytest.approx(expected)
    free, metrics = policy_loss(tokens, controls=[*controls, Fixed(unclipped=True)])
    assert free.item() == pytest.approx((-6 * 2.0 + 1.1 + 1.2 + 1.3) / 3)
    assert float(metrics["actor/pg_clipfrac"]) == 0


def test_multiplier_is_a_constant():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    tokens = tiny([-1.0], [-1.0], [1.0])
    policy_loss(tokens, controls=[Fixed(multiplier=weight)])[0].backward()
    assert weight.grad is None and tokens.logprob.grad.tolist() == [-1.0]


def test_control_metrics_are_token_means():
    tokens, _ = make_tokens()
    value = torch.arange(len(tokens.loss_mask)).double()
    _, metrics = policy_loss(tokens, controls=[Fixed(metrics={"x": value})])
    assert float(metrics["x"]) == pytest.approx(float(value[tokens.loss_mask].mean()))


def test_garbage_outside_the_mask_changes_nothing():
    tokens, _ = make_tokens()  # NaN there
    clean = tokens.masked()
    config = config_for("token-mean", kl_coef=0.1, tis_cap=2.0)
    controls = [EntropyBonus(0.1)]
    results = []
    for t in (tokens, clean):
        t.logprob.requires_grad_()
        loss, metrics = policy_loss(t, config, controls=controls)
        loss.backward()
        results.append((loss.item(), t.logprob.grad.tolist(), {k: float(v) for k, v in metrics.items()}))
    assert results[0] == results[1]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_host_synchronisation_on_the_device_path(aggregation):
    """The code that any accelerator runs, on the device without data, backward included."""
    tokens, _ = make_tokens(dtype=torch.float32)
    meta = Tokens(**{name: value.to("meta") for name, value in vars(tokens).items() if value is not None})
    meta.logprob.requires_grad_()
    controls = [EntropyBonus(), AEnt(), KLCov(), ClipCov()]
    with NoHostRead():
        for totals in (None, Totals(22, 6), Totals(torch.tensor(22).to("meta"), torch.tensor(6).to("meta"))):
            loss, metrics = policy_loss(
                meta,
                config_for(aggregation, dual_clip=2.0, kl_coef=0.1, tis_cap=2.0),
                totals=totals,
                controls=controls,
                selections=[None, None, Selection(meta.loss_mask), Selection(meta.loss_mask)],
            )
            loss.backward()
    assert loss.is_meta and all(m.is_meta for m in metrics.values())
