"""The losses, KL forms, weights and advantages of the real verl package against ours, over random batches."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")

from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402
from verl.workers.config import FSDPActorConfig  # noqa: E402
from verl.workers.config import PolicyLossConfig as VerlLoss  # noqa: E402

from entcov.controls import ClipCov, KLCov, select  # noqa: E402
from entcov.objective.advantages import make_estimator  # noqa: E402
from entcov.objective.kl_in_reward import KLInReward  # noqa: E402
from entcov.objective.mismatch import RolloutRejection, importance_weight  # noqa: E402
from entcov.objective.policy_loss import kl_estimate, policy_loss  # noqa: E402
from entcov.objective.responses import Responses  # noqa: E402
from entcov.objective.tokens import AGGREGATIONS, KL_ESTIMATORS, PolicyLossConfig, Totals  # noqa: E402
from tests.support.padded_batch import PaddedBatch, assert_same_loss  # noqa: E402

SEEDS = range(20)
MEAN = "seq-mean-token-mean"
# verl's loss_mode: (our objective, knobs that mean the same on both sides as (verl's actor, ours), aggregations)
MODES = {
    "vanilla": ("ppo", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5}, AGGREGATIONS),
    "dppo_tv": ("dppo_tv", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.2}, AGGREGATIONS),
    "dppo_kl": ("dppo_kl", {"clip_ratio_low": 0.001, "clip_ratio_high": 0.002, "clip_ratio_c": 1.2}, AGGREGATIONS),
    "gspo": ("gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}, (MEAN, "seq-mean-token-sum")),
    "sapo": ("sapo", {"tau_pos": 1.3, "tau_neg": 2.0}, (MEAN,)),
    "gpg": ("gpg", {}, AGGREGATIONS),
    "geo_mean": ("geo_mean", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}, (MEAN,)),
    "dro": ("dro", {"dro_beta": 0.3}, AGGREGATIONS),
    "cispo": ("cispo", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}, AGGREGATIONS),
}
OUR_NAME = {"clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high", "clip_ratio_c": "dual_clip"}


def actor(aggregation="token-mean", *, scale=None, totals=None, policy_loss=None, **knobs):
    """verl's configuration of the actor, with the mini-batch's denominators where `totals` has them."""
    info = {"loss_scale_factor": scale}
    if totals is not None:
        info |= {"batch_num_tokens": totals.num_tokens, "global_batch_size": totals.num_sequences}
    return FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation,
        policy_loss=policy_loss or VerlLoss(), global_batch_info=info, **knobs,
    )  # fmt: skip


def verl_loss(mode, batch, config, weights=None):
    loss = core_algos.get_policy_loss_fn(mode)
    return loss(batch.old_logprob, batch.logprob, batch.advantage, batch.mask, config.loss_agg_mode, config, weights)


def ours(objective, aggregation, knobs, **more):
    length = 9 if aggregation == "seq-mean-token-sum-norm" else None
    knobs = {OUR_NAME.get(name, name): value for name, value in knobs.items()}
    return PolicyLossConfig(objective=objective, aggregation=aggregation, max_response_length=length, **knobs, **more)


def test_every_mode_of_verl_is_compared():
    others = {"clip_cov", "kl_cov", "bypass_mode"}  # below
    plugged = {name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("entcov")}
    assert set(core_algos.POLICY_LOSS_REGISTRY) - plugged == set(MODES) | others


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mode, aggregation", [(m, a) for m, (_, _, modes) in MODES.items() for a in modes])
def test_losses(mode, aggregation, weighted):
    """Value, gradient, and the metrics of the clip; the mini-batch has more tokens and responses than the batch."""
    objective, knobs, _ = MODES[mode]
    level = "sequence" if mode == "geo_mean" else "token"
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        totals = None if mode == "geo_mean" else Totals(int(batch.mask.sum()) + 17, len(batch.mask) + 3)
        config = ours(objective, aggregation, knobs, **({"tis_cap": 1.2, "tis_level": level} if weighted else {}))
        tokens, weights = batch.tokens(), None
        if weighted:
            index = SimpleNamespace(
                sum=lambda x, b=batch: x.view(b.mask.shape).sum(1, True).expand(b.mask.shape).flatten()
            )
            weights = importance_weight(tokens.masked(), config, index)[0].view(batch.mask.shape)
        scale = 9 if aggregation == "seq-mean-token-sum-norm" else None
        theirs = actor(
            aggregation, scale=scale, totals=totals, policy_loss=VerlLoss(dro_beta=knobs.get("dro_beta")),
            **{name: value for name, value in knobs.items() if name != "dro_beta"},
        )  # fmt: skip
        expected, their_metrics = verl_loss(mode, batch, theirs, weights)
        loss, metrics = policy_loss(tokens, config, totals=totals)
        assert_same_loss(loss, expected, batch.logprob)
        share = 1 if totals is None else totals.num_tokens / int(batch.mask.sum())  # ours are of the mini-batch
        for name in set(metrics) & set(their_metrics) - (
            {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"} if mode == "geo_mean" else set()
        ):
            assert float(metrics[name]) * share == pytest.approx(their_metrics[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fully_masked_responses_count_where_the_trainer_says_so(aggregation):
    """verl's global_batch_size counts them; alone verl counts the others, as ours."""
    batch = PaddedBatch.random(1)
    batch.mask[2] = batch.mask[7] = False
    scale = 9 if aggregation == "seq-mean-token-sum-norm" else None
    for totals in (None, Totals(int(batch.mask.sum()), len(batch.mask))):
        expected, _ = verl_loss("gpg", batch, actor(aggregation, scale=scale, totals=totals))
        loss, _ = policy_loss(batch.tokens(), ours("gpg", aggregation, {}), totals=totals)
        assert_same_loss(loss, expected, batch.logprob)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_kl_forms(name, plus):
    """Every name of verl's kl_penalty, and far out, where the bounds act; "k2+" is k2."""
    own = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)
    own += plus if own != "k2" else ""
    assert own in KL_ESTIMATORS
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        reference = batch.ref_logprob + (torch.arange(9) - 4) * (seed % 3) * 3.0
        expected = core_algos.kl_penalty(batch.logprob, reference, name + plus)
        got = kl_estimate(batch.logprob, reference, own)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert_same_loss(got.sum(), expected.sum(), batch.logprob, rel=1e-12)


# ---- the controls that verl has --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.02, 0.2, 0.5])
def test_clip_cov_given_the_same_draw(ratio, monkeypatch):
    """verl draws by torch.randperm over the candidates in their order; here that draw takes ours first."""
    control = ClipCov(clip_cov_ratio=ratio, clip_cov_lb=0.05, clip_cov_ub=1.0, semantics="reference")
    config = PolicyLossConfig(clip_low=0.4, clip_high=0.5)
    chosen_in_all = 0
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        tokens = batch.tokens()
        detached = PaddedBatch(**{n: v.detach() for n, v in vars(batch).items()}).tokens()
        ((selection,),), _ = select([control], [detached], step=seed, config=config)
        loss, metrics = policy_loss(tokens, config, controls=[control], selections=[selection])

        logprob, advantage, mask = batch.logprob.detach(), batch.advantage, batch.mask
        centred = [x - x[mask].mean() for x in (logprob, advantage)]
        ratios = (logprob - batch.old_logprob).exp()
        stopped = -advantage * ratios.clamp(0.6, 1.5) > -advantage * ratios
        covariance = centred[0] * centred[1]
        candidates = (mask & ~stopped & (covariance > 0.05) & (covariance < 1.0)).flatten().nonzero().flatten()
        first = torch.isin(candidates, selection.mask.nonzero().flatten())

        def draw(n, first=first):
            assert n == len(first)  # verl has the same candidates
            return torch.cat([first.nonzero().flatten(), (~first).nonzero().flatten()])

        monkeypatch.setattr(torch, "randperm", draw)
        knobs = VerlLoss(clip_cov_ratio=ratio, clip_cov_lb=0.05, clip_cov_ub=1.0)
        theirs = actor(policy_loss=knobs, clip_ratio_low=0.4, clip_ratio_high=0.5)
        expected, their_metrics = verl_loss("clip_cov", batch, theirs)
        monkeypatch.undo()
        assert_same_loss(loss, expected, batch.logprob)
        # verl's actor/pg_clipfrac is the share of dropped tokens here
        assert float(metrics["actor/cov_clipfrac"]) == pytest.approx(their_metrics["actor/pg_clipfrac"], rel=1e-6)
        chosen_in_all += int(selection.mask.sum())
    assert chosen_in_all >= 20


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5])
def test_kl_cov(ratio):
    control = KLCov(kl_cov_ratio=ratio, ppo_kl_coef=0.7)
    config = PolicyLossConfig()
    theirs = actor(policy_loss=VerlLoss(kl_cov_ratio=ratio, ppo_kl_coef=0.7))
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        detached = PaddedBatch(**{n: v.detach() for n, v in vars(batch).items()}).tokens()
        ((selection,),), _ = select([control], [detached], step=0, config=config)
        loss, _ = policy_loss(batch.tokens(), config, controls=[control], selections=[selection])
        assert int(selection.mask.sum()) == max(1, int(ratio * int(batch.mask.sum())))
        assert_same_loss(loss, verl_loss("kl_cov", batch, theirs)[0], batch.logprob)


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_verl_does_not_bound_the_log_ratio_in_these_modes(mode):
    """One punished token of four at log ratio 25: verl's loss is e^25 / 4 = 1.8e10, ours e^20 / 4; dual clip: 3 / 4."""
    batch = PaddedBatch.random(0, groups=1, group_size=1, longest=4)
    batch.mask[:] = True
    batch.old_logprob = batch.logprob.detach().clone()
    batch.old_logprob[0, 1] -= 25.0
    batch.advantage = torch.tensor([[0.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    control = {"clip_cov": ClipCov(semantics="reference"), "kl_cov": KLCov(ppo_kl_coef=0.0)}[mode]
    expected, _ = verl_loss(mode, batch, actor(policy_loss=VerlLoss(ppo_kl_coef=0.0)))
    assert expected.item() == pytest.approx(math.exp(25) / 4) and 1.79e10 < expected.item() < 1.81e10
    tokens = batch.tokens()
    tokens.logprob = tokens.logprob.detach()
    for dual_clip, bound in ((None, math.exp(20)), (3.0, 3.0 if mode == "clip_cov" else math.exp(20))):
        config = PolicyLossConfig(dual_clip=dual_clip)
        ((selection,),), _ = select([control], [tokens], step=0, config=config)
        loss, _ = policy_loss(tokens, config, controls=[control], selections=[selection])
        assert loss.item() == pytest.approx(bound / 4)


# ---- sampler and trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold, knobs", [(1.2, {}), ("0.7_1.3", {"tis_floor": 0.7, "tis_mode": "mask"})])
def test_importance_weights(level, threshold, knobs):
    """rollout_is and rollout_is_threshold; a pair of thresholds is verl's IcePop and our mode "mask"."""
    cap = 1.2 if threshold == 1.2 else 1.3
    config = PolicyLossConfig(tis_cap=cap, tis_level=level, objective="gpg", aggregation="token-sum", **knobs)
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        weights, metrics = rollout_corr_helper.compute_rollout_correction_weights(
            batch.old_logprob - batch.rollout_logprob, batch.mask.double(), level, threshold
        )
        loss, our_metrics = policy_loss(batch.tokens(), config)
        assert_same_loss(loss, -(weights * batch.advantage * batch.logprob)[batch.mask].sum(), batch.logprob)
        if knobs:
            assert float(our_metrics["actor/tis_capfrac"]) == pytest.approx(metrics["rollout_is_oob_ratio"], abs=1e-6)


@pytest.mark.parametrize(
    "theirs, level", [("token_k1", "token"), ("seq_sum_k1", "sequence"), ("seq_mean_k1", "geometric")]
)
def test_rejection(theirs, level):
    """verl's bounds are of the inverse ratio: "0.5_4" there is low 1/4 and high 2 here."""
    rejected_in_all = 0
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        tokens = batch.tokens()
        tokens.logprob = tokens.logprob.detach()
        low, high = (0.8, 1.3) if level != "sequence" else (0.5, 2.0)
        kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(
            batch.old_logprob - batch.rollout_logprob, batch.mask.double(), theirs, f"{low}_{high}"
        )
        rejected = RolloutRejection(level, low=1 / high, high=1 / low).rejected(tokens).view(batch.mask.shape)
        assert torch.equal(batch.mask & ~rejected, kept.bool())
        rejected_in_all += int(rejected.sum())
    assert 20 < rejected_in_all < 1500


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize(
    "theirs, level, high",
    [("token", "token", 0.1), ("seq_sum", "sequence", 0.3), ("seq_mean", "geometric", 0.05), ("seq_max", "max", 0.15)],
)
def test_rejection_by_divergence(theirs, level, high, estimator):
    rejected_in_all = 0
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        tokens = batch.tokens()
        tokens.logprob = tokens.logprob.detach()
        kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(
            batch.old_logprob - batch.rollout_logprob, batch.mask.double(), f"{theirs}_{estimator}", high
        )
        rejected = RolloutRejection(level, high=high, estimator=estimator).rejected(tokens).view(batch.mask.shape)
        assert torch.equal(batch.mask & ~rejected, kept.bool())
        rejected_in_all += int(rejected.sum())
    assert 20 < rejected_in_all < 1200


@pytest.mark.parametrize("mode", ["ppo_clip", "reinforce"])
def test_bypass_mode(mode):
    """Without a second forward pass old_logprob is the sampler's; "reinforce" with a token weight is cispo then."""
    correction = {"loss_type": mode, "rollout_is": "token", "rollout_is_threshold": 1.4, "rollout_rs": None}
    if mode == "ppo_clip":
        config = PolicyLossConfig(dual_clip=3.0)
    else:
        config = PolicyLossConfig(objective="cispo", clip_low=1.0, clip_high=0.4)
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        knobs = VerlLoss(loss_mode="bypass_mode", rollout_correction=correction)
        expected, _ = verl_loss("bypass_mode", batch, actor(policy_loss=knobs))
        assert_same_loss(policy_loss(batch.tokens(), config)[0], expected, batch.logprob)


def test_kl_controller():
    theirs = core_algos.AdaptiveKLController(init_kl_coef=0.2, target_kl=0.1, horizon=1000)
    own, coef = KLInReward(coef=0.2, target=0.1, horizon=1000), 0.2
    for kl in (0.05, 0.11, 0.4, 0.1, 0.119):
        theirs.update(current_kl=kl, n_steps=64)
        coef = own.adapted(coef, kl, 64)
        assert coef == pytest.approx(theirs.value, rel=1e-12)


# ---- advantages ------------------------------------------------------------------------------------------------------


class Algorithm(dict):
    """verl's configuration of the algorithm: attributes and `get`."""

    __getattr__ = dict.__getitem__


def verl_advantage(name, padded, reward, **more):
    """[B, L] of the estimator `name` for one reward a response, given at its last token."""
    rewards = torch.zeros_like(padded.old_logprob)
    rewards[torch.arange(len(reward)), padded.length - 1] = reward.double()
    return core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=padded.mask.double(), **more
    )[0]


def random_rewards(seed, batch):
    """float32; a few values, so that some are equal, and no group of equal ones."""
    g = torch.Generator().manual_seed(1000 + seed)
    reward = torch.randint(0, 4, (len(batch.mask),), generator=g) / 4.0
    reward[::4], reward[1::4] = 0.25, 1.0
    return reward + (seed % 2)


ESTIMATORS = {
    "grpo": ("grpo", {}, {}),
    "grpo_vectorized": ("grpo", {}, {}),
    "grpo without std": ("dr_grpo", {}, {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}, {}),
    "rloo_vectorized": ("rloo", {}, {}),
    "reinforce_plus_plus": ("reinforce_pp", {}, {"config": Algorithm(gamma=1.0)}),
    "reinforce_plus_plus_baseline": ("reinforce_pp_baseline", {}, {}),
    "opo": ("opo", {}, {}),
    "gpg": ("gpg", {"semantics": "reference"}, {}),
    "grpo_passk": ("grpo_passk", {}, {"config": Algorithm(norm_adv_by_std_in_grpo=True)}),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages(name):
    own, knobs, more = ESTIMATORS[name]
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        reward = random_rewards(seed, batch)
        if name != "reinforce_plus_plus":
            more = more | {"index": batch.group.numpy()}
        theirs = verl_advantage(name.split(" ")[0], batch, reward, **more)
        if name == "grpo_passk":  # where the best is not alone, verl chooses one of them with advantage 0: the same
            assert (theirs[:, 0] != 0).sum() <= 3
        value = make_estimator(own, **knobs)(Responses.of(reward, batch.group, batch.length)).value
        torch.testing.assert_close(
            value.double()[:, None].expand_as(theirs)[batch.mask], theirs[batch.mask], rtol=2e-6, atol=2e-6
        )


def test_remax():
    batch = PaddedBatch.random(0)
    reward, baseline = random_rewards(0, batch), random_rewards(3, batch)
    theirs = verl_advantage("remax", batch, reward, reward_baselines=baseline.double())
    table = Responses.of(reward, batch.group, batch.length)
    table.baseline = baseline
    value = make_estimator("remax")(table).value
    assert torch.equal(value.double()[:, None].expand_as(theirs)[batch.mask], theirs[batch.mask])


@pytest.mark.parametrize("weights", [None, {"right": 2.0, "format": 0.5}])
def test_gdpo(weights):
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        parts = {"right": random_rewards(seed, batch), "format": random_rewards(seed + 50, batch)}
        prompts = torch.zeros(len(batch.mask), 2)
        attention = torch.cat([torch.ones_like(prompts), batch.mask], 1).long()
        theirs = verl_advantage(
            "gdpo", batch, parts["right"] + parts["format"], index=batch.group.numpy(),
            config=Algorithm(gdpo_reward_keys=list(parts), gdpo_reward_weights=weights and list(weights.values())),
            non_tensor_batch={name: value.numpy() for name, value in parts.items()},
            batch={"prompts": prompts, "attention_mask": attention},
        )  # fmt: skip
        table = Responses.of(parts["right"] + parts["format"], batch.group, batch.length)
        table.components = parts
        value = make_estimator("gdpo", weights=weights)(table).value
        torch.testing.assert_close(
            value.double()[:, None].expand_as(theirs)[batch.mask], theirs[batch.mask].double(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("tail", [False, True])
def test_optimal_token_baseline(tail):
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        reward = random_rewards(seed, batch)
        collision = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theirs = verl_advantage(
            "optimal_token_baseline", batch, reward, index=batch.group.numpy(), old_log_probs=batch.old_logprob,
            sum_pi_squared=collision, handle_zero_tail=tail,
        )  # fmt: skip
        tokens = batch.tokens()
        tokens.logprob, tokens.collision = tokens.old_logprob, collision.flatten()
        fields = {name: value[batch.mask.flatten()] for name, value in vars(tokens).items() if value is not None}
        table = Responses.of(reward, batch.group, batch.length)
        value = make_estimator("optimal_token_baseline", handle_zero_tail=tail)(table, type(tokens)(**fields)).value
        torch.testing.assert_close(value.double(), theirs[batch.mask], rtol=2e-6, atol=2e-6)


def test_a_group_of_equal_rewards():
    """verl's sums of float32 rewards may leave a rest, which is divided by 1e-6; ours is 0."""
    largest = 0.0
    for size in range(3, 17):
        reward = torch.full((size,), 0.7)
        theirs, _ = core_algos.compute_grpo_outcome_advantage(reward[:, None].clone(), torch.ones(size, 1), [0] * size)
        largest = max(largest, float(theirs.abs().max()))
        assert not make_estimator("grpo")(
            Responses.of(reward, torch.zeros(size).long(), torch.ones(size).long())
        ).value.any()
    assert 1e-3 < largest < 0.2
