"""The actor on Megatron-Core: scores rollouts and updates the policy over any tensor, pipeline, context and data split.

It stands in `TorchActor`'s place: the same methods, the same metrics, the same update up to rounding. Every rank of the
job makes every call with the same arguments; each takes its own share of the batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core import LLMBridge
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from entcov.controls import Control, clamp_arguments, needs, select
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.rl.batch import Batch
from entcov.rl.config import ActorConfig, MegatronConfig
from megatron_integration.adaptors import logits_stats, per_token_loss
from megatron_integration.batches import MicroBatch, divide, lay_out, silent
from megatron_integration.layout import Layout
from megatron_integration.model import named_weights


class MegatronActor:
    """Owns this rank's part of the policy and of its optimizer.

    Selections of the controls are computed by every rank from the log-probabilities of the whole mini-batch, which all
    ranks hold: the same integers and the same result everywhere, and nothing to communicate. Weight decay leaves biases
    and norms alone, as Megatron-Core's does; `TorchActor` decays every weight.

    Args:
        model: this rank's part, from `build_model`, with its weights loaded.
        bridge: its converter.
        reference: a frozen model of the same layout, where `loss.kl_coef` > 0.
        adam_eps: Adam's epsilon. Rounding moves weights by up to lr where gradients are as small as it is.
    """

    def __init__(
        self,
        model: MegatronModule,
        bridge: LLMBridge,
        layout: Layout,
        config: ActorConfig,
        megatron: MegatronConfig,
        loss: PolicyLossConfig,
        controls: Sequence[Control],
        *,
        temperature: float,
        reference: MegatronModule | None = None,
        adam_eps: float = 1e-8,
    ):
        if loss.kl_coef > 0 and reference is None:
            raise ValueError(f"reference: a reference model is needed where loss.kl_coef > 0, got {loss.kl_coef}")
        if megatron.optimizer_offload and layout.device.type != "cuda":
            raise ValueError(
                f"megatron.optimizer_offload: needs a GPU to move optimizer state away from, got "
                f"{megatron.optimizer_offload} on {layout.device}"
            )
        self.bridge, self.layout = bridge, layout
        self.config, self.megatron, self.loss, self.controls = config, megatron, loss, list(controls)
        self.temperature = temperature
        self.weight_version = 0  # optimizer steps taken
        self.reference = reference
        self._clamp = clamp_arguments(self.controls)
        # What splits a sequence must divide its length: context parallelism takes 2 C chunks, sequence parallelism TP.
        size = megatron.context_parallel
        self._unit = 2 * size if size > 1 else 1
        if megatron.sequence_parallel:
            self._unit = math.lcm(self._unit, size * megatron.tensor_parallel)
        with layout.running():
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
        """Where `score` and `update` want their batches."""
        return self.layout.device

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, under its Hugging Face name. Collective: every rank iterates to the end."""
        self.gather_parameters()
        return named_weights(self.bridge, self.model, self.layout)

    def gather_parameters(self) -> None:
        """Waits for the parameters of the last step, which overlap would fetch during the next forward pass."""
        if self.megatron.overlap:
            with self.layout.running():
                self.model.start_param_sync(force_sync=True)

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Statistics of the current policy at every response token of `batch`, without gradient.

        Returns, on every rank, for the whole batch:
            [N] float32 tensors, 0 where `batch.loss_mask` is False: logprob, entropy and entropy_drift (nats),
            clamped_entropy if a control needs it, ref_logprob if there is a reference model.
        """
        names = ["logprob", "entropy", "entropy_drift", *(["clamped_entropy"] if self._clamp else [])]
        own, _ = self._shares(batch)
        scored = self._forward(self.model, own, names, len(batch.tokens), moments=True, **self._clamp)
        if self.reference is not None:
            reference = self._forward(self.reference, own, ["logprob"], len(batch.tokens))
            scored["ref_logprob"] = reference["logprob"]
        return scored

    def update(self, batch: Batch, *, step: int) -> dict[str, float]:
        """One optimizer step on a mini-batch, as `TorchActor.update`. Returns the same metrics on every rank.

        Raises:
            RuntimeError: the gradient norm is not finite, on every rank; nothing was updated.
        """
        lr = self.config.lr * min(1.0, (self.weight_version + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        own, everyones = self._shares(batch)
        selections, chosen = self._select(batch, everyones)
        totals = Totals(num_tokens=batch.num_loss_tokens, num_sequences=batch.num_sequences)
        if not everyones[self.layout.replica]:  # this replica runs a silent sequence
            work = [(own[0], [self._nothing_selected(control, own[0]) for control in self.controls])]
        else:
            first = sum(len(parts) for parts in everyones[: self.layout.replica])
            work = list(zip(own, selections[first : first + len(own)], strict=True))
        with self.layout.running():
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            partials = self._run(self.model, work, partial(self._loss, totals=totals), forward_only=False)
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(grad_norm):
                raise RuntimeError(
                    f"step {step}: the gradient norm must be finite, got {grad_norm}; the weights were not changed. "
                    "Look for NaN logits (half precision overflow, a learning rate too high) in the last metrics"
                )
            self.optimizer.step()
        self.weight_version += 1
        metrics = self._add_up(partials)
        metrics |= {name: float(value) for name, value in chosen.items()}
        return metrics | {"actor/grad_norm": grad_norm, "actor/lr": lr}

    def state_dict(self) -> dict[str, Any]:
        """What all ranks share. Weights and optimizer are sharded, and stored by `megatron_integration.sharded`."""
        return {"weight_version": self.weight_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that the sharded part was loaded from the same checkpoint."""
        if state["weight_version"] != self.weight_version:
            raise RuntimeError(
                f"checkpoint: its state is that of optimizer step {state['weight_version']}, the weights that were "
                f"loaded are those of step {self.weight_version}"
            )

    # ---- division of the batch --------------------------------------------------------------------------------------

    def _shares(self, batch: Batch) -> tuple[list[MicroBatch], list[list[tuple[Batch, Tensor]]]]:
        """This replica's micro-batches, and the (sequences, their places in `batch`) of every replica's.

        A replica without a sequence runs one without a loss: pipelines and collectives need a pass.
        """
        starts = torch.tensor([0, *batch.lengths]).cumsum(0).tolist()
        padded = tuple(-(-n // self._unit) * self._unit for n in batch.lengths)
        groups = divide(padded, self.layout.replicas, self.config.micro_batch_tokens, not self.config.packing)

        def take(group: list[int]) -> tuple[Batch, Tensor]:
            index = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in group])
            return batch.subset(group), index.to(batch.tokens.device)

        everyones = [[take(group) for group in replica] for replica in groups]
        nothing = torch.zeros(0, dtype=torch.int64, device=batch.tokens.device)
        own = everyones[self.layout.replica] or [(silent(batch), nothing)]
        place = {"context_parallel": self.layout.context_parallel, "context_rank": self.layout.context_rank}
        micro = [lay_out(*item, unit=self._unit, packing=self.config.packing, **place) for item in own]
        return micro, everyones

    def _select(self, batch: Batch, everyones: list) -> tuple[list[list[Tensor | None]], dict[str, Tensor]]:
        """The controls' selections for the micro-batches of all replicas in order, and their metrics."""
        parts = [part for replica in everyones for part in replica]
        if "selection" not in needs(self.controls):
            return [[None] * len(self.controls) for _ in parts], {}
        fresh = batch.scored_version == self.weight_version
        if fresh and self.megatron.selection_logprob == "old":
            logprob = batch.old_logprob
        else:
            own, _ = self._shares(batch)
            logprob = self._forward(self.model, own, ["logprob"], len(batch.tokens))["logprob"]
        tokens = [_tokens(part, at := part.loss_mask.nonzero()[:, 0], logprob[index[at]]) for part, index in parts]
        return select(self.controls, tokens, step=self.weight_version, config=self.loss)

    @staticmethod
    def _nothing_selected(control: Control, micro: MicroBatch) -> Tensor | None:
        if "selection" not in control.needs:
            return None
        return torch.zeros(micro.part.num_loss_tokens, dtype=torch.bool, device=micro.index.device)

    # ---- passes through the model -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(
        self, model: MegatronModule, own: list[MicroBatch], names: list[str], length: int, **options: Any
    ) -> dict[str, Tensor]:
        """The statistics `names` at all response tokens of the batch of `length` tokens, on every rank."""

        def collect(micro: MicroBatch, _, logits: Tensor, non_loss_data: bool = True) -> Tensor:
            stats = self._stats(micro, logits, **options)
            return torch.stack([getattr(stats, name) for name in names])

        with self.layout.running():
            found = self._run(model, [(micro, None) for micro in own], collect, forward_only=True)
        table = torch.zeros((len(names), length), device=self.device)
        if self.layout.last_stage:
            for micro, values in zip(own, found, strict=True):
                if len(micro.index):
                    table[:, micro.index[micro.rows]] = values
            dist.all_reduce(table, group=self.layout.data_group)  # every token is on one rank: sums with zeros
        self._from_last_stage(table)
        return dict(zip(names, table, strict=True))

    def _loss(self, micro: MicroBatch, selection: list[Tensor | None], logits: Tensor, *, totals: Totals):
        stats = self._stats(micro, logits, **self._clamp)
        tokens = _tokens(
            micro.part, micro.rows, stats.logprob, entropy=stats.entropy, clamped_entropy=stats.clamped_entropy
        )
        chosen = [micro.local(mask) for mask in selection]
        loss, metrics = policy_loss(tokens, self.loss, totals=totals, controls=self.controls, selections=chosen)
        return per_token_loss(loss, tokens, totals, metrics)

    def _stats(self, micro: MicroBatch, logits: Tensor, **options: Any):
        """Statistics of this rank's loss tokens, [k] each, in the logits' order."""
        stats = logits_stats(
            logits,
            micro.target,
            vocab_size=self.bridge.hf_config.vocab_size,
            temperature=self.temperature,
            **options,
        )
        at = micro.target != -100
        return type(stats)(*(None if value is None else value[at] for value in stats))

    def _run(
        self, model: MegatronModule, work: list[tuple[MicroBatch, Any]], use: Callable, *, forward_only: bool
    ) -> list:
        """Megatron's schedule over the micro-batches; what `use(micro, extra, logits)` reports, on the last stage."""
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
            seq_length=work[0][0].target.numel(),  # shapes travel with the activations: these two only must be there
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    # ---- across ranks -----------------------------------------------------------------------------------------------

    def _add_up(self, partials: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums over micro-batches, data and context parallel ranks, known on every rank."""
        sums: dict[str, Any] = defaultdict(float)
        for item in partials:
            for name, value in item.items():
                sums[name] += value
        names = [sorted(sums)]
        if dist.get_world_size(self.layout.pipeline_group) > 1:
            source = dist.get_process_group_ranks(self.layout.pipeline_group)[-1]
            dist.broadcast_object_list(names, src=source, group=self.layout.pipeline_group)
        values = torch.zeros(len(names[0]), dtype=torch.float64, device=self.device)
        if self.layout.last_stage:
            values = torch.stack([sums[name].double() for name in names[0]])
            dist.all_reduce(values, group=self.layout.data_group)
        self._from_last_stage(values)
        return dict(zip(names[0], values.tolist(), strict=True))

    def _from_last_stage(self, values: Tensor) -> None:
        group = self.layout.pipeline_group
        if dist.get_world_size(group) > 1:
            dist.broadcast(values, src=dist.get_process_group_ranks(group)[-1], group=group)


def _tokens(part: Batch, at: Tensor, logprob: Tensor, **statistics: Tensor | None) -> Tokens:
    """The loss's view of the entries `at` of `part`; `logprob` and `statistics` hold one value for each of them."""
    return Tokens(
        logprob=logprob,
        old_logprob=part.old_logprob[at],
        advantage=part.advantage[at],
        loss_mask=part.loss_mask[at],
        ref_logprob=None if part.ref_logprob is None else part.ref_logprob[at],
        rollout_logprob=part.rollout_logprob[at],
        sequence_length=part.sequence_length[at],
        token_id=part.token_id[at],
        **statistics,
    )
