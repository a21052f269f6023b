"""What a user of verl sets, and the controls and the loss that it stands for."""

import sys
from dataclasses import dataclass, field
from typing import Any, Optional

import verl
from verl.workers import config as verls

from entcov import arguments as check
from entcov.controls import CONTROLS, Control, check_composition, make_control
from entcov.controls.base import Effect, Selection
from entcov.controls.none import NoControl
from entcov.controls.published import PUBLISHED, preset
from entcov.integrations.verl.hooks import TESTED, check_hooked
from entcov.integrations.verl.loss import MODE, is_entcov
from entcov.objective.tokens import OBJECTIVE_KNOBS, Tokens
from entcov.objective.tokens import PolicyLossConfig as Loss

AT = "actor_rollout_ref.actor"
# Keys of verl's own PolicyLossConfig that a control reads where `controls` has no entry for it.
VERLS_KNOBS = {
    "clip_cov": ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
    "kl_cov": ("kl_cov_ratio", "ppo_kl_coef"),
}
# Keys of a published setting's loss -> keys of verl's actor.
VERLS_KEYS = {
    "clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high", "dual_clip": "clip_ratio_c", "kl_coef": "kl_loss_coef"
}  # fmt: skip
# Knobs of an objective that have a key of verl's.
ACTORS_KNOBS = ("clip_low", "clip_high", "dual_clip", "tau_pos", "tau_neg", "dro_beta")


@dataclass
class PolicyLossConfig(verls.PolicyLossConfig):
    """verl's configuration of the policy loss, with controls of entcov.

    actor_rollout_ref.actor.policy_loss._target_=entcov.integrations.verl.PolicyLossConfig

    loss_mode  "entcov": the controls of `controls` or of `preset`; "entcov_<control>": that one
    controls   knobs by the control's name, such as {"clip_cov": {"clip_cov_ratio": 1e-3}, "aent": {}}; a knob that is
               not named has the control's default
    preset     a published setting (docs/methods.md) in place of `controls`, with its objective. Its clip is the
               actor's: other values in clip_ratio_low, clip_ratio_high are an error.
    objective  "ppo" or another one of entcov/objective/objectives.py, with the actor's clip and tau_*, and dro_beta
    objective_knobs  what verl has no key for, such as {"ce_gppo_beta1": 0.5}

    Raises: ValueError or TypeError, when it is made, for an unknown control or knob, a value out of its range, and
        controls that make no sense together; RuntimeError where the plug-in could not hook into verl.
    """

    loss_mode: str = MODE
    controls: dict[str, Any] = field(default_factory=dict)
    preset: Optional[str] = None  # noqa: UP045  omegaconf reads the annotation
    objective: str = "ppo"
    objective_knobs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_entcov(self.loss_mode):
            raise ValueError(
                f"{AT}.policy_loss.loss_mode must be {MODE} or {MODE}_<control> with entcov's PolicyLossConfig, got "
                f"{self.loss_mode!r}"
            )
        check.one_of(f"{AT}.policy_loss.objective", self.objective, OBJECTIVE_KNOBS)
        controls_of(self)


def controls_of(policy_loss: verls.PolicyLossConfig) -> list[Control]:
    """New controls of a policy loss of entcov, verl's own class or ours; [] for "none"."""
    check_hooked()
    _check_version()
    entries = dict(policy_loss.get("controls") or {})
    named = policy_loss.get("preset")
    if named is not None:
        if entries or policy_loss.loss_mode != MODE:
            raise ValueError(
                f"{AT}.policy_loss.preset={named} must stand alone: with loss_mode={MODE} and without controls; got "
                f"loss_mode={policy_loss.loss_mode} and controls for {', '.join(entries) or 'nothing'}"
            )
        check.one_of(f"{AT}.policy_loss.preset", named, PUBLISHED)
        setting = preset(named)
        if "advantage" in setting:
            raise ValueError(
                f"{AT}.policy_loss.preset={named} cannot be had: it sets the advantage {setting['advantage']}, and "
                "verl's trainer computes the advantages (algorithm.adv_estimator)"
            )
        entries = {name: setting["controls"].get(name) for name in setting["control"]} or {"none": None}
    elif policy_loss.loss_mode != MODE:
        name = policy_loss.loss_mode.removeprefix(f"{MODE}_")
        check.one_of(f"the control in {AT}.policy_loss.loss_mode={policy_loss.loss_mode}", name, CONTROLS)
        if set(entries) - {name}:
            raise ValueError(
                f"{AT}.policy_loss.controls must have no other entry than {name} with loss_mode="
                f"{policy_loss.loss_mode}, got {', '.join(entries)}; loss_mode={MODE} takes all of them"
            )
        entries = entries or {name: {knob: policy_loss.get(knob) for knob in VERLS_KNOBS.get(name, ())}}
    if not entries:
        raise ValueError(
            f"{AT}.policy_loss must name a control with loss_mode={MODE}: in controls (of "
            "_target_=entcov.integrations.verl.PolicyLossConfig), by preset, or as loss_mode=entcov_<control>"
        )
    try:
        controls = [make_control(name, **(knobs or {})) for name, knobs in entries.items()]
        check_composition(controls)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{AT}.policy_loss.controls: {error}") from None
    for control in controls:
        if control.scope == "micro_batch":
            raise ValueError(
                f"{AT}.policy_loss.controls.{control.name}.scope must be global or rollout, got micro_batch: verl's "
                "own loss modes choose in each micro-batch"
            )
    return [control for control in controls if not isinstance(control, NoControl)]


def loss_of(actor: verls.ActorConfig) -> Loss:
    """The loss of entcov with the actor's clip and aggregation. Entropy bonus and KL of verl's keys are added by verl.

    Raises: ValueError that names the actor's key.
    """
    objective, own = _objective_of(actor.policy_loss)
    norm = "seq-mean-token-sum-norm"
    knobs = {
        "clip_low": actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
        "clip_high": actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
        "dual_clip": actor.clip_ratio_c,
        "tau_pos": actor.tau_pos,
        "tau_neg": actor.tau_neg,
    } | own
    if actor.loss_agg_mode == norm and actor.loss_scale_factor is None:
        raise ValueError(
            f"{AT}.loss_scale_factor must be set with loss_agg_mode={norm}, to data.max_response_length for verl's "
            "meaning of null; got null, which verl takes for the longest response of the micro-batch"
        )
    try:
        made = Loss(
            aggregation=actor.loss_agg_mode,
            max_response_length=actor.loss_scale_factor if actor.loss_agg_mode == norm else None,
            objective=objective,
            **{name: knobs[name] for name in OBJECTIVE_KNOBS[objective] if name in knobs},
        )
    except (TypeError, ValueError) as error:
        message = str(error)
        for ours, theirs in (*VERLS_KEYS.items(), ("aggregation", "loss_agg_mode")):
            message = message.replace(f"{ours} must", f"{theirs} must")
        raise type(error)(f"{AT}: {message}") from None
    _check_published(actor)
    return made


def _objective_of(policy_loss: verls.PolicyLossConfig) -> tuple[str, dict[str, Any]]:
    """The objective, and those of its knobs that are not the actor's."""
    objective, own = policy_loss.get("objective", "ppo"), dict(policy_loss.get("objective_knobs") or {})
    published = _published_loss(policy_loss)
    if "objective" in published:
        if objective not in ("ppo", published["objective"]):
            raise ValueError(
                f"{AT}.policy_loss.objective must be {published['objective']} with preset={policy_loss.preset}, got "
                f"{objective}"
            )
        objective = published["objective"]
        own = {name: value for name, value in published.items() if name not in VERLS_KEYS and name != "objective"} | own
    known = [name for name in OBJECTIVE_KNOBS[objective] if name not in ACTORS_KNOBS]
    for name in own:
        if name not in known:
            raise ValueError(
                f"{AT}.policy_loss.objective_knobs must hold knobs of objective {objective} that verl has no key for: "
                f"{', '.join(known) or 'it has none'}; got {name}"
            )
    return objective, {"dro_beta": policy_loss.dro_beta} | own


def _published_loss(policy_loss: verls.PolicyLossConfig) -> dict[str, Any]:
    """The keys of the loss that the preset sets."""
    name = policy_loss.get("preset")
    return {} if name is None else preset(name).get("loss", {})


def _check_published(actor: verls.ActorConfig) -> None:
    name, published = actor.policy_loss.get("preset"), _published_loss(actor.policy_loss)
    for ours, value in published.items():
        if ours not in VERLS_KEYS:
            continue
        got = actor.get(VERLS_KEYS[ours])
        if ours == "kl_coef" and not actor.use_kl_loss:
            got = 0.0
        if value is not None and got != value:
            needs = " and use_kl_loss=True" if ours == "kl_coef" else ""
            raise ValueError(
                f"{AT}.{VERLS_KEYS[ours]} must be {value:g}{needs} with policy_loss.preset={name}, as published; got "
                f"{got}. For another value set policy_loss.controls instead of preset"
            )


@dataclass
class RolloutWeights(Control):
    """verl's rollout_is_weights: importance weights of the tokens, which verl's trainer has computed."""

    name = "verl_rollout_is_weights"

    def __post_init__(self) -> None:
        self.weight = None  # [T] of the current micro-batch

    def apply(self, tokens: Tokens, selection: Selection | None) -> Effect:
        return Effect(multiplier=self.weight)


_warned = False


def _check_version() -> None:
    global _warned
    if verl.__version__ != TESTED and not _warned:
        _warned = True
        print(f"entcov: tested with verl {TESTED}, this is verl {verl.__version__}", file=sys.stderr, flush=True)
