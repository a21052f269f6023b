"""The objectives: hand values, the same formulas on padded whole responses, every split, and what they refuse."""

import math

import pytest
import torch

from entcov.controls import ClipCov, Control, Effect, KLCov, make_control, select
from entcov.objective import sequences as sequences_module
from entcov.objective.objectives import OBJECTIVES, UNCLIPPED
from entcov.objective.policy_loss import policy_loss
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import (
    OBJECTIVE_KNOBS,
    RESPONSE_AGGREGATIONS,
    SEQUENCE_OBJECTIVES,
    PolicyLossConfig,
    Tokens,
    Totals,
)
from tests.support.objective_oracle import NoHostRead, make_tokens, part
from tests.support.thread_ranks import ThreadRanks

INF = math.inf
LN2 = math.log(2)
VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}  # TRL's defaults
# Of each objective: knobs for which its clip acts on some tokens of `make_tokens`, and not on others.
KNOBS = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5},
    "ce_gppo": {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5, "ce_gppo_beta1": 0.5, "ce_gppo_beta2": 2.0},
    "gspo": {"clip_low": 0.05, "clip_high": 0.1},
    "geo_mean": {"clip_low": 0.3, "clip_high": 0.4},
    "cispo": {"clip_low": 0.3, "clip_high": 0.4},
    "sapo": {"tau_pos": 1.3, "tau_neg": 2.0},
    "gpg": {},
    "dro": {"dro_beta": 0.7},
    "dppo_tv": {"clip_low": 0.01, "clip_high": 0.02, "dual_clip": 1.1},
    "dppo_kl": {"clip_low": 0.002, "clip_high": 0.003, "dual_clip": 1.1},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 0.8, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.2},
}


def config_of(objective, **knobs):
    return PolicyLossConfig(objective=objective, **{"aggregation": "seq-mean-token-mean"} | KNOBS[objective] | knobs)


def least(objective):
    """The knobs that the objective cannot do without."""
    return {"objective": objective, "aggregation": "seq-mean-token-mean"} | (
        {"dro_beta": 1.0} if objective == "dro" else {}
    )


def tis_level(objective):
    return "token" if objective == "vespo" else "sequence"


def batch_of(seed=0):
    """Six responses as `make_tokens` makes them, with one advantage a response, and probabilities below 1."""
    tokens, sequence = make_tokens(seed)
    tokens.logprob, tokens.old_logprob = tokens.logprob - 2.5, tokens.old_logprob - 2.5
    tokens.rollout_logprob = tokens.rollout_logprob - 2.5
    per_response = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens.advantage, tokens.sequence = per_response[sequence].clone(), sequence
    tokens.logprob.requires_grad_()
    return tokens


def small(logprob, advantage, config, sequence=None, old=None, **more):
    """(loss, gradient, metrics) of unmasked tokens with old log-probabilities 0, by default of one response."""
    make = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    sequence = torch.tensor(sequence or [0] * len(logprob))
    more = {name: make(value) for name, value in more.items()}
    tokens = Tokens(
        make(logprob).requires_grad_(), make(old or [0.0] * len(logprob)), make(advantage),
        torch.ones(len(logprob), dtype=torch.bool), sequence=sequence,
        sequence_length=sequence.bincount()[sequence], **more,
    )  # fmt: skip
    loss, metrics = policy_loss(tokens, config)
    loss.backward()
    return loss.item(), tokens.logprob.grad.tolist(), metrics


def test_every_objective_has_its_knobs():
    assert set(OBJECTIVES) == set(OBJECTIVE_KNOBS) == set(KNOBS)
    assert set(SEQUENCE_OBJECTIVES) | set(UNCLIPPED) < set(OBJECTIVES)
    assert set(RESPONSE_AGGREGATIONS) < set(SEQUENCE_OBJECTIVES)
    assert {n for n in OBJECTIVES if PolicyLossConfig(**least(n)).by_response} == set(SEQUENCE_OBJECTIVES)


# ---- hand values -----------------------------------------------------------------------------------------------------


def test_gspo_hand_values():
    """Log ratios ln 4 and 0: s = 2. Clipped at 1.28 for A = 1, not for A = -1, whose tokens have -A s / 2 each."""
    config = config_of("gspo", clip_low=0.2, clip_high=0.28)
    logs = [2 * LN2, 0.0]
    loss, gradient, metrics = small(logs, [1.0, 1.0], config)
    assert (loss, gradient, float(metrics["actor/pg_clipfrac"])) == (pytest.approx(-1.28), [0.0, 0.0], 1.0)
    loss, gradient, metrics = small(logs, [-1.0, -1.0], config)
    assert (loss, gradient) == (pytest.approx(2.0), pytest.approx([1.0, 1.0]))
    assert float(metrics["actor/pg_clipfrac"]) == 0


def test_gspo_bounds_the_mean_log_ratio():
    """verl: exp(min(mean, 10)), and no bound of single tokens: log ratios 30 and 0 have mean 15, 30 and -30 mean 0."""
    config = config_of("gspo", clip_low=1.0, clip_high=INF)
    assert small([30.0, 0.0], [-1.0, -1.0], config)[:2] == (pytest.approx(math.exp(10)), [0.0, 0.0])
    assert small([30.0, -30.0], [-1.0, -1.0], config)[:2] == (pytest.approx(1.0), pytest.approx([0.5, 0.5]))


def test_geo_mean_hand_values():
    """Log ratios 0.9 and 0.1 with range 0.4. A = 1: l = 0.4, 0.1, s = e^0.25, the first without gradient."""
    config = config_of("geo_mean", clip_low=0.4, clip_high=0.4)
    loss, gradient, metrics = small([0.9, 0.1], [1.0, 1.0], config)
    assert (loss, gradient) == (pytest.approx(-math.exp(0.25)), pytest.approx([0.0, -math.exp(0.25) / 2]))
    assert float(metrics["actor/pg_clipfrac"]) == 0.5
    loss, gradient, metrics = small([0.9, 0.1], [-1.0, -1.0], config)
    assert (loss, gradient) == (pytest.approx(math.exp(0.5)), pytest.approx([math.exp(0.5) / 2] * 2))
    assert float(metrics["actor/pg_clipfrac"]) == 0


def test_ce_gppo_hand_values():
    """Clip [0.8, 1.28], betas 0.5 and 2. r = 2 with A = 1: 2 * 1.28; r = 1/2 with A = -2: 0.5 * 0.8 * 2; the others
    have -A r, the last one no more than 1.5 and no gradient."""
    knobs = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5, "ce_gppo_beta1": 0.5, "ce_gppo_beta2": 2.0}
    config = config_of("ce_gppo", aggregation="token-mean", **knobs)
    loss, gradient, metrics = small([LN2, -LN2, -LN2, 0.0, LN2], [1.0, -2.0, 1.0, -1.0, -1.0], config)
    assert loss == pytest.approx((-2.56 + 0.8 - 0.5 + 1.0 + 1.5) / 5)
    assert gradient == pytest.approx([-2.56 / 5, 0.8 / 5, -0.5 / 5, 1.0 / 5, 0.0])
    assert (float(metrics["actor/pg_clipfrac"]), float(metrics["actor/pg_clipfrac_lower"])) == (0.4, 0.2)
    # The bound of the ratio's logarithm takes no gradient away from a clipped token.
    assert small([30.0, -30.0], [1.0, -1.0], config)[1] == pytest.approx([-2.56 / 2, 0.4 / 2])


def test_ce_gppo_without_weights_has_ppo_s_gradient():
    tokens, knobs = batch_of(4), {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5}
    plain, none = config_of("ppo", **knobs), config_of("ce_gppo", **knobs, ce_gppo_beta1=0.0, ce_gppo_beta2=0.0)
    first, second = (torch.autograd.grad(policy_loss(tokens, c)[0], tokens.logprob)[0] for c in (plain, none))
    assert torch.equal(first, second)
    default = PolicyLossConfig(objective="ce_gppo")
    assert (default.ce_gppo_beta1, default.ce_gppo_beta2) == (0.75, 1.0)


def test_cispo_hand_values():
    """Ratios 2, 1/2 and 1 with range [0.8, 1.28]: every token has -weight A logprob, and no gradient is lost."""
    config = config_of("cispo", aggregation="token-mean", clip_low=0.2, clip_high=0.28)
    old = [-1.0 - LN2, -1.0 + LN2, -1.0]
    loss, gradient, metrics = small([-1.0] * 3, [1.0, 1.0, -2.0], config, old=old)
    assert loss == pytest.approx((1.28 + 0.8 - 2.0) / 3)
    assert gradient == pytest.approx([-1.28 / 3, -0.8 / 3, 2 / 3])
    assert float(metrics["actor/pg_clipfrac"]) == pytest.approx(2 / 3)


def test_sapo_hand_values():
    """At ratio 1 the gate is 2 / tau with slope 1; at ratio 2 and tau 1 it is 4 sigmoid(1), slope 4 s(1) (1 - s(1))."""
    config = config_of("sapo", aggregation="token-mean", tau_pos=1.0, tau_neg=2.0)
    loss, gradient, metrics = small([0.0, 0.0, LN2], [1.0, -1.0, 3.0], config)
    s = 1 / (1 + math.exp(-1))
    assert loss == pytest.approx((-2.0 + 1.0 - 3 * 4 * s) / 3)
    assert gradient == pytest.approx([-1 / 3, 1 / 3, -3 * 2 * 4 * s * (1 - s) / 3])
    assert float(metrics["actor/pg_clipfrac"]) == 0
    assert PolicyLossConfig(objective="sapo").tau_pos == 1.0 and PolicyLossConfig(objective="sapo").tau_neg == 1.05


def test_gpg_hand_values():
    loss, gradient, _ = small([-3.0, -0.5], [1.0, -2.0], config_of("gpg", aggregation="token-mean"), old=[-1.0, -9.0])
    assert (loss, gradient) == (pytest.approx((3.0 - 1.0) / 2), pytest.approx([-0.5, 1.0]))


def test_luspo_is_gspo_summed_over_the_response():
    """Log ratios ln 4 and 0: s = 2 on both tokens, so the loss is 2 s and each token has the gradient s."""
    config = config_of("gspo", aggregation="seq-mean-token-sum")
    assert small([2 * LN2, 0.0], [-1.0, -1.0], config)[:2] == (pytest.approx(4.0), pytest.approx([2.0, 2.0]))


def test_dro_hand_values():
    """-A log pi + beta / 2 (log r)^2, whose gradient is -A + beta log r; the log ratio has no bound."""
    config = config_of("dro", aggregation="token-mean", dro_beta=0.5)
    loss, gradient, metrics = small([-1.0, -2.0], [3.0, -1.0], config, old=[-3.0, 28.0])
    assert loss == pytest.approx((3 + 0.25 * 4 - 2 + 0.25 * 900) / 2)
    assert gradient == pytest.approx([(-3 + 0.5 * 2) / 2, (1 - 0.5 * 30) / 2])
    assert float(metrics["actor/pg_clipfrac"]) == 0


def test_dppo_tv_hand_values():
    """pi 0.5 and 0.1 from 0.25: moved by 0.25 and -0.15, within [-0.2, 0.3] or not; r = 2 is bounded at 1.5."""
    logs, old = [math.log(0.5), math.log(0.5), math.log(0.1), math.log(0.1)], [math.log(0.25)] * 4
    wide = config_of("dppo_tv", aggregation="token-mean", clip_low=0.2, clip_high=0.3, dual_clip=1.5)
    loss, gradient, metrics = small(logs, [1.0, -1.0, 1.0, -1.0], wide, old=old)
    assert gradient == pytest.approx([-1.5 / 4, 1.5 / 4, -0.4 / 4, 0.4 / 4])
    assert loss == pytest.approx(sum(g * x for g, x in zip(gradient, logs, strict=True)))
    assert (float(metrics["actor/pg_clipfrac"]), float(metrics["actor/pg_clipfrac_lower"])) == (0.0, 0.5)
    narrow = config_of("dppo_tv", aggregation="token-mean", clip_low=0.1, clip_high=0.2, dual_clip=None)
    loss, gradient, metrics = small(logs, [1.0, -1.0, 1.0, -1.0], narrow, old=old)
    assert gradient == pytest.approx([0.0, 2.0 / 4, -0.4 / 4, 0.0])  # the second moves against A, the third too
    assert (float(metrics["actor/pg_clipfrac"]), float(metrics["actor/pg_clipfrac_lower"])) == (0.5, 0.0)


def test_dppo_kl_hand_values():
    """KL(1/4 || 1/2) = ln(3/2) 3/4 - ln(2)/4 = 0.1308, KL(1/4 || 1/10) = ln(5/2)/4 + ln(5/6) 3/4 = 0.0923."""
    logs, old = [math.log(0.5), math.log(0.5), math.log(0.1), math.log(0.1)], [math.log(0.25)] * 4
    for low, high, expected in (
        (0.0924, 0.1309, [-2.0, 2.0, -0.4, 0.4]),
        (0.0922, 0.1307, [0.0, 2.0, -0.4, 0.0]),
        (0.0, 0.0, [0.0, 2.0, -0.4, 0.0]),
    ):
        config = config_of("dppo_kl", aggregation="token-mean", clip_low=low, clip_high=high, dual_clip=None)
        _, gradient, metrics = small(logs, [1.0, -1.0, 1.0, -1.0], config, old=old)
        assert gradient == pytest.approx([g / 4 for g in expected])
        assert float(metrics["actor/pg_clipfrac"]) == expected.count(0.0) / 4


def test_vespo_hand_values():
    """Log ratios ln 4 and -ln 2: w = 2. phi = 2^k e^-lambda, on every token, for the sign of its advantage."""
    config = config_of("vespo", aggregation="token-mean", **{f"vespo_{n}": v for n, v in VESPO.items()})
    loss, gradient, _ = small([2 * LN2, -LN2], [1.0, -1.0], config)
    up, down = 4 * math.exp(-3), 8 * math.exp(-2)
    assert gradient == pytest.approx([-up / 2, down / 2])
    assert loss == pytest.approx((-up * 2 * LN2 - down * LN2) / 2)
    # a ratio is bounded by e^20, w by e^20 above and 1e-8 below: 1e-16 e^3
    assert small([-900.0, 0.0], [1.0, 1.0], config)[1] == pytest.approx([-5e-17 * math.exp(3)] * 2, rel=1e-7, abs=0)
    assert small([30.0, -20.0 + LN2], [1.0, 1.0], config)[1] == pytest.approx([-up / 2] * 2)


def test_vespo_takes_importance_weights_into_its_own():
    """Ratios 2 of the policy, and 3 and 1/3 to the sampler, cut to [1/2, 2]: w = 2 * 2 * 1/2."""
    config = config_of(
        "vespo", aggregation="token-mean", tis_cap=2.0, tis_floor=0.5, **{f"vespo_{n}": v for n, v in VESPO.items()}
    )
    knobs = {"rollout_logprob": [-math.log(3), math.log(3)]}
    loss, gradient, metrics = small([LN2, 0.0], [1.0, 1.0], config, **knobs)
    assert gradient == pytest.approx([-4 * math.exp(-3) / 2] * 2)
    assert float(metrics["actor/tis_weight"]) == 1.25


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_update_has_the_same_gradient_under_every_objective(objective):
    """-A a token, since the policy is the old one."""
    tokens = batch_of()
    tokens.old_logprob = tokens.logprob.detach().clone()
    (gradient,) = torch.autograd.grad(policy_loss(tokens, config_of(objective))[0], tokens.logprob)
    expected = torch.where(tokens.loss_mask, -tokens.advantage / (6 * tokens.sequence_length), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


# ---- the formulas on padded whole responses --------------------------------------------------------------------------


def padded_loss(objective, tokens, logprob, knobs):
    """The mean over responses of each response's loss, from [B, L] matrices, gradients by autograd."""
    rows = [((tokens.sequence == s) & tokens.loss_mask).nonzero().flatten() for s in range(6)]
    losses = []
    for row in rows:
        lp, old, a = logprob[row], tokens.old_logprob[row], tokens.advantage[row[0]]
        r = (lp - old).exp()
        low, high = 1 - knobs.get("clip_low", 0), 1 + knobs.get("clip_high", 0)
        if objective == "gspo":  # the ratio itself, not its form by tokens
            s = (lp - old).mean().exp()
            losses.append(-torch.min(s * a, s.clamp(low, high) * a))
        elif objective == "geo_mean":
            log_r = lp - old
            inside = log_r.clamp(-knobs["clip_low"], knobs["clip_high"])
            log_r = torch.min(log_r, inside) if a > 0 else torch.max(log_r, inside)
            losses.append(-a * log_r.mean().exp())
        elif objective == "ppo":
            value = torch.min(r * a, r.clamp(low, high) * a)
            losses.append(-(torch.max(value, knobs["dual_clip"] * a) if a < 0 else value).mean())
        elif objective == "ce_gppo":  # the published code, token by token
            values = []
            for r_t in r:
                if a < 0 and r_t < low:
                    values.append(-knobs["ce_gppo_beta1"] * low / r_t.detach() * r_t * a)
                elif a > 0 and r_t > high:
                    values.append(-knobs["ce_gppo_beta2"] * high / r_t.detach() * r_t * a)
                else:
                    values.append(-r_t * a if a >= 0 else torch.min(-r_t * a, -knobs["dual_clip"] * a))
            losses.append(torch.stack(values).mean())
        elif objective == "cispo":
            losses.append(-(r.clamp(low, high).detach() * a * lp).mean())
        elif objective == "sapo":
            tau = knobs["tau_pos"] if a > 0 else knobs["tau_neg"]
            losses.append(-(4 / tau * a / (1 + torch.exp(-tau * (r - 1)))).mean())
        elif objective == "dro":
            losses.append((0.5 * knobs["dro_beta"] * (lp - old) ** 2 - a * lp).mean())
        elif objective in ("dppo_tv", "dppo_kl"):
            p, q = lp.detach().exp(), old.exp()
            far = (p - q).abs() if objective == "dppo_tv" else q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
            away = (p > q) & (far > knobs["clip_high"]) if a > 0 else (p < q) & (far > knobs["clip_low"])
            losses.append(-(r.detach().clamp(max=knobs["dual_clip"]) * a * lp * ~away).mean())
        elif objective == "vespo":
            k, decay = (knobs[f"vespo_{name}_{'pos' if a >= 0 else 'neg'}"] for name in ("k", "lambda"))
            w = r.detach().prod()
            losses.append(-(w**k * (decay * (1 - w)).exp() * a * lp).mean())
        else:
            losses.append(-(a * lp).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matches_whole_responses(objective, seed):
    tokens = batch_of(seed)
    loss, metrics = policy_loss(tokens, config_of(objective))
    (gradient,) = torch.autograd.grad(loss, tokens.logprob)
    expected = padded_loss(objective, tokens, tokens.logprob, KNOBS[objective])
    (expected_gradient,) = torch.autograd.grad(expected, tokens.logprob)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    if objective in ("ppo", "ce_gppo", "geo_mean", "cispo", "dppo_tv", "dppo_kl"):
        assert 0 < float(metrics["actor/pg_clipfrac"]) < 1


# ---- splits ----------------------------------------------------------------------------------------------------------


def gradients(objective, tokens, groups, **knobs):
    """Loss and gradient as sums over micro-batches of the responses in `groups`, with the totals of all."""
    totals, loss = Totals(int(tokens.loss_mask.sum()), 6), 0.0
    for group in groups:
        index = torch.isin(tokens.sequence, torch.tensor(group)).nonzero().flatten()
        loss = loss + policy_loss(part(tokens, index), config_of(objective, **knobs), totals=totals)[0]
    return loss.item(), torch.autograd.grad(loss, tokens.logprob)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_change_nothing(objective):
    tokens = batch_of(1)
    knobs = {"tis_cap": 1.5, "tis_floor": 0.5, "tis_level": tis_level(objective), "off_policy_mask_threshold": 0.01}
    whole = gradients(objective, tokens, [[0, 1, 2, 3, 4, 5]], **knobs)
    for groups in ([[s] for s in range(6)], [[3], [0, 5, 1, 4], [2]]):
        loss, gradient = gradients(objective, tokens, groups, **knobs)
        assert loss == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(gradient, whole[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_context_parallel_ranks_change_nothing(objective, monkeypatch):
    """Each response's tokens are dealt over two ranks, which share the numbers of the responses."""
    tokens = batch_of(2)
    config = config_of(
        objective, tis_cap=1.2, tis_level=tis_level(objective), tis_mode="mask", tis_floor=0.6,
        off_policy_mask_threshold=0.01,
    )  # fmt: skip
    totals = Totals(int(tokens.loss_mask.sum()), 6)
    loss, metrics = policy_loss(tokens, config, totals=totals)
    (whole,) = torch.autograd.grad(loss, tokens.logprob)
    ranks = ThreadRanks(2, monkeypatch)
    monkeypatch.setattr(sequences_module, "dist", ranks)

    def of_rank(rank):
        own = part(tokens, torch.arange(rank, len(tokens.loss_mask), 2))
        own.logprob = own.logprob.detach().requires_grad_()
        found, sums = policy_loss(own, config, totals=totals, sequences=SequenceIndex(own.sequence, 6, ranks))
        return found.item(), torch.autograd.grad(found, own.logprob)[0], sums

    (first, even, sums), (second, odd, others) = ranks.run(of_rank)
    assert first + second == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.stack([even, odd], 1).flatten(), whole, rtol=1e-12, atol=0)
    for name, value in metrics.items():
        assert float(sums[name] + others[name]) == pytest.approx(float(value), rel=1e-12), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_host_synchronisation_on_the_device_path(objective):
    """The code that any accelerator runs, on the device without data, backward included."""
    tokens = batch_of()
    meta = Tokens(**{name: value.to("meta") for name, value in vars(tokens).items() if value is not None})
    meta.logprob = meta.logprob.detach().requires_grad_()
    with NoHostRead():
        sequences, knobs = SequenceIndex(meta.sequence, 6), {"tis_cap": 2.0, "off_policy_mask_threshold": 0.1}
        config = config_of(objective, tis_level=tis_level(objective), **knobs)
        loss, metrics = policy_loss(meta, config, totals=Totals(22, 6), sequences=sequences)
        loss.backward()
    assert loss.is_meta and all(m.is_meta for m in metrics.values())


# ---- controls --------------------------------------------------------------------------------------------------------


class Fixed(Control):
    """A control with a given effect."""

    name = "fixed"

    def __init__(self, **effect):
        self.effect = effect

    def apply(self, tokens, selection):
        return Effect(**self.effect)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_multiplier_keep_and_penalty_act_on_every_objective(objective):
    """A multiplier by response is another advantage; what is not kept has no gradient and still counts."""
    tokens, config = batch_of(), config_of(objective)
    twice = 1.0 + tokens.sequence % 3
    keep = torch.arange(len(tokens.loss_mask)) % 3 > 0
    penalty = torch.where(tokens.loss_mask, tokens.logprob * 0.25, 0.0)
    controls = [Fixed(multiplier=twice, keep=keep), Fixed(penalty=penalty)]
    (got,) = torch.autograd.grad(policy_loss(tokens, config, controls=controls)[0], tokens.logprob)
    weight = torch.where(tokens.loss_mask, 0.25 / (6 * tokens.sequence_length.double()), 0.0)
    tokens.advantage = tokens.advantage * twice
    (own,) = torch.autograd.grad(policy_loss(tokens, config)[0], tokens.logprob)
    torch.testing.assert_close(got, torch.where(keep, own, 0.0) + weight, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_control_without_clip(objective):
    """Ratio 4, A = 1: -A r for ppo, the same gradient for cispo, gpg and dro have no clip, the others refuse it."""
    tokens = Tokens(
        torch.tensor([2 * LN2], requires_grad=True), torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool),
        sequence=torch.zeros(1, dtype=torch.int64), sequence_length=torch.ones(1, dtype=torch.int64),
    )  # fmt: skip
    config = PolicyLossConfig(**least(objective))
    if objective not in UNCLIPPED:
        with pytest.raises(
            ValueError, match=f"one of ppo, cispo, gpg, dro for a control that drops .* got {objective}"
        ):
            policy_loss(tokens, config, controls=[Fixed(unclipped=True)])
        return
    policy_loss(tokens, config, controls=[Fixed(unclipped=True)])[0].backward()
    expected = {"ppo": -4.0, "cispo": -4.0, "gpg": -1.0, "dro": 2 * LN2 - 1}
    assert tokens.logprob.grad.item() == pytest.approx(expected[objective])


@pytest.mark.parametrize(
    "control, objective, known",
    [
        (KLCov(), "gspo", "ppo, cispo, gpg, dro"),
        (KLCov(), "sapo", "ppo, cispo, gpg, dro"),
        (make_control("sent"), "geo_mean", "ppo, cispo, gpg, dro"),
        (ClipCov(semantics="reference"), "cispo", "ppo"),
        (ClipCov(semantics="reference"), "geo_mean", "ppo"),
        (KLCov(), "dppo_tv", "ppo, cispo, gpg, dro"),
    ],
)
def test_controls_that_do_not_go_with_the_objective(control, objective, known):
    tokens = batch_of()
    tokens.logprob = tokens.logprob.detach()
    config = PolicyLossConfig(**least(objective))
    with pytest.raises(ValueError, match=f"one of {known} for control {control.name} as it is set, got {objective}"):
        select([control], [tokens], step=0, config=config)
    for paper in (KLCov(semantics="paper"), ClipCov(semantics="paper", clip_cov_lb=-INF)):
        select([paper], [tokens], step=0, config=config)


# ---- knobs -----------------------------------------------------------------------------------------------------------

MEAN = {"aggregation": "seq-mean-token-mean"}


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"objective": "gpso"}, "objective must be one of ppo, ce_gppo, gspo.*got 'gpso'; did you mean gspo"),
        (
            {"objective": "gspo"},
            "aggregation must be seq-mean-token-mean or seq-mean-token-sum for objective gspo.*got token-mean",
        ),
        ({"objective": "geo_mean", "aggregation": "seq-mean-token-sum"}, "aggregation must be seq-mean-token-mean"),
        ({"objective": "gspo", "dual_clip": 3.0, **MEAN}, "dual_clip must be left at None: objective gspo .* got 3.0"),
        ({"objective": "sapo", "clip_low": 0.1}, "clip_low must be left at 0.2: objective sapo does not .* got 0.1"),
        ({"objective": "gpg", "clip_high": 0.28}, "clip_high must be left at 0.2: objective gpg .* got 0.28"),
        ({"ce_gppo_beta1": 0.5}, "ce_gppo_beta1 must be left at 0.75: objective ppo does not read it; got 0.5"),
        ({"objective": "ce_gppo", "ce_gppo_beta2": -1.0}, r"ce_gppo_beta2 must be in \[0, 10\], got -1.0"),
        ({"tau_neg": 1.1}, "tau_neg must be left at 1.05: objective ppo does not read it; got 1.1"),
        ({"objective": "sapo", "tau_pos": 0.0}, "tau_pos must be greater than 0, got 0.0"),
        ({"tis_floor": 0.5}, "tis_floor must be left at 0.0: there is no importance weight without tis_cap; got 0.5"),
        ({"tis_level": "sequence"}, "tis_level must be left at token: there is no importance weight"),
        ({"tis_cap": 2.0, "tis_level": "response"}, "tis_level must be one of token, sequence; got 'response'"),
        ({"tis_cap": 2.0, "tis_mode": "clip"}, "tis_mode must be one of truncate, mask; got 'clip'"),
        ({"tis_cap": 2.0, "tis_floor": 3.0}, r"tis_floor must be in \[0, 2\], got 3.0"),
        ({"objective": "dro"}, "dro_beta must be given for objective dro, got None"),
        ({"objective": "dro", "dro_beta": 0.0}, "dro_beta must be greater than 0, got 0.0"),
        ({"dro_beta": 0.1}, "dro_beta must be left at None: objective ppo does not read it; got 0.1"),
        ({"objective": "dppo_tv", "tau_pos": 2.0}, "tau_pos must be left at 1.0: objective dppo_tv does not read it"),
        ({"objective": "vespo", "vespo_lambda_pos": 0.0}, r"vespo_lambda_pos must be in \[0.0001, 100\], got 0.0"),
        ({"objective": "vespo", "vespo_k_neg": -1.0}, r"vespo_k_neg must be in \[0, 100\], got -1.0"),
        (
            {"objective": "vespo", "tis_cap": 2.0, "tis_level": "sequence"},
            "tis_level must be token for objective vespo",
        ),
        ({"objective": "geo_mean", "tis_cap": 2.0, **MEAN}, "tis_level must be sequence for objective geo_mean"),
    ],
)
def test_knobs_that_an_objective_does_not_read_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**knobs)


@pytest.mark.parametrize("field", ["sequence", "sequence_length"])
def test_missing_fields_are_named(field):
    tokens = batch_of()
    setattr(tokens, field, None)
    with pytest.raises(ValueError, match=f"tokens.{field} must be given, "):
        policy_loss(tokens, config_of("gspo"), totals=Totals(10, 6))
