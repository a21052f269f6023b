"""The models that the Megatron backend trains, over any tensor, pipeline, context and data parallel layout: the policy,
and PRIME's reward model.

Every rank of the job makes every call with the same arguments, in its node's memory. Its device has the sequences of
its own replica, and computes its own share of these. Metrics and updates are those of the transformers backend, to
rounding.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core import LLMBridge
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from entcov.objective.tokens import Totals
from entcov.rl.actor import PolicyActor
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig, MegatronConfig
from entcov.rl.reward_model import ImplicitRewardModel
from entcov.rl.trained_model import Metrics, Selections, TrainedModel
from entcov.stats.token_stats import TokenStats
from megatron_integration.adaptors import logits_stats, per_token_loss
from megatron_integration.bridge import named_weights
from megatron_integration.micro_batches import (
    MicroBatch,
    assign_to_replicas,
    build_inputs,
    dummy_micro_batch,
    padded_length,
)
from megatron_integration.process_groups import ProcessGroups


class MegatronModel(TrainedModel):
    """Owns this rank's shard of a model and of its optimizer.

    Weight decay leaves biases and norms alone, as Megatron-Core's does; `TransformersActor` decays every weight.

    Args:
        model: this rank's shard, from `build_model`, with its weights loaded.
        bridge: its converter, of this model alone: the schedules find the optimizer in its configuration.
        adam_eps: Adam's epsilon. Where gradients are not larger than it, their rounding may move a weight by up to lr.
    """

    def __init__(
        self,
        model: MegatronModule,
        bridge: LLMBridge,
        groups: ProcessGroups,
        config: ActorConfig,
        megatron: MegatronConfig,
        *arguments: Any,
        adam_eps: float = 1e-8,
        **options: Any,
    ):
        super().__init__(model, config, *arguments, **options)
        config = self.config  # a reward model's is not the actor's
        if megatron.optimizer_offload and groups.device.type != "cuda":
            raise ValueError(
                f"megatron.optimizer_offload: needs a GPU to move optimizer state away from, got "
                f"{megatron.optimizer_offload} on {groups.device}"
            )
        self.bridge, self.groups, self.megatron = bridge, groups, megatron
        self.sequence_group, self.batch_group, self.replica = groups.context_group, groups.batch_group, groups.replica
        self.leads_node, self.once_a_node = groups.node.leads, groups.node.once
        self.selects_by_old_logprob = megatron.selection_logprob == "old"
        # A sequence is padded to a multiple of its parts: 2 C chunks (context parallelism), TP (sequence).
        size = megatron.context_parallel
        self._unit = 2 * size if size > 1 else 1
        if megatron.sequence_parallel:
            self._unit = math.lcm(self._unit, size * megatron.tensor_parallel)
        with groups.running():
            self.model = DistributedDataParallel(
                bridge.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=megatron.distributed_optimizer,
                    overlap_grad_reduce=megatron.overlap,
                    overlap_param_gather=megatron.overlap,
                ),
                model,
            )
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    adam_beta1=config.betas[0],
                    adam_beta2=config.betas[1],
                    adam_eps=adam_eps,
                    weight_decay=config.weight_decay,
                    clip_grad=config.max_grad_norm,
                    bf16=bridge.dtype is torch.bfloat16,
                    params_dtype=bridge.dtype,
                    use_distributed_optimizer=megatron.distributed_optimizer,
                    overlap_param_gather=megatron.overlap,
                    use_precision_aware_optimizer=megatron.optimizer_offload > 0,  # offloading asks for it
                    optimizer_cpu_offload=megatron.optimizer_offload > 0,
                    optimizer_offload_fraction=megatron.optimizer_offload,
                    overlap_cpu_optimizer_d2h_h2d=megatron.optimizer_offload > 0,
                ),
                [self.model],
            )
        bridge.config.finalize_model_grads_func = finalize_model_grads
        bridge.config.grad_scale_func = self.optimizer.scale_loss
        if megatron.overlap:
            bridge.config.no_sync_func = self.model.no_sync

    @property
    def device(self) -> torch.device:
        return self.groups.device

    def anywhere(self, mask: Tensor) -> Tensor:
        found = mask.to(torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.groups.control)
        return found.bool()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.gather_parameters()
        return named_weights(self.bridge, self.model, self.groups)

    def gather_parameters(self) -> None:
        """Gathers the parameters of the last step, which overlap would gather during the next forward pass."""
        if self.megatron.overlap:
            with self.groups.running():
                self.model.start_param_sync(force_sync=True)

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks. `megatron_integration.checkpoint` stores the shards of weights and optimizer."""
        return {"weight_version": self.weight_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the shards were loaded from the same checkpoint."""
        if state["weight_version"] != self.weight_version:
            raise RuntimeError(
                f"checkpoint: its state is that of optimizer step {state['weight_version']}, the weights that were "
                f"loaded are those of step {self.weight_version}"
            )

    # ---- division of the batch --------------------------------------------------------------------------------------

    def _division(self, batch: Batch) -> list[list[list[int]]]:
        lengths = tuple(padded_length(n, self._unit) for n in batch.lengths)
        return assign_to_replicas(
            lengths, self.groups.replicas, self.config.micro_batch_tokens, not self.config.packing, batch.temperatures
        )

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """A replica without a sequence gets one without a loss: pipelines and collectives need a pass."""
        return super()._micro_batches(batch) or [dummy_micro_batch(batch).to(self.device)]

    def _inputs(self, micro_batches: Sequence[Batch]) -> list[MicroBatch]:
        """The model's inputs for micro-batches of this rank's replica."""
        options = {"unit": self._unit, "packing": self.config.packing}
        ranks = {"context_parallel": self.groups.context_parallel, "context_rank": self.groups.context_rank}
        return [build_inputs(micro, **options, **ranks) for micro in micro_batches]

    # ---- passes through the model -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(
        self, model: MegatronModule, micro_batches: Sequence[Batch], names: Sequence[str], **options: Any
    ) -> list[Tensor]:
        inputs = self._inputs(micro_batches)

        def collect(micro: MicroBatch, _, logits: Tensor, non_loss_data: bool = True) -> Tensor:
            stats = self._stats(micro, logits, **options)
            return torch.stack([getattr(stats, name) for name in names])

        with self.groups.running():
            found = self._run(model, [(micro, None) for micro in inputs], collect, forward_only=True)
        sizes = [len(micro.tokens) for micro in micro_batches]
        table = torch.zeros((len(names), sum(sizes)), device=self.device)
        parts = table.split(sizes, 1)
        if self.groups.last_stage:
            for part, micro, values in zip(parts, inputs, found, strict=True):
                part[:, micro.rows] = values
            if self.groups.context_group is not None:  # every token is on one of these ranks: sums with zeros
                dist.all_reduce(table, group=self.groups.context_group)
        self._from_last_stage(table)
        return [part[:, micro.loss_mask] for part, micro in zip(parts, micro_batches, strict=True)]

    def _backward(self, batch: Batch, selections: list[Selections], totals: Totals) -> tuple[Metrics, float]:
        with self.groups.running():
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            work = list(zip(self._inputs(self._micro_batches(batch)), selections, strict=True))
            metrics = self._run(self.model, work, partial(self._logits_loss, totals=totals), forward_only=False)
            self.optimizer.prepare_grads()
            self._grad_norm = float(self.optimizer.get_grad_norm())
        return self._add_up(metrics), self._grad_norm

    def _take_step(self) -> None:
        """What the optimizer's own `step` does after it has computed the norm, which `_backward` has done."""
        with self.groups.running():
            for optimizer in self.optimizer.chained_optimizers:
                if parameters := optimizer.get_parameters():
                    clip_grad_by_total_norm_fp32(
                        parameters, self.config.max_grad_norm, self._grad_norm,
                        use_decoupled_grad=optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                    )  # fmt: skip
            self.optimizer.step_with_ready_grads()

    def _logits_loss(self, micro: MicroBatch, selections: Selections, logits: Tensor, *, totals: Totals):
        stats = self._stats(micro, logits, **self.clamp)
        own = [micro.local(selection) for selection in selections]
        loss, tokens, metrics = self._loss(micro.sequences, micro.rows, stats, own, totals)
        return per_token_loss(loss, tokens, totals, metrics)

    def _stats(self, micro: MicroBatch, logits: Tensor, **options: Any) -> TokenStats:
        """Statistics of this rank's loss tokens, [k] each, in the logits' order."""
        options = {"temperature": self.temperature_of(micro.sequences)} | options
        stats = logits_stats(logits, micro.target, vocab_size=self.bridge.hf_config.vocab_size, **options)
        return TokenStats(*(None if value is None else value.flatten()[micro.places] for value in stats))

    def _run(
        self, model: MegatronModule, work: list[tuple[MicroBatch, Any]], use: Callable, *, forward_only: bool
    ) -> list:
        """Runs Megatron's schedule over the micro-batches. Last stage: what `use(micro, extra, logits)` reports."""
        half = isinstance(model.module if model is self.model else model, Float16Module)
        keep = {"fp32_output": False} if half else {}

        def step(items: Iterator[tuple[MicroBatch, Any]], stage: MegatronModule):
            micro, extra = next(items)
            return stage(**micro.inputs, **keep), partial(use, micro, extra)

        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(work),
            model=[model],
            num_microbatches=len(work),
            seq_length=work[0][0].target.numel(),  # not used (shapes travel with the activations), but required
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    # ---- across ranks -----------------------------------------------------------------------------------------------

    def _add_up(self, metrics: list[dict[str, Tensor]]) -> Metrics:
        """The sums over micro-batches, data and context parallel ranks, on every rank."""
        sums: dict[str, Any] = defaultdict(float)
        for item in metrics:
            for name, value in item.items():
                sums[name] += value
        names = [sorted(sums)]
        if dist.get_world_size(self.groups.pipeline_group) > 1:
            source = dist.get_process_group_ranks(self.groups.pipeline_group)[-1]
            dist.broadcast_object_list(names, src=source, group=self.groups.pipeline_group)
        values = torch.zeros(len(names[0]), dtype=torch.float64, device=self.device)
        if self.groups.last_stage:
            values = torch.stack([sums[name].double() for name in names[0]])
            dist.all_reduce(values, group=self.groups.data_group)
        self._from_last_stage(values)
        return dict(zip(names[0], values, strict=True))

    def _from_last_stage(self, values: Tensor) -> None:
        group = self.groups.pipeline_group
        if dist.get_world_size(group) > 1:
            dist.broadcast(values, src=dist.get_process_group_ranks(group)[-1], group=group)


class MegatronActor(MegatronModel, PolicyActor):
    """Arguments as `PolicyActor`'s, after those of `MegatronModel`; the reference has the policy's layout."""


class MegatronRewardModel(MegatronModel, ImplicitRewardModel):
    """Arguments as `ImplicitRewardModel`'s, after those of `MegatronModel`."""
