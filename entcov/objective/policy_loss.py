"""The policy loss: one of the objectives, five aggregations, reference KL, mismatch weights, entropy controls.

A loss here is a SUM over the tokens of one call, each weighted by a denominator of the whole mini-batch. So the losses
of micro-batches and of data-parallel ranks add up to the loss of the mini-batch, and no split changes a gradient.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.controls.base import Control, Selection, kept_tokens
from entcov.objective.mismatch import importance_weight, off_policy_mask
from entcov.objective.objectives import OBJECTIVES, token_ratio, without_clip
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import (
    KL_ESTIMATORS,
    LOG_RATIO_BOUND,
    PolicyLossConfig,
    Tokens,
    Totals,
)

KL_BOUND = 10.0  # verl's bound on k3


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With d = ref_logprob - logprob:  k1 = -d,  abs = |d|,  k2 = d^2 / 2,  k3 = exp(d) - d - 1 with d clamped to +-20
    and the result to +-10. "k1+", "k3+" and "abs+" have the value of k1, k3 and abs and the gradient of k2, which is
    the unbiased gradient of the KL for tokens sampled by the policy itself; the gradient of k1 is 0 in expectation.

    Args:
        logprob, ref_logprob: [T] float, nats.
        estimator: one of KL_ESTIMATORS.
    Returns: [T], nats.
    Source: Schulman, "Approximating KL divergence" (2020); the bounds and "+" forms are those of verl's kl_penalty.
    """
    check.one_of("kl_estimator", estimator, KL_ESTIMATORS)
    d = ref_logprob - logprob
    if estimator.endswith("+"):
        gradient = 0.5 * d.square()
        return kl_estimate(logprob, ref_logprob, estimator[:-1]).detach() + (gradient - gradient.detach())
    if estimator == "k1":
        return -d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d.square()
    d = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (d.exp() - d - 1).clamp(-KL_BOUND, KL_BOUND)


def policy_loss(
    tokens: Tokens,
    config: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008  frozen
    *,
    totals: Totals | None = None,
    controls: Sequence[Control] = (),
    selections: Sequence[Selection | None] | None = None,
    sequences: SequenceIndex | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy-gradient loss of one micro-batch, with any list of entropy controls.

    Equivalent to, with r = exp(clamp(logprob - old_logprob, +-20)) and A the advantage times all multipliers, for
    the objective "ppo" (entcov/objective/objectives.py has the others in place of its two lines):

        pg = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))      -A r alone if a control says `unclipped`
        pg = min(pg, -A dual_clip)                                    where A < 0, if dual_clip (and not unclipped)
        pg = pg * min(exp(old_logprob - rollout_logprob), tis_cap)    if tis_cap; see tis_level, tis_mode; a constant
        pg = 0                                                        where a keep is False, or the off-policy mask
        kl = kl_estimate(logprob, ref_logprob)                        times r if kl_weight is "ratio"
        loss = sum_t w_t (pg + kl_coef kl + sum of penalties)

        w_t = 1 / num_tokens                               token-mean
              1                                            token-sum
              1 / num_sequences                            seq-mean-token-sum
              1 / (num_sequences * sequence_length_t)      seq-mean-token-mean
              1 / (num_sequences * max_response_length)    seq-mean-token-sum-norm

    Controls compose: multipliers multiply, keep masks intersect, penalties add, and one `unclipped` is enough. A
    token with keep False has no policy-gradient value and no gradient, and still counts in every denominator. A token
    that a selection drops is treated as outside the mask; `totals` must be without it (`controls.mini_batch_totals`).

    Args:
        tokens: one micro-batch. `sequence_length` is read by seq-mean-token-mean and by totals=None with a seq-*
            aggregation, `ref_logprob` if kl_coef > 0, `rollout_logprob` if tis_cap is set, `sequence` (if `sequences`
            is not given) where `config.by_response`, and where a selection drops.
        totals: denominators of the mini-batch. None: this micro-batch is all of it (whole sequences only).
        controls: entropy controls, see entcov/controls/base.py.
        selections: one entry a control, as `entcov.controls.select` returns them.
        sequences: where a term needs sums over responses; default: made of `tokens.sequence`, whole responses.
    Returns: (loss, metrics). loss is a 0-d tensor; the losses of all micro-batches and ranks ADD UP to that of the
        mini-batch. Where a data-parallel wrapper averages gradients over ranks, multiply by the number of ranks.
        metrics are 0-d float64 tensors that add up in the same way: actor/loss, actor/pg_loss, actor/pg_clipfrac,
        actor/pg_clipfrac_lower, actor/ppo_kl, actor/sampled_entropy (-old_logprob), and where the fields are there
        actor/entropy, actor/clamped_entropy, actor/kl_loss, actor/mismatch, actor/tis_weight, actor/tis_capfrac,
        actor/off_policy_maskfrac, and the controls' own. Those after actor/kl_loss and all entropies are means over
        tokens, for every aggregation.
    Differentiable in tokens.logprob, and through penalties in entropy and clamped_entropy. Nothing is mutated.
    Collectives: none, but all-reduces of 8 bytes a response over `sequences.group`, if there is one: one for each of
        SEQUENCE_OBJECTIVES, one for tis_level "sequence", two for off_policy_mask_threshold, and one where a selection
        drops tokens and the aggregation is a seq-*; the ranks that share responses must call together.
    Host synchronisation: none on an accelerator, if `sequences` is given; on the CPU values are checked.
    Raises: ValueError for a control that does not go with the objective, a missing field (named), no token under the
        mask without totals, a value under the mask that is not finite (CPU), a wrong number or shape of selections.
    Source: Schulman et al. 2017 (clip), Ye et al. 2020 (dual clip), Shao et al. 2024 (GRPO), Yu et al. 2025 (DAPO:
        token-mean, clip_high), Liu et al. 2025 (Dr.GRPO: constant divisor), Yao et al. 2025 (truncated weights),
        DeepSeek-V3.2, arXiv 2512.02556 (kl_weight, off_policy_mask_threshold); names and bounds as in verl.
    """
    for name in ("logprob", "old_logprob", "advantage"):
        check.finite(name, getattr(tokens, name), tokens.loss_mask)
    pairs = _pairs(tokens, controls, selections)
    tokens = _without_dropped(tokens, [chosen for _, chosen in pairs], config, sequences).masked()
    mask = tokens.loss_mask
    if totals is None:
        totals = _own_totals(tokens, config)
    weight = _weights(tokens, config, totals)
    metrics: dict[str, Tensor] = {}

    def add_mean(name: str, value: Tensor) -> None:
        metrics[name] = torch.where(mask, value.detach().double(), 0.0).sum() / totals.num_tokens

    effects = [control.apply(tokens, chosen) for control, chosen in pairs]
    advantage = tokens.advantage
    for effect in effects:
        if effect.multiplier is not None:
            advantage = advantage * effect.multiplier.detach()

    log_ratio = tokens.logprob - tokens.old_logprob
    index = sequence_index(tokens, sequences) if config.by_response else None
    unclipped = any(effect.unclipped for effect in effects)
    knobs = without_clip(config) if unclipped else config
    pg, clipped, lower = OBJECTIVES[config.objective](log_ratio, advantage, tokens, knobs, index)
    if config.tis_cap is not None:
        tis_weight, outside = importance_weight(tokens, config, index)
        if config.objective != "vespo":  # which has it in its own weight
            pg = pg * tis_weight
        add_mean("actor/tis_weight", tis_weight)
        add_mean("actor/tis_capfrac", outside)
    if config.off_policy_mask_threshold is not None:
        off_policy = off_policy_mask(tokens, config, index)
        pg = torch.where(off_policy, 0.0, pg)
        add_mean("actor/off_policy_maskfrac", off_policy)
    for effect in effects:
        if effect.keep is not None:
            pg = torch.where(effect.keep, pg, 0.0)

    token_loss = pg
    if config.kl_coef > 0:
        kl = kl_estimate(tokens.logprob, tokens.given("ref_logprob", "kl_coef"), config.kl_estimator)
        if config.kl_weight == "ratio":
            kl = kl * token_ratio(log_ratio)
        token_loss = token_loss + config.kl_coef * kl
        metrics["actor/kl_loss"] = _weighted_sum(weight, kl)
    for effect in effects:
        if effect.penalty is not None:
            token_loss = token_loss + effect.penalty
        for name, value in effect.metrics.items():
            add_mean(name, value)
    loss = (weight * token_loss).sum()

    metrics["actor/loss"] = _weighted_sum(weight, token_loss)
    metrics["actor/pg_loss"] = _weighted_sum(weight, pg)
    add_mean("actor/pg_clipfrac", clipped)
    add_mean("actor/pg_clipfrac_lower", lower)
    add_mean("actor/ppo_kl", -log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    add_mean("actor/sampled_entropy", -tokens.old_logprob)
    for name in ("entropy", "clamped_entropy"):
        value = getattr(tokens, name)
        if value is not None:
            add_mean(f"actor/{name}", value)
    if tokens.rollout_logprob is not None:
        add_mean("actor/mismatch", (tokens.old_logprob - tokens.rollout_logprob).abs())
    return loss, metrics


def _weighted_sum(weight: Tensor, value: Tensor) -> Tensor:
    return (weight.double() * value.detach().double()).sum()


def _own_totals(tokens: Tokens, config: PolicyLossConfig) -> Totals:
    num_tokens = tokens.loss_mask.sum()
    if tokens.loss_mask.numel() == 0 or (check.readable(num_tokens) and num_tokens == 0):
        raise ValueError(f"loss_mask must have a True token when totals is None, got none of {len(tokens.loss_mask)}")
    if config.aggregation.startswith("token-"):
        return Totals(num_tokens, num_tokens)
    length = tokens.given("sequence_length", f"totals=None with aggregation {config.aggregation}")
    share = torch.where(tokens.loss_mask, 1.0 / length.clamp(min=1).double(), 0.0)
    return Totals(num_tokens, share.sum().round().long())  # the tokens of one sequence have shares that add up to 1


def _weights(tokens: Tokens, config: PolicyLossConfig, totals: Totals) -> Tensor:
    one = tokens.loss_mask.to(tokens.logprob.dtype)
    if config.aggregation == "token-sum":
        return one
    if config.aggregation == "token-mean":
        return one / totals.num_tokens
    weight = one / totals.num_sequences
    if config.aggregation == "seq-mean-token-mean":
        length = tokens.given("sequence_length", "aggregation seq-mean-token-mean")
        if check.readable(length) and bool((tokens.loss_mask & (length < 1)).any()):
            raise ValueError("sequence_length must be at least 1 under the mask, got a smaller one")
        weight = weight / length.clamp(min=1)
    if config.aggregation == "seq-mean-token-sum-norm":
        weight = weight / config.max_response_length
    return weight


def _without_dropped(
    tokens: Tokens, selections: Sequence[Selection | None], config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Tokens:
    """The tokens with those outside the mask that a selection drops, and the responses' lengths without them."""
    if all(selection is None or selection.drop is None for selection in selections):
        return tokens
    mask = kept_tokens(tokens, selections)
    length = tokens.sequence_length
    if config.aggregation.startswith("seq-"):
        length = sequence_index(tokens, sequences).sum(mask).long()
    return replace(tokens, loss_mask=mask, sequence_length=length)


def sequence_index(tokens: Tokens, sequences: SequenceIndex | None) -> SequenceIndex:
    """`sequences`, by default those of `tokens.sequence`."""
    if sequences is None:
        return SequenceIndex.of(tokens.given("sequence", "a sum over responses"))
    check.vector("sequences.index", sequences.index, (torch.int64,), tokens.logprob)
    return sequences


def _pairs(
    tokens: Tokens, controls: Sequence[Control], selections: Sequence[Selection | None] | None
) -> list[tuple[Control, Selection | None]]:
    """(control, its selection) of all controls, after a check that the fields which the control needs are given."""
    if selections is None:
        selections = [None] * len(controls)
    if len(selections) != len(controls):
        raise ValueError(f"selections must have one entry a control: {len(controls)} controls, {len(selections)} given")
    pairs = list(zip(controls, selections, strict=True))
    for control, chosen in pairs:
        for name in sorted(control.needs - {"selection"}):
            tokens.given(name, f"control {control.name}")
        if "selection" in control.needs and chosen is None:
            raise ValueError(f"selections must hold what entcov.controls.select chose for {control.name}, got None")
        if chosen is None:
            continue
        if not isinstance(chosen, Selection):
            raise TypeError(f"selection of control {control.name} must be a Selection, got {type(chosen).__name__}")
        for part in (chosen.mask, chosen.drop):
            if part is not None:
                check.vector(f"selection of control {control.name}", part, (torch.bool,), tokens.logprob)
        if chosen.weight is not None:
            floats = (torch.float32, torch.float64)
            check.vector(f"weight of control {control.name}", chosen.weight, floats, tokens.logprob)
    return pairs
