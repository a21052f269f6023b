"""A model with its optimizer that takes one step on a mini-batch: what the policy and a reward model have in common.

A backend adds the passes through its model: `_division`, `_score`, `_backward`, `_take_step`. What is trained
(entcov/rl/actor.py, entcov/rl/reward_model.py) adds `_loss`.

Batches are on the host, whole, in memory that the processes of a node share (`once_a_node`). A device has the sequences
of its own replica alone, so what it holds does not grow with the number of replicas.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from entcov.controls import Selection
from entcov.objective.tokens import Tokens, Totals
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig
from entcov.rl.interfaces import PolicyStats
from entcov.stats.token_stats import TokenStats

T = TypeVar("T")
Selections = list[Selection | None]  # of the loss tokens of one micro-batch: one entry a control
Metrics = dict[str, Tensor | float]


def read_together(metrics: Metrics) -> dict[str, float]:
    """Numbers in place of the tensors [], which are on one device: the host waits for it once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    numbers = torch.stack([value.detach().double() for value in tensors.values()]).tolist() if tensors else []
    return metrics | dict(zip(tensors, numbers, strict=True))


class TrainedModel(ABC):
    """The passes through a model and its optimizer steps, without a backend.

    Args:
        model: what is trained.
        config: of its optimizer and of the division into micro-batches.
        reference: a frozen model of the same kind to compare with.
        temperature: token probabilities are softmax(logits / temperature).
    """

    what: ClassVar[str]  # before the names of its metrics
    optimizer: Any  # has `param_groups`
    device: torch.device  # of the model
    sequence_group: ProcessGroup | None = None  # the ranks that a sequence's tokens are divided over
    batch_group: ProcessGroup | None = None  # one rank of each replica, in order: their micro-batches make up a batch
    replica: int = 0  # the number of this process's replica
    leads_node: bool = True  # whether it is this process that makes what exists once a node

    def __init__(self, model: nn.Module, config: ActorConfig, *, temperature: float, reference: nn.Module | None):
        self.model, self.config, self.temperature, self.reference = model, config, temperature, reference
        self.weight_version = 0  # optimizer steps taken
        self.clamp: dict[str, Any] = {}  # arguments of `token_stats` that the loss needs

    def _optimize(
        self, batch: Batch, selections: list[Selections], totals: Totals, step: int, found: Metrics | None = None
    ) -> dict[str, float]:
        """One optimizer step on a mini-batch; returns its metrics and those in `found`. Collective.

        All metrics are read from the device at once, before the step.

        The micro-batches' losses have the denominators of the mini-batch, so their gradients add up to its gradient.

        The learning rate warms up over `warmup_steps` rollouts, with one rate for all updates of a rollout, as in verl.
        verl counts the rollouts from 0, so that its first one changes no weight; here `step` counts from 1.

        Raises:
            RuntimeError: the gradient norm is not finite; nothing was updated.
        """
        lr = self.config.lr * min(1.0, step / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics, norm = self._backward(batch, selections, totals)
        metrics = read_together(metrics | {f"{self.what}/grad_norm": norm, f"{self.what}/lr": lr} | (found or {}))
        grad_norm = metrics[f"{self.what}/grad_norm"]
        if not math.isfinite(grad_norm):
            raise RuntimeError(
                f"step {step}: the gradient norm must be finite, got {grad_norm}; the weights were not changed "
                f"({self.what}). Look for NaN logits (half precision overflow, a learning rate too high) in the last "
                "metrics. On GPUs, ranks called differently get NaN too; TORCH_DISTRIBUTED_DEBUG=DETAIL names what "
                "differs"
            )
        self._take_step()
        self.weight_version += 1
        return metrics

    def once_a_node(self, make: Callable[[], T]) -> T:
        """See `entcov.rl.interfaces.Actor`: here the process is alone."""
        return make()

    def temperature_of(self, micro: Batch) -> float:
        """The temperature of a micro-batch's token probabilities."""
        return self.temperature

    @abstractmethod
    def _loss(
        self, micro: Batch, at: Tensor, stats: TokenStats, selections: Selections, totals: Totals
    ) -> tuple[Tensor, Tokens, dict[str, Tensor]]:
        """(loss, its tokens, metrics) of the entries `at` of a micro-batch; `stats` and `selections` hold these.

        Losses and metrics add up to those of the mini-batch.
        """

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """Those of this process's replica, on its device."""
        return [batch.subset(group).to(self.device) for group in self._division(batch)[self.replica]]

    def _forward(self, model: nn.Module, batch: Batch, names: Sequence[str], **options: Any) -> PolicyStats:
        """What `_score` says of the whole batch, each [N] on the host: 0 outside the loss mask. Collective.

        One replica after the other tells its share, so that a device holds no more than two shares at a time. The
        whole table is on the host once a node.
        """
        own = torch.cat(self._score(model, self._micro_batches(batch), names, **options), 1)
        counts = batch.loss_tokens_by_sequence()
        table = torch.zeros((len(names), len(batch.tokens) if self.leads_node else 0))
        for replica, share in enumerate(self._division(batch)):
            sequences = np.array([s for group in share for s in group], dtype=np.int64)
            values = own if replica == self.replica else own.new_empty(len(own), counts[sequences].sum())
            if self.batch_group is not None:
                dist.broadcast(values, dist.get_process_group_ranks(self.batch_group)[replica], self.batch_group)
            if self.leads_node:
                index = batch.positions(sequences)
                table[:, index[batch.loss_mask[index]]] = values.cpu()
        return self.once_a_node(lambda: dict(zip(names, table, strict=True)))

    @abstractmethod
    def _division(self, batch: Batch) -> list[list[list[int]]]:
        """The batch's sequences by replica and micro-batch. Equal in all processes."""

    @abstractmethod
    def _score(
        self, model: nn.Module, micro_batches: Sequence[Batch], names: Sequence[str], **options: Any
    ) -> list[Tensor]:
        """Fields of `token_stats(..., **options)` of each micro-batch's loss tokens: [names, k] on the device.

        On every rank of the replica. Collective. The temperature is the model's, unless the options have another.
        """

    @abstractmethod
    def _backward(self, batch: Batch, selections: list[Selections], totals: Totals) -> tuple[Metrics, Tensor | float]:
        """Leaves the mini-batch's gradient in the model; its metrics, and the norm before clipping. Collective."""

    @abstractmethod
    def _take_step(self) -> None:
        """The optimizer's step along the gradient of `_backward`, clipped to `config.max_grad_norm`. Collective."""
