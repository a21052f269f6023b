"""What a user types: keys on verl's command line, through hydra and verl's validation, and errors that name them."""

import math
import sys
from functools import partial

import pytest

pytest.importorskip("verl")

from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate

from tests.integrations.verl.worker import make_worker, policy_loss_config, rollout, score, train

ACTOR = "actor_rollout_ref.actor"
OURS = f"{ACTOR}.policy_loss._target_=entcov.integrations.verl.PolicyLossConfig"
TRAINERS = ["ppo_trainer", "ppo_megatron_trainer"]


@pytest.fixture(scope="module", autouse=True)
def started(model):
    """verl on a CPU, before its modules are imported."""


def composed(overrides, trainer="ppo_trainer"):
    common = [f"{ACTOR}.ppo_micro_batch_size_per_gpu=1"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(trainer, overrides=common + overrides)


def actor_of(*overrides, trainer="ppo_trainer"):
    """The actor's configuration as verl's driver and workers build it."""
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(composed(list(overrides), trainer).actor_rollout_ref.actor)


def controls(actor):
    from entcov.integrations.verl.config import controls_of

    return {control.name: control for control in controls_of(actor.policy_loss)}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_key_is_enough(trainer):
    found = controls(actor_of(f"{ACTOR}.policy_loss.loss_mode=entcov_clip_cov", trainer=trainer))
    assert found["clip_cov"].clip_cov_ratio == 2e-4 and found["clip_cov"].clip_cov_ub == 5.0
    keys = [f"{ACTOR}.policy_loss.loss_mode=entcov_kl_cov", f"{ACTOR}.policy_loss.ppo_kl_coef=0.5"]
    assert controls(actor_of(*keys, trainer=trainer))["kl_cov"].ppo_kl_coef == 0.5
    assert list(controls(actor_of(f"{ACTOR}.policy_loss.loss_mode=entcov_aent", trainer=trainer))) == ["aent"]
    assert controls(actor_of(f"{ACTOR}.policy_loss.loss_mode=entcov_none", trainer=trainer)) == {}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_controls_with_knobs(trainer):
    from entcov.integrations.verl import PolicyLossConfig

    actor = actor_of(
        OURS, f"{ACTOR}.policy_loss.loss_mode=entcov", f"+{ACTOR}.policy_loss.controls.clip_cov.clip_cov_ratio=1e-3",
        f"+{ACTOR}.policy_loss.controls.aent={{clamp_p: 0.25, warmup: 5}}", trainer=trainer,
    )  # fmt: skip
    assert type(actor.policy_loss) is PolicyLossConfig
    found = controls(actor)
    assert found["clip_cov"].clip_cov_ratio == 1e-3 and found["aent"].clamp_p == 0.25 and found["aent"].warmup == 5


def test_knobs_of_the_named_mode():
    actor = actor_of(
        OURS, f"{ACTOR}.policy_loss.loss_mode=entcov_entropic", f"+{ACTOR}.policy_loss.controls.entropic.target=0.3"
    )
    assert controls(actor)["entropic"].target == 0.3


def test_clip_and_aggregation_are_the_actors():
    from entcov.integrations.verl.config import loss_of

    keys = ["clip_ratio_low=0.1", "clip_ratio_high=0.28", "clip_ratio_c=10", "loss_agg_mode=seq-mean-token-sum-norm"]
    keys += ["policy_loss.loss_mode=entcov_none"]
    loss = loss_of(actor_of(*(f"{ACTOR}.{key}" for key in keys), f"{ACTOR}.loss_scale_factor=1024"))
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.1, 0.28, 10.0)
    assert (loss.aggregation, loss.max_response_length) == ("seq-mean-token-sum-norm", 1024)
    with pytest.raises(ValueError, match=f"{ACTOR}.loss_scale_factor must be set"):
        loss_of(actor_of(*(f"{ACTOR}.{key}" for key in keys)))
    summed = actor_of(f"{ACTOR}.loss_agg_mode=token-sum", f"{ACTOR}.policy_loss.loss_mode=entcov_none")
    assert loss_of(summed).aggregation == "token-sum"
    gspo = [OURS, f"{ACTOR}.policy_loss.loss_mode=entcov_none", f"+{ACTOR}.policy_loss.objective=gspo"]
    with pytest.raises(
        ValueError, match=f"{ACTOR}: loss_agg_mode must be seq-mean-token-mean or seq-mean-token-sum for"
    ):
        loss_of(actor_of(*gspo, f"{ACTOR}.loss_agg_mode=token-mean"))
    with pytest.raises(ValueError, match=f"{ACTOR}: clip_ratio_low must be in"):
        loss_of(actor_of(f"{ACTOR}.clip_ratio_low=20", f"{ACTOR}.policy_loss.loss_mode=entcov_none"))


def test_another_objective():
    from entcov.integrations.verl.config import loss_of

    keys = [OURS, f"{ACTOR}.policy_loss.loss_mode=entcov", f"+{ACTOR}.policy_loss.controls.clip_cov={{}}"]
    assert loss_of(actor_of(*keys, f"+{ACTOR}.policy_loss.objective=cispo")).objective == "cispo"
    sapo = loss_of(actor_of(*keys, f"+{ACTOR}.policy_loss.objective=sapo", f"{ACTOR}.tau_neg=1.2"))
    assert sapo.tau_neg == 1.2 and sapo.dual_clip is None
    with pytest.raises(ValueError, match=f"{ACTOR}: dro_beta must be given for objective dro, got None"):
        loss_of(actor_of(*keys, f"+{ACTOR}.policy_loss.objective=dro"))
    dro = loss_of(actor_of(*keys, f"+{ACTOR}.policy_loss.objective=dro", f"{ACTOR}.policy_loss.dro_beta=0.3"))
    assert dro.dro_beta == 0.3


def test_knobs_of_an_objective_that_verl_has_no_key_for():
    from entcov.integrations.verl.config import loss_of

    keys = [OURS, f"{ACTOR}.policy_loss.loss_mode=entcov_none"]
    at = f"+{ACTOR}.policy_loss.objective"
    assert loss_of(actor_of(*keys, f"{at}=vespo")).vespo_k_pos == 2.0
    gppo = loss_of(actor_of(*keys, f"{at}=ce_gppo", f"{at}_knobs.ce_gppo_beta1=0.5", f"{ACTOR}.clip_ratio_c=10"))
    assert (gppo.objective, gppo.ce_gppo_beta1, gppo.ce_gppo_beta2, gppo.dual_clip) == ("ce_gppo", 0.5, 1.0, 10.0)
    for objective, name, known in (
        ("ce_gppo", "beta1", "ce_gppo_beta1, ce_gppo_beta2"),
        ("ppo", "tau_pos", "it has none"),
    ):
        with pytest.raises(
            ValueError, match=f"objective_knobs must hold knobs of objective {objective} .*{known}; got {name}"
        ):
            loss_of(actor_of(*keys, f"{at}={objective}", f"{at}_knobs.{name}=0.5"))
    with pytest.raises(ValueError, match=f"{ACTOR}: ce_gppo_beta1 must be in"):
        loss_of(actor_of(*keys, f"{at}=ce_gppo", f"{at}_knobs.ce_gppo_beta1=-1"))


def test_published_presets():
    from entcov.integrations.verl.config import loss_of

    keys = [OURS, f"{ACTOR}.policy_loss.loss_mode=entcov"]
    clip = [f"{ACTOR}.clip_ratio_low=1.0", f"{ACTOR}.clip_ratio_high=1.0"]
    actor = actor_of(*keys, f"+{ACTOR}.policy_loss.preset=clip_cov", *clip)
    assert controls(actor)["clip_cov"].clip_cov_ratio == 2e-4 and loss_of(actor).clip_low == 1.0
    assert controls(actor_of(*keys, f"+{ACTOR}.policy_loss.preset=clip_higher")) == {}
    gppo = [f"+{ACTOR}.policy_loss.preset=ce_gppo", f"{ACTOR}.clip_ratio_c=10.0"]
    loss = loss_of(actor_of(*keys, *gppo))
    assert (loss.objective, loss.ce_gppo_beta1, loss.clip_high, loss.dual_clip) == ("ce_gppo", 0.75, 0.2, 10.0)
    assert (
        loss_of(actor_of(*keys, *gppo, f"+{ACTOR}.policy_loss.objective_knobs.ce_gppo_beta1=0.5")).ce_gppo_beta1 == 0.5
    )
    with pytest.raises(ValueError, match="policy_loss.objective must be ce_gppo with preset=ce_gppo, got cispo"):
        loss_of(actor_of(*keys, *gppo, f"+{ACTOR}.policy_loss.objective=cispo"))
    with pytest.raises(Exception, match="preset=qae cannot be had: it sets the advantage qae, and verl's trainer"):
        actor_of(*keys, f"+{ACTOR}.policy_loss.preset=qae")
    for preset, key in (("clip_cov", "clip_ratio_low must be 1 "), ("sent", "kl_loss_coef must be 0.001 and use_kl_")):
        with pytest.raises(ValueError, match=f"{ACTOR}.{key}.*with policy_loss.preset={preset}"):
            loss_of(actor_of(*keys, f"+{ACTOR}.policy_loss.preset={preset}"))


WRONG = {
    "unknown control": ({"controls": {"clip_covv": {}}}, "clip_covv.*did you mean clip_cov"),
    "unknown control in the mode": ({"loss_mode": "entcov_clip", "controls": {}}, "loss_mode=entcov_clip must be one"),
    "unknown knob": ({"controls": {"aent": {"clamp": 0.3}}}, "policy_loss.controls: control aent has no knob 'clamp'"),
    "value out of range": ({"controls": {"clip_cov": {"clip_cov_ratio": 20}}}, "clip_cov_ratio must be in"),
    "two targets": ({"controls": {"aent": {}, "adaptive_bonus": {}}}, "aent and adaptive_bonus both set"),
    "scope": ({"controls": {"clip_cov": {"scope": "micro_batch"}}}, "clip_cov.scope must be global or rollout"),
    "nothing": ({"controls": {}}, "must name a control with loss_mode=entcov"),
    "mode": ({"loss_mode": "vanilla", "controls": {}}, "loss_mode must be entcov or entcov_<control>.*'vanilla'"),
    "other entries": ({"loss_mode": "entcov_aent", "controls": {"sent": {}}}, "no other entry than aent"),
    "preset": ({"preset": "clip_coov"}, "policy_loss.preset must be one of.*did you mean clip_cov"),
    "preset and controls": ({"preset": "clip_cov", "controls": {"aent": {}}}, "preset=clip_cov must stand alone"),
    "objective": ({"objective": "ppoo", "controls": {"aent": {}}}, "policy_loss.objective must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_where_the_configuration_is_made(name):
    keys, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        policy_loss_config(keys)


def test_a_wrong_knob_stops_verls_own_validation_with_its_name():
    from verl.utils.config import validate_config

    good = [
        OURS,
        f"{ACTOR}.policy_loss.loss_mode=entcov",
        f"+{ACTOR}.policy_loss.controls.clip_cov.clip_cov_ratio=1e-3",
    ]
    more = ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1", "trainer.n_gpus_per_node=1"]
    check = partial(validate_config, use_reference_policy=False, use_critic=False)
    for trainer in TRAINERS:
        check(composed(good + more, trainer))
        with pytest.raises(Exception, match="clip_cov has no knob 'ratio'"):
            check(composed([*good, *more, f"+{ACTOR}.policy_loss.controls.clip_cov.ratio=1e-3"], trainer))
    with pytest.raises(ConfigCompositionException):  # verl's own class takes no other key
        composed([f"{ACTOR}.policy_loss.clip_cov=1"])


def test_the_class_is_what_hydra_names():
    made = instantiate({"_target_": "entcov.integrations.verl.PolicyLossConfig", "controls": {"aent": {}}})
    assert made.loss_mode == "entcov" and made.get("clip_cov_ratio") == 0.0002


def test_a_wrong_control_in_a_mode_of_verls_class_stops_the_worker(model):
    with pytest.raises(ValueError, match="loss_mode=entcov_klcov must be one of.*did you mean kl_cov"):
        make_worker(model, policy_loss=policy_loss_config({"loss_mode": "entcov_klcov"}))


def test_another_loss_function_or_engine_is_refused(model, monkeypatch):
    from verl.workers.utils.losses import sft_loss

    worker = make_worker(model, policy_loss=policy_loss_config({"loss_mode": "entcov_aent"}))
    actor = worker.loss_fn.keywords["config"]
    with pytest.raises(RuntimeError, match="works with verl's ppo_loss, got <function sft_loss"):
        worker.set_loss_fn(partial(sft_loss, config=actor))
    monkeypatch.setattr(worker, "engine", object())
    with pytest.raises(RuntimeError, match="works with verl's FSDPEngineWithLMHead and Megatron.*got object"):
        worker.set_loss_fn(worker.loss_fn)


def test_steps_of_the_run_must_be_known(model):
    worker = make_worker(model)
    object.__setattr__(worker.optimizer_config, "total_training_steps", -1)
    entcov = make_worker(model, policy_loss=policy_loss_config({"loss_mode": "entcov_aent"}))
    with pytest.raises(ValueError, match=f"{ACTOR}.optim.total_training_steps must be at least 1"):
        worker.set_loss_fn(entcov.loss_fn)


def test_a_field_that_does_not_reach_the_worker_is_named(model):
    worker = make_worker(model, policy_loss=policy_loss_config({"controls": {"clip_b": {}}}))
    batch = rollout()
    score(worker, batch)
    del batch.columns["token_level_scores"]
    with pytest.raises(ValueError, match="the rollout must have reward, which comes from token_level_scores.*clip_b"):
        train(worker, batch)
    skywork = make_worker(model, policy_loss=policy_loss_config({"controls": {"adaptive_bonus": {}}}))
    skywork.train_mini_batch(batch.local(mini_batch_size=8, compute_loss=True))  # it reads the rollout's mean entropy
    assert skywork.engine.training.controlled.begins and skywork.engine.training.state_dict()["step"] == 1
    with pytest.raises(RuntimeError, match="need TrainingWorker.train_mini_batch"):
        worker.train_batch(batch.local())


def test_a_mini_batch_without_finite_values_stops_the_run(model):
    worker = make_worker(model, policy_loss=policy_loss_config({"loss_mode": "entcov_clip_cov"}))
    batch = rollout()
    score(worker, batch)
    batch.columns["advantages"][2] = math.nan
    with pytest.raises(ValueError, match="advantage must be finite"):
        train(worker, batch)


def test_another_version_of_verl_is_said_once(monkeypatch, capsys):
    import verl

    import entcov.integrations.verl.config as config

    monkeypatch.setattr(verl, "__version__", "0.8.0")
    monkeypatch.setattr(config, "_warned", False)
    for _ in range(2):
        policy_loss_config({"controls": {"aent": {}}})
    assert capsys.readouterr().err == "entcov: tested with verl 0.9.1, this is verl 0.8.0\n"
    assert "verl.workers.engine_workers" in sys.modules
