"""The objectives: the policy-gradient term of each token, chosen by `PolicyLossConfig.objective`.

Every function of `OBJECTIVES` takes the same arguments and returns (pg, clipped, lower):

    log_ratio  [T] float, logprob - old_logprob, 0 outside the mask; not bounded
    advantage  [T] float, times the multipliers of all controls, 0 outside the mask; no gradient
    tokens     the micro-batch, `Tokens.masked`
    config     the loss's knobs; OBJECTIVE_KNOBS says which ones an objective reads
    sequences  sums over whole responses; where the objective is not one of SEQUENCE_OBJECTIVES it may be None

    pg         [T], the term that the aggregation weighs; differentiable in tokens.logprob
    clipped    [T] bool, the clip acts on the token; its gradient is 0 there, but for cispo and ce_gppo
    lower      [T] bool, the dual clip acts on the token

Controls act on every objective in the same way: a multiplier scales the advantage, keep=False makes the token's pg 0,
a penalty is added after it. In "gspo" and "geo_mean" a token with keep=False has still its share in the response's
ratio; a dropped token has none. `without_clip` says what `unclipped` means.

Collectives: SEQUENCE_OBJECTIVES enter one all-reduce over `sequences.group`, where there is one; others none.
Source: the formulas are those of verl's trainer/ppo/core_algos.py, which the docstrings compare with the papers.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from entcov.objective.mismatch import importance_weight
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import LOG_RATIO_BOUND, PolicyLossConfig, Tokens

GSPO_BOUND = 10.0  # verl's upper bound of the mean log ratio
VESPO_SMALLEST = 1e-8  # of the weight of a response, and of an importance weight in it, in TRL
Terms = tuple[Tensor, Tensor, Tensor]


def ppo(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), r = exp(clamp(log_ratio, +-20)); at most -A dual_clip.

    The bound of the last part is for A < 0, if dual_clip is set.
    Source: Schulman et al., arXiv 1707.06347, eq. 7; Ye et al., arXiv 1912.09729 (dual clip); verl "vanilla".
    """
    pg, clipped = _clipped(token_ratio(log_ratio), advantage, config)
    return _dual_clipped(pg, clipped, advantage, config)


def ce_gppo(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """PPO's loss, but a token that the clip acts on keeps a gradient, bounded and weighed by beta:

        -beta1 A (1 - clip_low) r / sg[r]     A < 0 and r < 1 - clip_low    an unlikely token; sharpens the policy
        -beta2 A (1 + clip_high) r / sg[r]    A > 0 and r > 1 + clip_high   an unlikely token; flattens it
        -A r                                  elsewhere; at most -A dual_clip where A < 0

    A larger beta1 lowers the entropy, a larger beta2 raises it; both 0 is ppo in its gradient. The paper's are 0.75 and
    1 (7B), 0.5 and 1 (1.5B); the published configuration's default is 0.25 and 1.
    Source: Su et al., CE-GPPO, arXiv 2509.20712; code: Kwai-Klear/CE-GPPO, compute_gppo_loss_general_beta, which does
        not bound log r.
    """
    _, clipped = _clipped(token_ratio(log_ratio), advantage, config)
    up, down = config.ce_gppo_beta2 * (1 + config.clip_high), config.ce_gppo_beta1 * (1 - config.clip_low)
    kept = torch.full_like(advantage, down).masked_fill(advantage > 0, up)
    one = (tokens.logprob - tokens.logprob.detach()).exp()  # with the gradient of r / sg[r]
    pg = -advantage * torch.where(clipped, kept * one, token_ratio(log_ratio))
    return _dual_clipped(pg, clipped, advantage, config)


def gspo(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """PPO's clip of s_t = sg[s] pi_t / sg[pi_t], where s = exp(mean of log_ratio over the response).

    log s_t is bounded by 10 from above, as in verl. Every token of a response has the same s, so the clip takes or
    leaves whole responses where the advantage is one number a response. The paper's ranges are 3e-4 and 4e-4.
    Source: Zheng et al., arXiv 2507.18071 (the form by tokens: GSPO-token); verl "gspo". TRL:
    importance_sampling_level="sequence" with loss_type="grpo", without the bound, and with the gradient through s
    itself, which is the same where the advantage is one number a response. With the aggregation seq-mean-token-sum it
    is LUSPO, arXiv 2602.05261, TRL loss_type="luspo".
    """
    mean = _response_mean(log_ratio, tokens, config, sequences)
    log_s = (tokens.logprob - tokens.logprob.detach() + mean).clamp(max=GSPO_BOUND)
    pg, clipped = _clipped(log_s.exp(), advantage, config)
    return pg, clipped, torch.zeros_like(clipped)


def geo_mean(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """GMPO: -A s, s = exp(mean over the response of l), l = sgn(A) min(sgn(A) log r, sgn(A) clamp(log r)).

    The clamp is of the logarithm, to [-clip_low, clip_high] (the paper: 0.4 both ways). Written by tokens,
    s_t = sg[s] exp(l_t) / sg[exp(l_t)]: the same value and gradient as -A s where the advantage is one number a
    response. Where a control's multiplier differs between tokens, each token's gradient has its own A; verl takes the
    mean of A over the response. verl does not bound log r by +-20, and counts a token as clipped wherever it leaves
    the range; here it is clipped if that changes l.
    Source: Zhao et al., arXiv 2507.20673; verl "geo_mean".
    """
    log_ratio, sign = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), advantage.sign()
    bounded = log_ratio.clamp(-config.clip_low, config.clip_high)
    least = sign * torch.minimum(sign * log_ratio, sign * bounded)
    clipped = (least != log_ratio) & (sign != 0)
    log_s = least - least.detach() + _response_mean(least, tokens, config, sequences)
    return -advantage * log_s.exp(), clipped, torch.zeros_like(clipped)


def cispo(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """-sg[clamp(r, 1 - clip_low, 1 + clip_high)] A logprob: the clip bounds the weight; no token loses its gradient.

    Source: MiniMax-M1, arXiv 2506.13585 (there without a lower bound: clip_low 1); verl "cispo" clamps both
    sides. TRL's loss_type="cispo" clamps at epsilon_high itself, so its epsilon_high is 1 + clip_high.
    """
    ratio = token_ratio(log_ratio).detach()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    clipped = weight != ratio
    return -weight * advantage * tokens.logprob, clipped, torch.zeros_like(clipped)


def sapo(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """-A sigmoid(tau (r - 1)) 4 / tau, tau = tau_pos where A > 0, else tau_neg: a soft gate instead of the clip.

    Its gradient at r = 1 is that of -A r. Published with the aggregation "seq-mean-token-mean", the only one that verl
    and TRL have for it.
    Source: Gao et al., arXiv 2511.20347 (tau 1.0 and 1.05); verl "sapo", TRL loss_type="sapo": the same formula.
    """
    tau = torch.full_like(advantage, config.tau_neg).masked_fill(advantage > 0, config.tau_pos)
    gate = torch.sigmoid(tau * (token_ratio(log_ratio) - 1)) * 4 / tau
    never = torch.zeros_like(tokens.loss_mask)
    return -advantage * gate, never, never


def gpg(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """-A logprob: the policy gradient without a ratio, for any number of updates.

    Source: Chu et al., arXiv 2504.02546; verl "gpg". The paper's rescaling of the advantages is not part of it.
    """
    never = torch.zeros_like(tokens.loss_mask)
    return -advantage * tokens.logprob, never, never


def dro(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """-A logprob + dro_beta / 2 log_ratio^2: a quadratic pull to the old policy instead of a ratio and a clip.

    Source: Richemond et al., arXiv 2405.19107, whose loss has this gradient with A = reward - value; verl "dro".
    """
    never = torch.zeros_like(tokens.loss_mask)
    return -advantage * tokens.logprob + 0.5 * config.dro_beta * log_ratio.square(), never, never


def dppo_tv(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """DPPO-Binary-TV: -sg[min(r, dual_clip)] A logprob, 0 where pi - pi_old has left its range in A's direction.

    The range is pi - pi_old <= clip_high where A > 0, and >= -clip_low elsewhere: the total variation of "this token or
    another one". `dual_clip` bounds r for both signs of A, None: at exp(20). verl's is clip_ratio_c, 3 if not set.
    `lower` tells where that bound acts on a token that is not masked.
    Source: arXiv 2602.04879; verl "dppo_tv".
    """
    moved = tokens.logprob.detach().exp() - tokens.old_logprob.exp()
    inside = torch.where(advantage > 0, moved <= config.clip_high, moved >= -config.clip_low)
    return _masked_divergence(log_ratio, advantage, tokens, config, inside)


def dppo_kl(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """DPPO-Binary-KL: as `dppo_tv` with KL(old || current) of "this token or another one" instead of the difference.

    Masked are the tokens where it is above clip_high with A > 0 and pi > pi_old, or above clip_low with A <= 0 and
    pi < pi_old. Source: arXiv 2602.04879; verl "dppo_kl", with its 1e-8 in the logarithm.
    """
    logprob, old_logprob = tokens.logprob.detach(), tokens.old_logprob
    new, old = logprob.exp(), old_logprob.exp()
    rest, old_rest = (1 - new).clamp(min=0), (1 - old).clamp(min=0)  # rounding can make a probability 1 + 1e-7
    kl = old * (old_logprob - logprob) + old_rest * ((old_rest + 1e-8) / (rest + 1e-8)).log()
    inside = torch.where(advantage > 0, (kl <= config.clip_high) | (new <= old), (kl <= config.clip_low) | (new >= old))
    return _masked_divergence(log_ratio, advantage, tokens, config, inside)


def vespo(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None
) -> Terms:
    """-sg[phi] A logprob, phi = w^k exp(lambda (1 - w)), w the product of the ratios of the response.

    k and lambda are vespo_k_pos and vespo_lambda_pos where A >= 0, else the other two. The logarithms are bounded as in
    TRL: of a ratio to +-20, of w to [log 1e-8, 20]. With tis_cap the importance weights of the tokens, from 1e-8 on,
    are factors of w, and do not scale the term a second time. TRL aggregates by token-mean.
    Source: arXiv 2602.10693; TRL 1.16, loss_type="vespo".
    """
    logs = log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if config.tis_cap is not None:
        logs = logs + importance_weight(tokens, config, None)[0].clamp(min=VESPO_SMALLEST).log()
    log_w = sequences.sum(logs).clamp(math.log(VESPO_SMALLEST), LOG_RATIO_BOUND)
    up = advantage >= 0
    k = torch.full_like(log_w, config.vespo_k_neg).masked_fill(up, config.vespo_k_pos)
    decay = torch.full_like(log_w, config.vespo_lambda_neg).masked_fill(up, config.vespo_lambda_pos)
    phi = (decay + k * log_w - decay * log_w.exp()).exp().to(advantage.dtype)
    never = torch.zeros_like(tokens.loss_mask)
    return -phi * advantage * tokens.logprob, never, never


OBJECTIVES: dict[str, Callable[..., Terms]] = {
    f.__name__: f for f in (ppo, ce_gppo, gspo, geo_mean, cispo, sapo, gpg, dro, dppo_tv, dppo_kl, vespo)
}
UNCLIPPED = ("ppo", "cispo", "gpg", "dro")  # objectives that a control may ask for without their clip


def without_clip(config: PolicyLossConfig) -> PolicyLossConfig:
    """The knobs of the same objective where a control drops the clip (`Effect.unclipped`).

    ppo: -A r, without dual clip. cispo: -sg[r] A logprob, whose gradient is the same. gpg and dro have no clip to drop.
    In gspo, geo_mean and vespo it is of whole responses, which no control that picks tokens replaces, and sapo's gate,
    dppo's mask and what ce_gppo keeps of a clipped token are their shape: they are refused.
    """
    if config.objective not in UNCLIPPED:
        raise ValueError(
            f"objective must be one of {', '.join(UNCLIPPED)} for a control that drops the clip of single tokens, got "
            f"{config.objective}"
        )
    if config.objective in ("gpg", "dro"):
        return config
    return replace(config, clip_low=1.0, clip_high=math.inf, dual_clip=None)


def token_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), with log_ratio bounded by +-20."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _clipped(ratio: Tensor, advantage: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """PPO's clip: (the loss of each token, whether the clip acts)."""
    pg = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.maximum(pg, bounded), bounded > pg


def _dual_clipped(pg: Tensor, clipped: Tensor, advantage: Tensor, config: PolicyLossConfig) -> Terms:
    """The terms with the dual clip, if it is set: at most -A dual_clip where A < 0."""
    if config.dual_clip is None:
        return pg, clipped, torch.zeros_like(clipped)
    ceiling = -advantage * config.dual_clip
    lower = (pg > ceiling) & (advantage < 0)
    return torch.where(lower, ceiling, pg), clipped, lower


def _masked_divergence(
    log_ratio: Tensor, advantage: Tensor, tokens: Tokens, config: PolicyLossConfig, inside: Tensor
) -> Terms:
    """DPPO's terms from which tokens are inside of its trust region."""
    ratio, clipped = token_ratio(log_ratio.detach()), ~inside
    bound = math.inf if config.dual_clip is None else config.dual_clip
    pg = -advantage * torch.where(inside, ratio.clamp(max=bound), 0.0) * tokens.logprob
    return pg, clipped & tokens.loss_mask, inside & (ratio > bound)


def _response_mean(value: Tensor, tokens: Tokens, config: PolicyLossConfig, sequences: SequenceIndex | None) -> Tensor:
    """[T]: for each token the mean of `value` over the loss tokens of its whole response; no gradient."""
    length = tokens.given("sequence_length", f"objective {config.objective}")
    return (sequences.sum(value) / length.clamp(min=1)).to(value.dtype)
