"""What the loss does about a sampler that is not the trainer's policy: importance weights, a mask, and rejection.

The ratio is exp(old_logprob - rollout_logprob), of the trainer's policy to that which sampled: another program
(vLLM), another precision, or older weights. A weight changes a token's policy-gradient term and no denominator; what
is rejected leaves the loss and its denominators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import LOG_RATIO_BOUND, PolicyLossConfig, Tokens

LEVELS = ("token", "sequence", "geometric", "max")
ESTIMATORS = ("k1", "k2", "k3")


def importance_weight(
    tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> tuple[Tensor, Tensor]:
    """The weights of `tis_cap` and whether each is outside of [tis_floor, tis_cap]: [T] float and [T] bool.

    The ratio of a token or, with tis_level "sequence", the product of the ratios of all loss tokens of its response
    (without those that have left the loss); its logarithm is bounded by +-20. tis_mode "truncate" moves a weight to
    the nearer bound, "mask" makes it 0.

        ours                        verl                                   TRL vllm_importance_sampling_mode
        truncate, token | sequence  rollout_is token | sequence            token_truncate | sequence_truncate
        mask, token | sequence      (rejection changes its denominators)   token_mask | sequence_mask

    Args:
        tokens: one micro-batch, `Tokens.masked`.
        sequences: read at level "sequence".
    Collectives: at level "sequence" one all-reduce over sequences.group, where there is one. No gradient.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (token); Liu et
        al. 2025, "When speed kills stability" (sequence, mask); bounds of the logarithm as in verl.
    """
    log_ratio = (tokens.old_logprob - tokens.given("rollout_logprob", "tis_cap")).detach()
    if config.tis_level == "sequence":
        log_ratio = sequences.sum(log_ratio).to(log_ratio.dtype)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    outside = (ratio > config.tis_cap) | (ratio < config.tis_floor)
    if config.tis_mode == "mask":
        return torch.where(outside, 0.0, ratio), outside
    return ratio.clamp(config.tis_floor, config.tis_cap), outside


def off_policy_mask(tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex) -> Tensor:
    """[T] bool: the tokens with A < 0 of responses that the policy has moved away from. They lose their gradient.

    A response is one where the mean over its loss tokens of sampled - logprob, an estimate of KL(sampler || policy), is
    above `config.off_policy_mask_threshold`. `sampled` is rollout_logprob where it is given, else old_logprob. A is the
    advantage before the multipliers of controls.

    Args: as `importance_weight`.
    Collectives: two all-reduces over sequences.group, where there is one. No gradient.
    Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 9; TRL 1.16, GRPOConfig.off_policy_mask_threshold.
    """
    sampled = tokens.old_logprob
    if tokens.rollout_logprob is not None:
        sampled = tokens.given("rollout_logprob", "off_policy_mask_threshold")
    drift = sequences.sum(sampled - tokens.logprob.detach()) / sequences.sum(tokens.loss_mask).clamp(min=1)
    return tokens.loss_mask & (tokens.advantage < 0) & (drift > config.off_policy_mask_threshold)


@dataclass(frozen=True)
class RolloutRejection:
    """Which tokens of a rollout leave the loss and its denominators because the sampler was too far off.

    level  "token": the tokens whose ratio is outside of [low, high]. "sequence": the responses whose product of ratios
           is. "geometric": those whose geometric mean is. None: nothing is rejected, and nothing else may be set.
    veto   further, every response with a token whose ratio r is below `veto`.
    estimator  "k1": as above. "k2": (log r)^2 / 2, "k3": r - 1 - log r, in nats, in place of log r; their sum
           ("sequence"), mean ("geometric") or largest ("max") over the response is at most `high`, and there is no
           `low`. The log ratio is then bounded by +-20, as in verl.

    The trainer decides once, when a rollout is scored, after the advantages: a rejected response still counts in the
    mean of its group.
    Source: Liu et al. 2025, "When speed kills stability"; verl's rollout_rs (token, sequence, geometric; in later
        versions token, seq_sum, seq_mean, seq_max with _k1, _k2 or _k3, where the bounds of k1 are of the inverse
        ratio) and its token veto, which later versions do not have. verl whitens (REINFORCE++) over the tokens that are
        left, we do over all.
    """

    level: str | None = None
    low: float | None = None
    high: float | None = None
    veto: float | None = None
    estimator: str = "k1"

    def __post_init__(self) -> None:
        if self.level is None:
            for name in ("low", "high", "veto", "estimator"):
                if getattr(self, name) != getattr(RolloutRejection, name):
                    raise ValueError(f"{name} has no effect without level, got {getattr(self, name)}")
            return
        check.one_of("level", self.level, LEVELS)
        check.one_of("estimator", self.estimator, ESTIMATORS)
        if self.estimator != "k1" and (self.high is None or self.low is not None):
            raise ValueError(
                f"high must be given and low must not for estimator {self.estimator}, which is never below 0; got "
                f"high {self.high} and low {self.low}"
            )
        if self.estimator == "k1" and self.level == "max":
            raise ValueError("estimator must be k2 or k3 for level max, got k1")
        if self.low is None and self.high is None:
            raise ValueError(f"low or high must be given for level {self.level}, got None for both")
        if self.low is not None:
            check.positive("low", self.low, 1.0)
        if self.high is not None:
            check.number("high", self.high, 1.0 if self.estimator == "k1" else 0.0)
        if self.veto is not None:
            check.positive("veto", self.veto, 1.0)

    def rejected(self, tokens: Tokens) -> Tensor:
        """[T] bool: the loss tokens that leave. `tokens` are whole responses, with `sequence` and `rollout_logprob`."""
        log_ratio = tokens.old_logprob - tokens.given("rollout_logprob", "rollout_rs")
        log_ratio = torch.where(tokens.loss_mask, log_ratio, 0.0).detach().double()
        sequences = SequenceIndex.of(tokens.given("sequence", "rollout_rs"))
        bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        value = {"k1": log_ratio, "k2": bounded.square() / 2, "k3": bounded.exp() - 1 - bounded}[self.estimator]
        if self.level == "max":
            value = value.new_zeros(sequences.count).scatter_reduce(0, sequences.index, value, "amax")[sequences.index]
        elif self.level != "token":
            value = sequences.sum(value)
        if self.level == "geometric":
            value = value / sequences.sum(tokens.loss_mask).clamp(min=1)
        value, out = value.exp() if self.estimator == "k1" else value, torch.zeros_like(tokens.loss_mask)
        if self.low is not None:
            out = out | (value < self.low)
        if self.high is not None:
            out = out | (value > self.high)
        if self.veto is not None:
            out = out | (sequences.sum(tokens.loss_mask & (log_ratio.exp() < self.veto)) > 0)
        return out & tokens.loss_mask
