"""The models that the transformers backend trains: one process, any transformers causal language model."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entcov.objective.tokens import Totals
from entcov.rl.actor import PolicyActor
from entcov.rl.batch import Batch, micro_batches
from entcov.rl.config import ActorConfig
from entcov.rl.hf.model import adamw, batch_token_stats
from entcov.rl.reward_model import ImplicitRewardModel
from entcov.rl.trained_model import Metrics, Selections, TrainedModel
from entcov.stats.token_stats import TokenStats


class TransformersModel(TrainedModel):
    """The passes and the optimizer; `model` comes from `entcov.rl.hf.model.build_model`."""

    def __init__(self, model: nn.Module, config: ActorConfig, *arguments: Any, **options: Any):
        super().__init__(model, config, *arguments, **options)
        config = self.config  # a reward model's is not the actor's
        self.optimizer = adamw(model, config, lr=config.lr)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def anywhere(self, mask: Tensor) -> Tensor:
        return mask

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Without copies."""
        return ((name, weight.detach()) for name, weight in self.model.state_dict().items())

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "weight_version": self.weight_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved, (own, *_) = state["optimizer"], self.optimizer.param_groups
        groups = [group | {"fused": own["fused"]} for group in saved["param_groups"]]  # as this device has it
        self.optimizer.load_state_dict(saved | {"param_groups": groups})
        self.weight_version = state["weight_version"]

    def _division(self, batch: Batch) -> list[list[list[int]]]:
        limit, padded = self.config.micro_batch_tokens, not self.config.packing
        return [micro_batches(batch.lengths, limit, padded, batch.temperatures)]

    def _score(
        self, model: nn.Module, micro_batches: Sequence[Batch], names: Sequence[str], **options: Any
    ) -> list[Tensor]:
        stats = (self._stats(model, micro, **options) for micro in micro_batches)
        return [torch.stack([getattr(own, name) for name in names]) for own in stats]

    def _backward(self, batch: Batch, selections: list[Selections], totals: Totals) -> tuple[Metrics, Tensor]:
        metrics: Metrics = defaultdict(float)
        self.optimizer.zero_grad(set_to_none=True)
        for micro, chosen in zip(self._micro_batches(batch), selections, strict=True):
            stats = self._stats(self.model, micro, **self.clamp)
            loss, _, sums = self._loss(micro, micro.loss_mask, stats, chosen, totals)
            loss.backward()
            for name, value in sums.items():
                metrics[name] += value.double()
        return metrics, nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)

    def _take_step(self) -> None:
        self.optimizer.step()

    def _stats(self, model: nn.Module, micro: Batch, **options: Any) -> TokenStats:
        options = {"temperature": self.temperature_of(micro)} | options
        return batch_token_stats(model, micro, packing=self.config.packing, **options)


class TransformersActor(TransformersModel, PolicyActor):
    """Arguments as `PolicyActor`'s."""


class TransformersRewardModel(TransformersModel, ImplicitRewardModel):
    """Arguments as `ImplicitRewardModel`'s."""
