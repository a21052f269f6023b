"""PRIME's implicit process reward model, without a backend: trained on every rollout, it gives each token a reward.

entcov/objective/prime.py has the formulas and the source.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entcov.objective.prime import check_outcomes, ordered_pairs, outcome_loss, token_rewards
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import Tokens, Totals
from entcov.rl.batch import Batch, mini_batches
from entcov.rl.config import ActorConfig, PrimeConfig
from entcov.rl.trained_model import TrainedModel
from entcov.stats.token_stats import TokenStats


class ImplicitRewardModel(TrainedModel):
    """An `entcov.rl.interfaces.RewardModel` without its model's passes.

    Args:
        model: at the start of a run equal to `reference`.
        config: the actor's; the optimizer's settings are those of `prime`.
        reference: frozen.
    """

    what = "reward_model"

    def __init__(self, model: nn.Module, config: ActorConfig, prime: PrimeConfig, *, reference: nn.Module):
        own = {name: getattr(prime, name) for name in ("lr", "warmup_steps", "weight_decay", "max_grad_norm")}
        # The authors' reward model reads plain logits, whatever the rollouts' temperature.
        super().__init__(model, replace(config, **own), temperature=1.0, reference=reference)
        self.prime = prime

    def token_rewards(self, batch: Batch, *, step: int) -> tuple[Tensor, dict[str, float]]:
        """The rewards of the batch's tokens, and metrics; takes the model's optimizer steps as `prime.update` says.

        "before": the steps precede the rewards. "after": they follow, so that the rewards are those of the model that
        the step began with. "none": there are no steps. Collective; every rank gets the whole batch's rewards.

        Args:
            batch: the whole rollout, before anything was dropped. An outcome is a response's score.
            step: the loop's step, for messages.
        Returns: ([N] float32, 0 where `loss_mask` is False; metrics).
        Raises: ValueError: a score outside [0, 1]. RuntimeError: a gradient that is not finite; earlier mini-batches
            have changed the weights by then.
        """
        check_outcomes(batch.responses.score.cpu())
        # Here the batch's reference is this model's, at temperature 1.
        batch = replace(batch, ref_logprob=self._logprob(self.reference, batch))
        metrics = self._update(batch, step) if self.prime.update == "before" else {}
        logprob = self._logprob(self.model, batch)
        if self.prime.update == "after":
            metrics = self._update(batch, step)
        rewards, found = self.once_a_node(lambda: self._rewards(batch, logprob))
        return rewards, metrics | found

    def _rewards(self, batch: Batch, logprob: Tensor) -> tuple[Tensor, dict[str, float]]:
        """([N] rewards, their metrics) from the log-probabilities [N] of the model and, in the batch, its reference."""
        at, responses = batch.loss_mask, batch.responses
        log_ratio = logprob[at] - batch.ref_logprob[at]
        rewards = torch.zeros_like(logprob)
        rewards[at] = token_rewards(log_ratio, responses.length, self.prime.beta_train)
        score = SequenceIndex(batch.sequence[at], batch.num_sequences).totals(log_ratio)
        return rewards, {
            "reward_model/reward": float(rewards.double().sum()) / batch.num_sequences,
            "reward_model/raw_reward": float(score.mean()),
            "reward_model/dpo_acc": ordered_pairs(score, responses.score, responses.group),
            "reward_model/dpo_acc_abs": float(((score > 0) == (responses.score > 0.5)).double().mean()),
        }

    def _update(self, batch: Batch, step: int) -> dict[str, float]:
        """An optimizer step on each mini-batch; means of their metrics."""
        parts = mini_batches(batch.responses.group.tolist(), self.prime.updates_per_rollout)
        found = [self._step(self.once_a_node(partial(batch.subset, part)), step) for part in parts]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    def _step(self, batch: Batch, step: int) -> dict[str, float]:
        totals = Totals(num_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        return self._optimize(batch, [[] for _ in self._micro_batches(batch)], totals, step)

    def _loss(
        self, micro: Batch, at: Tensor, stats: TokenStats, selections: Sequence[Any], totals: Totals
    ) -> tuple[Tensor, Tokens, dict[str, Tensor]]:
        """The mean over responses of their cross-entropy, as a loss of tokens.

        Its derivative by every log-probability of a response is the same number, which needs the response's sum alone.
        So tokens of a response may be on several ranks.
        """
        beta, logprob, reference = self.prime.beta_train, stats.logprob, micro.ref_logprob[at]
        sequence = micro.sequence[at]
        logit = beta * SequenceIndex(sequence, micro.num_sequences, self.sequence_group).totals(logprob - reference)
        outcome = micro.responses.score.double()
        loss, slope = outcome_loss(logit, outcome)
        slope = (beta * slope / totals.num_sequences)[sequence].to(logprob.dtype)
        share = (micro.sequence_length[at].double() * totals.num_sequences).reciprocal()  # of a token in the mean
        right = (logit > 0) == (outcome > 0.5)
        tokens = Tokens(logprob=logprob, old_logprob=reference, advantage=slope, loss_mask=micro.loss_mask[at])
        return (slope * logprob).sum(), tokens, {
            "reward_model/dpo_loss": (share * loss[sequence]).sum(),
            "reward_model/dpo_acc_abs_before": (share * right[sequence].double()).sum(),
        }  # fmt: skip

    @torch.no_grad()
    def _logprob(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._forward(model, batch, ["logprob"])["logprob"]
