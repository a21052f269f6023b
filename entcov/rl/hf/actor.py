"""The torch actor: one process, any transformers causal language model. It scores rollouts and updates the policy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entcov.controls import Control, clamp_arguments, needs, select
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.rl.batch import Batch, micro_batches
from entcov.rl.config import ActorConfig
from entcov.rl.hf.model import batch_token_stats


class TorchActor:
    """Owns the policy's weights and its optimizer.

    The loop talks to it through `score`, `update`, `named_weights`, `weight_version`, `device` and the state dicts
    alone, so that an actor on another engine can take its place.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ActorConfig,
        loss: PolicyLossConfig,
        controls: Sequence[Control],
        *,
        temperature: float,
        reference: nn.Module | None = None,
    ):
        if loss.kl_coef > 0 and reference is None:
            raise ValueError(f"reference: a reference model is needed where loss.kl_coef > 0, got {loss.kl_coef}")
        self.model, self.reference = model, reference
        self.config, self.loss, self.controls = config, loss, list(controls)
        self.temperature = temperature
        self.weight_version = 0  # optimizer steps taken
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self._clamp = clamp_arguments(self.controls)

    @property
    def device(self) -> torch.device:
        """Where `score` and `update` want their batches."""
        return self.model.device

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its name in a Hugging Face checkpoint, for samplers that keep a copy; no copies."""
        return ((name, weight.detach()) for name, weight in self.model.state_dict().items())

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Statistics of the current policy at every response token of `batch`, without gradient.

        Returns:
            [N] float32 tensors, 0 where `batch.loss_mask` is False: logprob, entropy and entropy_drift (nats),
            clamped_entropy if a control needs it, ref_logprob if there is a reference model.
        """
        out: dict[str, Tensor] = {}

        def place(name: str, index: Tensor, value: Tensor) -> None:
            out.setdefault(name, torch.zeros(len(batch.tokens), device=index.device))[index] = value

        for part, index in self._micro_batches(batch):
            where = index[part.loss_mask]
            stats = self._stats(self.model, part, moments=True, **self._clamp)
            for name in ("logprob", "entropy", "entropy_drift"):
                place(name, where, getattr(stats, name))
            if self._clamp:
                place("clamped_entropy", where, stats.clamped_entropy)
            if self.reference is not None:
                place("ref_logprob", where, self._stats(self.reference, part).logprob)
        return out

    def update(self, batch: Batch, *, step: int) -> dict[str, float]:
        """One optimizer step on a mini-batch. `batch` carries `old_logprob` (and `ref_logprob` where kl_coef > 0).

        Selections of the controls are made over the whole mini-batch, under the current policy, before the first
        backward pass; the micro-batches' losses have global denominators and add up. Nothing is updated if the gradient
        is not finite.

        Args:
            step: the loop's step, for messages.

        Raises:
            RuntimeError: the gradient norm is not finite.
        """
        lr = self.config.lr * min(1.0, (self.weight_version + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics: dict[str, float] = defaultdict(float)
        parts = list(self._micro_batches(batch))
        selections, chosen = self._select(batch, parts)
        totals = Totals(num_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        self.optimizer.zero_grad(set_to_none=True)
        for (part, _), selection in zip(parts, selections, strict=True):
            stats = self._stats(self.model, part, **self._clamp)
            tokens = _tokens(part, stats.logprob, entropy=stats.entropy, clamped_entropy=stats.clamped_entropy)
            loss, partial = policy_loss(tokens, self.loss, totals=totals, controls=self.controls, selections=selection)
            loss.backward()
            for name, value in partial.items():
                metrics[name] += float(value)
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise RuntimeError(
                f"step {step}: the gradient norm must be finite, got {grad_norm}; the weights were not changed. Look "
                "for NaN logits (half precision overflow, a learning rate too high) in the last metrics"
            )
        self.optimizer.step()
        self.weight_version += 1
        metrics |= {name: float(value) for name, value in chosen.items()}
        return metrics | {"actor/grad_norm": grad_norm, "actor/lr": lr}

    def state_dict(self) -> dict[str, Any]:
        """All but the weights: what `load_state_dict` needs to go on bit for bit."""
        return {"optimizer": self.optimizer.state_dict(), "weight_version": self.weight_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.weight_version = state["weight_version"]

    def _select(self, batch: Batch, parts: list) -> tuple[list[list[Tensor | None]], dict[str, Tensor]]:
        """The controls' selections for every micro-batch, and their metrics."""
        if "selection" not in needs(self.controls):
            return [[None] * len(self.controls) for _ in parts], {}
        # On the first update after a rollout the policy is still the one that was scored.
        fresh = batch.scored_version == self.weight_version
        logprob = batch.old_logprob if fresh else self.score(batch)["logprob"]
        tokens = [_tokens(part, logprob[index[part.loss_mask]]) for part, index in parts]
        return select(self.controls, tokens, step=self.weight_version, config=self.loss)

    def _stats(self, model: nn.Module, part: Batch, **options):
        return batch_token_stats(model, part, packing=self.config.packing, temperature=self.temperature, **options)

    def _micro_batches(self, batch: Batch):
        """(micro-batch on the model's device, positions of its tokens in `batch`)."""
        starts = [0]
        for n in batch.lengths:
            starts.append(starts[-1] + n)
        for group in micro_batches(batch.lengths, self.config.micro_batch_tokens, padded=not self.config.packing):
            index = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in group])
            yield batch.subset(group), index.to(batch.tokens.device)


def _tokens(part: Batch, logprob: Tensor, **statistics: Tensor | None) -> Tokens:
    """The loss's view of the response tokens of a micro-batch; `logprob` and `statistics` hold one entry each."""
    at = part.loss_mask
    return Tokens(
        logprob=logprob,
        old_logprob=part.old_logprob[at],
        advantage=part.advantage[at],
        loss_mask=at[at],
        ref_logprob=None if part.ref_logprob is None else part.ref_logprob[at],
        rollout_logprob=part.rollout_logprob[at],
        sequence_length=part.sequence_length[at],
        token_id=part.token_id[at],
        **statistics,
    )
