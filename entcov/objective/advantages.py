"""Advantages of responses from their rewards, computed over the whole rollout.

An estimator is a dataclass whose fields are its knobs. `ADVANTAGES` has them by name; a recipe chooses one by
`advantage` and sets its knobs in `advantages`; other packages add theirs (entcov/registry.py, "entcov.advantages").

Rewards are rounded to float32 and sums run in float64: a group of equal rewards gets exactly 0. A group of one keeps
its reward, as in verl, because there is nothing to compare it with. Not differentiable; nothing is mutated; no
collectives. Constants and conventions are those of verl's trainer/ppo/core_algos.py unless a docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entcov import arguments as check
from entcov.objective.prime import NORMS, prime_advantage
from entcov.objective.prompt_groups import (
    centred_on_group,
    group_max,
    group_quantile,
    group_std,
    group_sum,
    groups_of,
    whitened_over_tokens,
)
from entcov.objective.responses import Responses
from entcov.objective.tokens import Tokens
from entcov.registry import Registry

STD_EPS = 1e-6
PATH_EPS = 1e-8  # of the optimal token baseline


@dataclass
class Advantages:
    """What an estimator decides.

    value: float32, [B], one of each response, or [T], one of each token that the estimator was shown.
    keep: [B] bool, False: the response leaves the loss and its denominators. None: all stay.
    """

    value: Tensor
    keep: Tensor | None = None


class Estimator:
    """Base of the estimators. A concrete one is a dataclass, checked when it is made.

    __call__ takes `responses`, and `tokens`: the loss tokens of the whole rollout, with the statistics of the policy
    that scored them, `sequence` holding `responses.number`. The estimators of this file that do not say so read
    `responses` alone. Raises ValueError or TypeError for what `Responses` or the estimator refuses, for no response,
    rewards that are not finite, negative lengths.
    """

    name: ClassVar[str]  # key in ADVANTAGES
    # "baseline": one more response to each prompt is sampled, greedily. "token_reward": a reward model is trained.
    needs: ClassVar[frozenset[str]] = frozenset()
    smallest_group: ClassVar[int] = 1  # responses to a prompt

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        raise NotImplementedError


@dataclass
class GRPO(Estimator):
    """(reward - group mean) / (std + 1e-6), std unbiased (n - 1).

    scale_rewards  "group" (default): the std of the group. "batch": of all rewards. "none": no division (dr_grpo).
    A group of one has std 1. Source: Shao et al., DeepSeekMath, arXiv 2402.03300; scale_rewards is TRL's, with its
    "batch" from "Tricks or Traps?" (Lite PPO), arXiv 2508.08221; TRL adds 1e-4 to the std.
    """

    name: ClassVar[str] = "grpo"

    scale_rewards: str = "group"

    def __post_init__(self) -> None:
        check.one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        centred = centred_on_group(reward, group, size)
        if self.scale_rewards == "none":
            return Advantages(centred.float())
        if self.scale_rewards == "group":
            return Advantages((centred / (group_std(centred, group, size) + STD_EPS)).float())
        std = reward.std() if len(reward) > 1 else torch.ones_like(centred)
        return Advantages((centred / (std + STD_EPS)).float())


@dataclass
class DrGRPO(Estimator):
    """reward - group mean. Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783.

    The method's other half is the aggregation "seq-mean-token-sum-norm" of the loss.
    """

    name: ClassVar[str] = "dr_grpo"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        return Advantages(centred_on_group(*groups_of(responses)).float())


@dataclass
class QAE(Estimator):
    """(reward - the quantile_k quantile of the group) / (std + 1e-6): GRPO with a quantile for the mean.

    With rewards 0 and 1 and a share p of right responses: p <= 1 - quantile_k gives the right ones A > 0 and the wrong
    ones 0, a larger p the wrong ones A < 0 and the right ones 0.

    semantics  "paper" (default): the smallest reward that at least quantile_k of the group do not exceed.
               "reference": torch.quantile, linear between two rewards. The same for groups of 16 and 0.4 as published;
               of 8 it gives every response of a group with 5 right ones an advantage.
    A group of one keeps its reward.
    Source: Wu et al., Quantile Advantage Estimation, arXiv 2509.22611 (0.4; 0.6 where the entropy collapses); code:
        junkangwu/QAE, algorithm.quantile_k.
    """

    name: ClassVar[str] = "qae"

    quantile_k: float = 0.4
    semantics: str = "paper"

    def __post_init__(self) -> None:
        check.number("quantile_k", self.quantile_k)
        if not 0 < self.quantile_k < 1:
            raise ValueError(f"quantile_k must be greater than 0 and less than 1, got {self.quantile_k}")
        check.one_of("semantics", self.semantics, ("paper", "reference"))

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        groups = reward, group, size = groups_of(responses)
        baseline = group_quantile(*groups, self.quantile_k, interpolate=self.semantics == "reference")
        std = group_std(centred_on_group(*groups), group, size)
        return Advantages(((reward - torch.where(size > 1, baseline, 0.0)) / (std + STD_EPS)).float())


@dataclass
class RLOO(Estimator):
    """reward - mean of the group's other rewards. Ahmadian et al., "Back to Basics", arXiv 2402.14740."""

    name: ClassVar[str] = "rloo"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        return Advantages((centred_on_group(reward, group, size) * size / (size - 1).clamp(min=1)).float())


@dataclass
class GPG(Estimator):
    """(reward - group mean) * B / M, over the B responses of the rollout. The objective "gpg" is the method's loss.

    semantics  "paper" (default): M counts the responses of groups whose rewards differ, because the others have no
               gradient. "reference", as verl: M counts the responses with a reward other than 0.
    With M = 0 every advantage is 0.
    Source: Chu et al., arXiv 2504.02546 (accurate gradient estimation); verl "gpg".
    """

    name: ClassVar[str] = "gpg"

    semantics: str = "paper"

    def __post_init__(self) -> None:
        check.one_of("semantics", self.semantics, ("paper", "reference"))

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        centred = centred_on_group(reward, group, size)
        counted = reward != 0 if self.semantics == "reference" else group_sum(centred.abs(), group) > 0
        return Advantages((centred * len(reward) / counted.sum().clamp(min=1)).float())


@dataclass
class ReinforcePP(Estimator):
    """Rewards whitened over all response tokens of the batch. Hu, REINFORCE++, arXiv 2501.03262.

    Every token carries its response's undiscounted return, so a response weighs as its length:
    (reward - mean) / sqrt(var + 1e-8), mean and unbiased variance over tokens.
    """

    name: ClassVar[str] = "reinforce_pp"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, _, _ = groups_of(responses)
        return Advantages(whitened_over_tokens(reward, responses.length).float())


@dataclass
class ReinforcePPBaseline(Estimator):
    """reward - group mean, then whitened over all response tokens of the batch. Hu, REINFORCE++, arXiv 2501.03262."""

    name: ClassVar[str] = "reinforce_pp_baseline"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        return Advantages(whitened_over_tokens(centred_on_group(*groups_of(responses)), responses.length).float())


@dataclass
class OPO(Estimator):
    """reward - mean of the group's rewards weighted by the lengths of the responses.

    Source: Hao et al., "On-Policy RL with Optimal Reward Baseline", arXiv 2505.23585; verl "opo".
    """

    name: ClassVar[str] = "opo"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        length = responses.length.double()
        baseline = group_sum(length * reward, group) / group_sum(length, group).clamp(min=1)
        return Advantages((reward - torch.where(size > 1, baseline, 0.0)).float())


@dataclass
class ReMax(Estimator):
    """reward - the score of one greedy response to the same prompt, which the collector samples for it.

    Source: Li et al., arXiv 2310.10505, algorithm 1; verl "remax". The baseline is a score, without reward shaping.
    """

    name: ClassVar[str] = "remax"
    needs: ClassVar[frozenset[str]] = frozenset({"baseline"})

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, _, _ = groups_of(responses)
        if responses.baseline is None:
            raise ValueError("baseline of the responses must be given for the advantage remax, got None")
        check.finite("baseline", responses.baseline)
        return Advantages((reward - responses.baseline.double()).float())


@dataclass
class GRPOPassK(Estimator):
    """The best response of a group gets (its reward - the second best) / (group std + 1e-6), all others 0.

    A group whose best is not alone gets 0. `scale_rewards` "none" leaves the division out.
    Source: code: verl "grpo_passk", which cites arXiv 2503.19595.
    """

    name: ClassVar[str] = "grpo_passk"
    smallest_group: ClassVar[int] = 2

    scale_rewards: str = "group"

    def __post_init__(self) -> None:
        check.one_of("scale_rewards", self.scale_rewards, ("group", "none"))

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        _check_sizes(self, responses, size)
        best = group_max(reward, group)
        first = reward == best
        alone = first & (group_sum(first.double(), group) == 1)
        second = group_max(torch.where(first, -torch.inf, reward), group)
        gap = torch.where(alone, reward - second, 0.0)
        if self.scale_rewards == "group":
            gap = gap / (group_std(centred_on_group(reward, group, size), group, size) + STD_EPS)
        return Advantages(gap.float())


@dataclass
class GDPO(Estimator):
    """GRPO's advantage of each component of the reward, their weighted sum, whitened over all response tokens.

    The reward function returns a dict of components, the same names for every response; the score is their plain sum.
    weights  by component; None: 1 for each. Reward shaping and kl_in_reward change the sum, which this does not read;
             dynamic sampling (rollout.filter_zero_variance) looks at the sum.
    Source: GDPO, arXiv 2601.05242; code: NVlabs/GDPO, which whitens over tokens,
        (x - mean) / sqrt(var + 1e-8). TRL's multi_objective_aggregation="normalize_then_sum" takes the mean and the
        std over responses instead, and 1e-4 in both divisions.
    """

    name: ClassVar[str] = "gdpo"

    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for name, weight in (self.weights or {}).items():
            check.number(f"weights.{name}", weight)

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        _, group, size = groups_of(responses)
        if not responses.components:
            raise ValueError(
                "components of the responses must be given for the advantage gdpo: the reward function must return a "
                "dict of them; got one number"
            )
        weights = dict.fromkeys(responses.components, 1.0) if self.weights is None else self.weights
        if set(weights) != set(responses.components):
            raise ValueError(
                f"weights must name the components {', '.join(sorted(responses.components))}, got "
                f"{', '.join(sorted(weights)) or 'none'}"
            )
        total = torch.zeros(len(group), dtype=torch.float64, device=group.device)
        for name, component in responses.components.items():
            check.finite(f"components.{name}", component)
            centred = centred_on_group(component.double(), group, size)
            total += weights[name] * (centred / (group_std(centred, group, size) + STD_EPS))
        return Advantages(whitened_over_tokens(total, responses.length).float())


@dataclass
class OptimalTokenBaseline(Estimator):
    """[T]: reward - b_t, b_t = sum_i R_i W_{i,t} / (sum_i W_{i,t} + 1e-8) over the group's responses that reach t.

    W_{i,t} = sum_{j <= t} (1 - 2 pi_j + sum_v pi_v^2), the size of the gradient along the response so far, from the
    scored policy (`tokens.logprob` and `tokens.collision`). A group of one has no baseline.

    handle_zero_tail  where one response alone reaches t, its baseline is itself and its advantage 0; True sets the
                      baseline to 0 there.
    Source: code: verl "optimal_token_baseline", without its correction by squared importance weights.
    """

    name: ClassVar[str] = "optimal_token_baseline"

    handle_zero_tail: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.handle_zero_tail, bool):
            raise TypeError(f"handle_zero_tail must be true or false, got {self.handle_zero_tail!r}")

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        if tokens is None:
            raise ValueError(f"tokens must be given for the advantage {self.name}, got None")
        reader = f"the advantage {self.name}"
        logprob, collision = tokens.logprob.double(), tokens.given("collision", reader).double()
        sequence, position = tokens.given("sequence", reader), tokens.given("position", reader)
        row = _rows(responses.number, sequence)
        order = position.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]  # by response, then by position
        energy = (1 - 2 * logprob.exp() + collision)[order]
        path = energy.cumsum(0)
        start = torch.ones_like(path, dtype=torch.bool)
        start[1:] = row[order][1:] != row[order][:-1]
        before = (path - energy)[start].repeat_interleave(row[order].unique_consecutive(return_counts=True)[1])
        weight = torch.empty_like(path)
        weight[order] = path - before
        slot = (group[row] * (position.max() + 1) + position).unique(return_inverse=True)[1]  # (group, position)
        gain = group_sum(reward[row] * weight, slot)
        baseline = gain / (group_sum(weight, slot) + PATH_EPS)
        if self.handle_zero_tail:
            baseline = torch.where(group_sum(torch.ones_like(weight), slot) > 1, baseline, 0.0)
        return Advantages((reward[row] - torch.where(size[row] > 1, baseline, 0.0)).float())


@dataclass
class PSR(Estimator):
    """Positive sample reinforcement: correct responses (score 1) have A = reward, the others leave the loss.

    Source: Zhu et al., "The Surprising Effectiveness of Negative Reinforcement", arXiv 2506.01347;
        code: TianHongZXY/RLVR-Decomposed core_algos.py, where a score other than 0 and 1 falls through; here it is an
        error. Further the published code trims the kept responses to a multiple of the ranks.
    """

    name: ClassVar[str] = "psr"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, correct = _correctness(self, responses)
        return Advantages(torch.where(correct, reward, 0.0).float(), keep=correct)


@dataclass
class NSR(Estimator):
    """Negative sample reinforcement: incorrect responses (score 0) have A = reward - 1, the others leave the loss.

    Source: as PSR.
    """

    name: ClassVar[str] = "nsr"

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, correct = _correctness(self, responses)
        return Advantages(torch.where(correct, 0.0, reward - 1).float(), keep=~correct)


@dataclass
class WReinforce(Estimator):
    """Weighted-REINFORCE: A = weight * reward where the response is correct (score 1), reward - 1 where not.

    weight  0.1 as in the paper; the published configuration's default is 1, its scripts set 0.1. At weight 0 each
            token's gradient is NSR's, but the correct responses stay in the denominators.
    Source: as PSR.
    """

    name: ClassVar[str] = "w_reinforce"

    weight: float = 0.1

    def __post_init__(self) -> None:
        check.number("weight", self.weight, 0.0)

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, correct = _correctness(self, responses)
        return Advantages(torch.where(correct, self.weight * reward, reward - 1).float())


@dataclass
class MaxRL(Estimator):
    """(reward - group mean) / (group mean + 1e-6): for rewards 0 and 1, (n - k) / k and -1 with k of n correct.

    Rewards must be at least 0. A group without reward gets 0.
    Source: Tajwar et al., "Maximum Likelihood RL", arXiv 2602.02710; code: tajwarfahim/maxrl core_algos.py.
    """

    name: ClassVar[str] = "maxrl"
    smallest_group: ClassVar[int] = 2

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        reward, group, size = groups_of(responses)
        _check_sizes(self, responses, size)
        if check.readable(reward) and bool((reward < 0).any()):
            raise ValueError(f"reward must be at least 0 for the advantage maxrl, got {float(reward.min()):g}")
        return Advantages((centred_on_group(reward, group, size) / (group_sum(reward, group) / size + STD_EPS)).float())


@dataclass
class Prime(Estimator):
    """[T]: `entcov.objective.prime.prime_advantage` of the token rewards of a reward model, and of the outcomes.

    Source: Cui et al., "Process Reinforcement through Implicit Rewards", arXiv 2502.01456.
    """

    name: ClassVar[str] = "prime"
    needs: ClassVar[frozenset[str]] = frozenset({"token_reward"})

    reward_dpo_coef: float = 5.0
    reward_gt_coef: float = 5.0
    prime_norm: str = "batch_norm"

    def __post_init__(self) -> None:
        # The whitening takes a common factor away.
        check.number("reward_dpo_coef", self.reward_dpo_coef, 0.0, 1e6)
        check.number("reward_gt_coef", self.reward_gt_coef, 0.0, 1e6)
        check.one_of("prime_norm", self.prime_norm, NORMS)
        if self.reward_dpo_coef == self.reward_gt_coef == 0:
            raise ValueError("reward_dpo_coef and reward_gt_coef must not both be 0: every advantage would be 0")

    def __call__(self, responses: Responses, tokens: Tokens | None = None) -> Advantages:
        groups_of(responses)  # for its checks
        if tokens is None:
            raise ValueError(f"tokens must be given for the advantage {self.name}, got None")
        reward = tokens.given("token_reward", f"the advantage {self.name}")
        parts = responses.reward, responses.group, responses.length
        return Advantages(prime_advantage(reward, *parts, **vars(self)))


ADVANTAGES = Registry(
    "advantage",
    Estimator,
    (
        GRPO, DrGRPO, QAE, RLOO, GPG, ReinforcePP, ReinforcePPBaseline, OPO, ReMax, GRPOPassK, GDPO,
        OptimalTokenBaseline, PSR, NSR, WReinforce, MaxRL, Prime,
    ),
    "entcov.advantages",
)  # fmt: skip
make_estimator = ADVANTAGES.make


def _check_sizes(estimator: Estimator, responses: Responses, size: Tensor) -> None:
    small = size < estimator.smallest_group
    if check.readable(small) and bool(small.any()):
        raise ValueError(
            f"group must have at least {estimator.smallest_group} responses for the advantage {estimator.name}, group "
            f"{int(responses.group[small][0])} has {int(size[small][0])}"
        )


def _correctness(estimator: Estimator, responses: Responses) -> tuple[Tensor, Tensor]:
    """(reward float64, whether the score is 1), each [B]; a score other than 0 and 1 is an error."""
    reward, _, _ = groups_of(responses)
    other = (responses.score != 0) & (responses.score != 1)
    if check.readable(other) and bool(other.any()):
        raise ValueError(
            f"score must be 0 or 1 for the advantage {estimator.name}, which divides responses into incorrect and "
            f"correct ones; got {float(responses.score[other][0]):g}"
        )
    return reward, responses.score == 1


def _rows(number: Tensor, sequence: Tensor) -> Tensor:
    """[T] int64: where each token's response is in the table; every token must have one."""
    ordered, order = number.sort()
    at = torch.searchsorted(ordered, sequence).clamp(max=len(number) - 1)
    if check.readable(sequence) and bool((ordered[at] != sequence).any()):
        raise ValueError(
            f"sequence must hold numbers of the responses, got {int(sequence[ordered[at] != sequence][0])}"
        )
    return order[at]
