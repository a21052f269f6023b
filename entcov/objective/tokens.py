"""What the policy loss and the entropy controls are given: tokens, the mini-batch's totals, the loss's knobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from entcov import arguments as check

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
# The knobs that each objective of entcov/objective/objectives.py reads; it refuses the others.
OBJECTIVE_KNOBS = {
    "ppo": ("clip_low", "clip_high", "dual_clip"),
    "ce_gppo": ("clip_low", "clip_high", "dual_clip", "ce_gppo_beta1", "ce_gppo_beta2"),
    "gspo": ("clip_low", "clip_high"),
    "geo_mean": ("clip_low", "clip_high"),
    "cispo": ("clip_low", "clip_high"),
    "sapo": ("tau_pos", "tau_neg"),
    "gpg": (),
    "dro": ("dro_beta",),
    "dppo_tv": ("clip_low", "clip_high", "dual_clip"),
    "dppo_kl": ("clip_low", "clip_high", "dual_clip"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
SEQUENCE_OBJECTIVES = ("gspo", "geo_mean", "vespo")  # their weight is one number a response
# The published aggregations of those that are a mean over responses; seq-mean-token-sum makes LUSPO of gspo.
RESPONSE_AGGREGATIONS = {"gspo": ("seq-mean-token-mean", "seq-mean-token-sum"), "geo_mean": ("seq-mean-token-mean",)}
LOG_RATIO_BOUND = 20.0  # verl's vanilla loss: exp(20) = 5e8 still leaves room in float32

_FLOAT = (torch.float32, torch.float64)
_INTEGER = ("sequence_length", "token_id", "sequence", "position", "group", "lag")


@dataclass
class Tokens:
    """Packed tokens of one micro-batch, every field [T]. Tokens of prompts and padding have `loss_mask` False.

    Values outside `loss_mask` are never used: they may be anything, NaN included.
    """

    logprob: Tensor  # of the current policy; the loss is differentiable in it
    old_logprob: Tensor  # of the policy before this rollout's first update, by the trainer
    advantage: Tensor
    loss_mask: Tensor  # bool
    entropy: Tensor | None = None  # nats
    clamped_entropy: Tensor | None = None  # nats
    old_entropy: Tensor | None = None  # nats, of the policy of old_logprob
    entropy_drift: Tensor | None = None  # of token_stats: d entropy / d step along the token's policy gradient
    collision: Tensor | None = None  # of token_stats: the sum of the squared probabilities of the vocabulary
    ref_logprob: Tensor | None = None  # of the reference policy
    rollout_logprob: Tensor | None = None  # as the sampler reported it
    sequence_length: Tensor | None = None  # int64, number of loss tokens in the token's whole sequence
    token_id: Tensor | None = None  # int64, number of the token in the rollout batch: the same for every split
    sequence: Tensor | None = None  # int64, number of the token's response in the rollout batch
    position: Tensor | None = None  # int64, of the token in its response, from 0
    reward: Tensor | None = None  # of the token's response, as scored: before shaping
    group: Tensor | None = None  # int64, responses to the same prompt share it
    lag: Tensor | None = None  # int64, training steps by which the policy is newer than the one that sampled
    token_reward: Tensor | None = None  # of the token itself, where a reward model gives one

    def __post_init__(self) -> None:
        check.vector("logprob", self.logprob, _FLOAT)
        check.vector("loss_mask", self.loss_mask, (torch.bool,), self.logprob)
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name in _INTEGER:
                if value is not None:
                    check.vector(field.name, value, (torch.int64,), self.logprob)
            elif field.name != "loss_mask" and (value is not None or field.name in ("old_logprob", "advantage")):
                check.vector(field.name, value, _FLOAT, self.logprob)

    def masked(self) -> Tokens:
        """A copy with 0 in every floating field outside the mask, so that garbage there reaches no sum or gradient."""
        clean = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.is_floating_point():
                clean[field.name] = torch.where(self.loss_mask, value, 0.0)
        return replace(self, **clean)

    def given(self, name: str, reader: str) -> Tensor:
        """The field `name`, which must be there, finite under the mask, because `reader` reads it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"tokens.{name} must be given, {reader} reads it; got None")
        check.finite(name, value, self.loss_mask)
        return value

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """One `Tokens` of all parts, in order. A field that some parts have and others lack is an error."""
        if not parts:
            raise ValueError("parts must hold at least one micro-batch, got none")
        joined = {}
        for field in fields(Tokens):
            values = [getattr(part, field.name) for part in parts]
            missing = [i for i, value in enumerate(values) if value is None]
            if missing and len(missing) < len(values):
                raise ValueError(
                    f"{field.name} must be set in every micro-batch or in none, got None in number {missing[0]}"
                )
            joined[field.name] = None if missing else torch.cat(values)
        return Tokens(**joined)


@dataclass(frozen=True)
class Totals:
    """Denominators of the optimizer's mini-batch: over all its micro-batches and all data-parallel ranks.

    The same values go into every call that belongs to the mini-batch. Integers, or 0-d integer tensors where reading
    them would make the host wait.
    """

    num_tokens: int | Tensor  # tokens with loss_mask
    num_sequences: int | Tensor  # sequences with at least one such token

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_sequences"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.dim() or value.is_floating_point():
                    raise TypeError(f"{name} must be a 0-d integer tensor, got {value.dtype} {tuple(value.shape)}")
                value = int(value) if check.readable(value) else 1
            check.integer(name, value, 1)


@dataclass(frozen=True)
class PolicyLossConfig:
    """Knobs of `policy_loss`. Ratios are fractions, never percents; every error names the key, the rule and the value.

    A knob that is set and that nothing reads is an error: `max_response_length` is the constant divisor of
    "seq-mean-token-sum-norm" (Dr.GRPO), an objective reads its OBJECTIVE_KNOBS, and the other tis_* go with tis_cap.
    "gspo" and "geo_mean" need one of their RESPONSE_AGGREGATIONS.
    """

    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]; 1 switches the lower side off
    clip_high: float = 0.2  # inf switches the upper side off
    dual_clip: float | None = None  # c > 1: the loss of a token with A < 0 is at most -c A
    aggregation: str = "token-mean"
    max_response_length: int | None = None
    kl_coef: float = 0.0  # weight of the estimated KL(policy || reference)
    kl_estimator: str = "k3"
    kl_weight: str = "none"  # "ratio": the estimate times r, so that its mean over old samples is that of the policy's
    # Importance weight of sampling by another program than the trainer: see entcov/objective/mismatch.py.
    tis_cap: float | None = None  # weight min(exp(old_logprob - rollout_logprob), tis_cap)
    objective: str = "ppo"  # a name of OBJECTIVES, see entcov/objective/objectives.py
    tau_pos: float = 1.0  # sapo: temperature of the gate where A > 0
    tau_neg: float = 1.05  # sapo: and elsewhere
    tis_floor: float = 0.0  # lower bound of the weight
    tis_level: str = "token"  # "sequence": one weight a response, the product over its tokens
    tis_mode: str = "truncate"  # "mask": a weight outside of [tis_floor, tis_cap] becomes 0
    off_policy_mask_threshold: float | None = None  # nats a token: see mismatch.off_policy_mask
    dro_beta: float | None = None  # dro: weight of the squared log ratio
    vespo_k_pos: float = 2.0  # vespo: power and decay of the weight where A >= 0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0  # vespo: and elsewhere
    vespo_lambda_neg: float = 2.0
    ce_gppo_beta1: float = 0.75  # ce_gppo: weight of the gradient of a clipped token where A < 0
    ce_gppo_beta2: float = 1.0  # ce_gppo: and where A > 0

    def __post_init__(self) -> None:
        check.one_of("objective", self.objective, OBJECTIVE_KNOBS)
        check.number("clip_low", self.clip_low, 0.0, 1.0, "it is a fraction: the ratio is clipped at 1 - clip_low")
        if self.clip_high != math.inf:
            check.number("clip_high", self.clip_high, 0.0, 10.0, "it is a fraction, not a percent; inf switches it off")
        if self.dual_clip is not None:
            check.number("dual_clip", self.dual_clip, 1.0)
            if not 1.0 < self.dual_clip < math.inf:
                raise ValueError(f"dual_clip must be greater than 1 and finite (None: off), got {self.dual_clip}")
        check.positive("tau_pos", self.tau_pos, 100.0)
        check.positive("tau_neg", self.tau_neg, 100.0)
        for sign in ("pos", "neg"):
            check.number(f"vespo_k_{sign}", getattr(self, f"vespo_k_{sign}"), 0.0, 100.0)
            check.number(f"vespo_lambda_{sign}", getattr(self, f"vespo_lambda_{sign}"), 1e-4, 100.0)
        check.number("ce_gppo_beta1", self.ce_gppo_beta1, 0.0, 10.0)
        check.number("ce_gppo_beta2", self.ce_gppo_beta2, 0.0, 10.0)
        if self.dro_beta is not None:
            check.positive("dro_beta", self.dro_beta)
        elif self.objective == "dro":
            raise ValueError("dro_beta must be given for objective dro, got None")
        read = OBJECTIVE_KNOBS[self.objective]
        for name in sorted({name for names in OBJECTIVE_KNOBS.values() for name in names} - set(read)):
            self._refuse(name, f"objective {self.objective} does not read it")
        check.one_of("aggregation", self.aggregation, AGGREGATIONS)
        published = RESPONSE_AGGREGATIONS.get(self.objective, AGGREGATIONS)
        if self.aggregation not in published:
            raise ValueError(
                f"aggregation must be {' or '.join(published)} for objective {self.objective}, whose ratio is one "
                f"number a response; got {self.aggregation}"
            )
        if self.aggregation == "seq-mean-token-sum-norm":
            if self.max_response_length is None:
                raise ValueError("max_response_length must be given for aggregation seq-mean-token-sum-norm, got None")
            check.integer("max_response_length", self.max_response_length, 1)
        elif self.max_response_length is not None:
            raise ValueError(
                f"max_response_length must be None unless aggregation is seq-mean-token-sum-norm: {self.aggregation} "
                f"would ignore {self.max_response_length}"
            )
        check.number("kl_coef", self.kl_coef, 0.0)
        check.one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check.one_of("kl_weight", self.kl_weight, ("none", "ratio"))
        if self.kl_coef == 0:
            self._refuse("kl_weight", "there is no KL term where kl_coef is 0")
        if self.off_policy_mask_threshold is not None:
            check.number("off_policy_mask_threshold", self.off_policy_mask_threshold, 0.0)
        check.one_of("tis_level", self.tis_level, ("token", "sequence"))
        check.one_of("tis_mode", self.tis_mode, ("truncate", "mask"))
        if self.tis_cap is None:
            for name in ("tis_floor", "tis_level", "tis_mode"):
                self._refuse(name, "there is no importance weight without tis_cap")
            return
        check.positive("tis_cap", self.tis_cap)
        check.number("tis_floor", self.tis_floor, 0.0, self.tis_cap, "the upper bound is tis_cap")
        if self.objective == "geo_mean" and self.tis_level == "token":
            raise ValueError(
                "tis_level must be sequence for objective geo_mean, whose ratio is one number a response; got token"
            )
        if self.objective == "vespo" and self.tis_level == "sequence":
            raise ValueError("tis_level must be token for objective vespo, which takes their product; got sequence")

    @property
    def by_response(self) -> bool:
        """Whether a term needs sums over whole responses (`policy_loss` needs `sequences` or `tokens.sequence`)."""
        sequence_weight = self.objective in SEQUENCE_OBJECTIVES or self.tis_level == "sequence"
        return sequence_weight or self.off_policy_mask_threshold is not None

    def _refuse(self, name: str, why: str) -> None:
        """Raises if the knob `name` has another value than its default."""
        value, default = getattr(self, name), getattr(PolicyLossConfig, name)
        if value != default:
            raise ValueError(f"{name} must be left at {default}: {why}; got {value}")
