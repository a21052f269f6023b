"""Megatron-LM's GRPO example (train_rl.py, megatron/rl) with entropy controls.

    from entcov.integrations.megatron_lm import entcov_grpo

    with entcov_grpo({"clip_cov": {"clip_cov_ratio": 2.0e-4}}):
        pretrain(full_config, None, ModelType.encoder_or_decoder, forward_step, ...)     the last lines of train_rl.py

Log-probabilities and entropies come from the vocabulary-parallel logits of the output layer, where the example gathers
the vocabulary on every tensor-parallel rank; the loss is `entcov.policy_loss` with the controls, over the mini-batch of
all data-parallel ranks. docs/other_trainers.md says what is exact.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entcov.integrations.controlled_loss import ControlledLoss, Update, entcov_names
from entcov.integrations.plugin import (
    Patches,
    check_signature,
    framework_module,
    make_controls,
    read_state,
    refuse,
    state_path,
    write_state,
)
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.stats.token_stats import TokenStats, token_stats

TESTED = "Megatron-LM d98e8a6 of 2026-08-22"  # read, and imitated by the tests; its RL example itself was never run
HOOKS = {
    "megatron.training.training": {
        "train_step": (
            "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration"
        ),
        "save_checkpoint": "iteration",
    },
    "megatron.rl.rl_utils": {
        "get_logprobs": "model tokens position_ids no_grad sequence_packing packed_seq_params",
        "selective_log_softmax": "logits index",
        "compute_logprobs_batch": "dtype",
        "get_rl_runtime_state": "",
        "load_packed_data_by_index": "bin_idx packing_context logprobs_is_correction",
    },
    "megatron.training.global_vars": {"get_args": "", "get_tokenizer": ""},
    "megatron.core.num_microbatches_calculator": {"get_num_microbatches": ""},
    "megatron.core.rerun_state_machine": {"RerunDataIterator": "iterable"},
}
STRIDE = 2**32  # token_id = row * STRIDE + position


def policy_loss_config(args: Namespace) -> PolicyLossConfig:
    """The loss that the example's own arguments ask for; ValueError, with the reason, for what cannot be honoured."""
    correction = args.rl_inference_logprobs_is_correction
    refuse(
        {
            "perform_rl_step must be on: entcov_grpo is for the RL example": not args.perform_rl_step,
            "grpo_entropy_term_weight must be 0: its entropy is -p log p of the sampled token alone; take the control "
            "entropy_bonus": args.grpo_entropy_term_weight,
            "context_parallel_size must be 1: the example gathers log-probabilities over context-parallel ranks, and "
            "has no place for entropies": args.context_parallel_size > 1,
            "virtual_pipeline_model_parallel_size must not be given: the example trains the first model chunk": (
                args.virtual_pipeline_model_parallel_size
            ),
            "cuda_graph_impl must be none: a captured graph keeps the gather of the vocabulary": (
                args.cuda_graph_impl != "none"
            ),
            "rl_importance_sampling_truncation_coef must be given with rl_inference_logprobs_is_correction: entcov's "
            "importance weights are bounded": correction and args.rl_importance_sampling_truncation_coef is None,
        }
    )
    knobs: dict[str, Any] = {"clip_low": args.grpo_clamp_eps_lower, "clip_high": args.grpo_clamp_eps_upper}
    if correction:
        knobs["tis_cap"] = args.rl_importance_sampling_truncation_coef
    return PolicyLossConfig(**knobs, kl_coef=args.grpo_kl_beta, kl_estimator="k3")


class Plugin:
    """What `entcov_grpo` leaves in a process. The arguments of the run are known at its first training step."""

    def __init__(self, controls: Mapping[str, Any], vocab_size: int | None, resume: bool):
        self.controls, self.vocab_size, self.resume = make_controls(controls), vocab_size, resume
        self.modules = {name: framework_module(name, TESTED) for name in HOOKS}
        self.mpu = framework_module("megatron.core.parallel_state", TESTED)
        self.hooks: dict[str, Callable[..., Any]] = {}
        for name, functions in HOOKS.items():
            for function, parameters in functions.items():
                self.hooks[function] = check_signature(self.modules[name], function, parameters.split(), TESTED)
        self.controlled: ControlledLoss | None = None
        self.stats: TokenStats | None = None  # of the forward pass that has just been made
        self.metrics: dict[str, float] = {}  # of the last rollout, reported with every update
        self.update: Update | None = None
        self.batches: list[Tokens] = []
        self.scale, self.count = 0.0, 0.0

    # Statistics: the example's get_logprobs runs, with a model that keeps its vocabulary divided, and our softmax.

    def get_logprobs(self, model: nn.Module, *rest: Any, **named: Any) -> Tensor:
        def divided(module, args, kwargs):
            return args, kwargs | {name: False for name in ("runtime_gather_output", "fp32_output") if name in kwargs}

        hook = model.register_forward_pre_hook(divided, with_kwargs=True)
        try:
            return self.hooks["get_logprobs"](model, *rest, **named)
        finally:
            hook.remove()

    def selective_log_softmax(self, logits: Tensor, index: Tensor) -> Tensor:
        """[batch, sequence] log-probabilities of `index`, from this rank's columns; keeps the other statistics."""
        group = self.mpu.get_tensor_model_parallel_group()
        group = None if dist.get_world_size(group) == 1 else group
        if self.vocab_size is None:
            self.vocab_size = self.hooks["get_tokenizer"]().vocab_size
        moments = self.controlled is not None and self.controlled.begins
        clamp = {} if self.controlled is None else self.controlled.clamp
        self.stats = token_stats(logits, index, group=group, vocab_size=self.vocab_size, moments=moments, **clamp)
        return self.stats.logprob

    def compute_logprobs_batch(self, *rest: Any, **named: Any) -> Tensor:
        """Old log-probabilities in float32. In bfloat16 they are off by up to 1 in 256: more than the default clip."""
        if "dtype" not in named:
            raise RuntimeError(f"compute_logprobs_batch must be called with the keyword dtype ({TESTED})")
        return self.hooks["compute_logprobs_batch"](*rest, **named | {"dtype": torch.float32})

    # One optimizer update.

    def start(self, args: Namespace, iteration: int) -> ControlledLoss:
        """At the process's first training step: checks the arguments, loads the state of a run that goes on."""
        controlled = ControlledLoss(self.controls, policy_loss_config(args))
        if iteration and self.resume:
            read_state(state_path(args.load, iteration), controlled)
        self.controlled = controlled
        return controlled

    def train_step(
        self, forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, forward_backward_func,
        iteration=None, **named,
    ):  # fmt: skip
        args = self.hooks["get_args"]()
        controlled = self.controlled or self.start(args, iteration)
        state = self.hooks["get_rl_runtime_state"]()
        done = iteration - state.last_collection_iteration  # updates on this rollout
        per_rollout = args.grpo_prompts_per_step * args.grpo_group_size // args.global_batch_size
        updates = per_rollout * args.grpo_iterations
        refuse(
            {
                "global_batch_size must be grpo_prompts_per_step * grpo_group_size for a control that decides over the "
                "whole rollout: the example's iterator shows one mini-batch at a time": controlled.begins
                and per_rollout != 1
            }
        )
        count = self.hooks["get_num_microbatches"]()
        drawn = [next(data_iterator) for _ in range(count)]

        def again():
            return self.hooks["RerunDataIterator"](iter(drawn))

        last_stage = self.mpu.is_pipeline_last_stage()
        self.batches = (
            [self.tokens(args, state, batch, n, count) for n, batch in enumerate(drawn)] if last_stage else []
        )
        with Patches() as patches:
            names = _globals_of(forward_step_func)
            if "get_logprobs" not in names:
                raise RuntimeError(f"forward_step must call get_logprobs of megatron.rl.rl_utils ({TESTED})")
            patches.replace(names, "get_logprobs", self.get_logprobs)
            reads = controlled.needs & {"entropy", "clamped_entropy"}  # which the example's old log-probabilities lack
            if (controlled.selects and (done or reads)) or (controlled.begins and not done):
                self.forward(
                    args, state, forward_step_func, again(), model, forward_backward_func, count, last_stage, named
                )
            rest = (model, optimizer, opt_param_scheduler, config, forward_backward_func)
            if not last_stage:
                return self.hooks["train_step"](forward_step_func, again(), *rest, iteration=iteration, **named)

            controlled.group = self.mpu.get_data_parallel_group()
            if not done:
                step, steps = iteration // updates + 1, args.train_iters // updates
                rollout = Tokens.cat(self.batches) if per_rollout == 1 else None
                self.metrics |= controlled.begin(step=step, steps=max(step, steps), rollout=rollout)
            self.update = controlled.update(self.batches)
            self.divisors(config, count)
            step_func = self.numbered(forward_step_func)
            try:
                result = self.hooks["train_step"](step_func, again(), *rest, iteration=iteration, **named)
            except BaseException:
                self.update.abandon()
                raise
        if result[1]:  # the optimizer skipped the update
            self.update.abandon()
            return result
        found = self.update.finish()
        if done + 1 == updates:
            self.metrics |= controlled.after_step()
        found = {name: torch.tensor(value) for name, value in entcov_names(found | self.metrics).items()}
        return (result[0] | found, *result[1:])

    def tokens(self, args: Namespace, state: Any, batch: Any, number: int, count: int) -> Tokens:
        """The tokens [batch * (sequence - 1)] of a micro-batch, with old log-probabilities for `logprob`."""
        packed = args.rl_use_sequence_packing
        if packed:
            loaded = self.hooks["load_packed_data_by_index"](
                batch[0].item(), state.packing_context, args.rl_inference_logprobs_is_correction
            )
            _, advantages, old, mask, _, ref, sampled, starts, lengths, rows = loaded[:10]
        else:
            _, advantages, old, mask, _, ref, sampled = batch
            mask = mask[:, 1:]
            if not args.rl_inference_logprobs_is_correction:
                sampled = None
        device, shape = advantages.device, old.shape
        row = torch.zeros(shape, dtype=torch.int64, device=device)
        advantage = torch.zeros(shape, device=device)
        if packed:
            position = torch.zeros(shape, dtype=torch.int64, device=device)
            for value, start, length, r in zip(advantages, starts, lengths, rows, strict=True):
                at = slice(start, min(start + length - 1, shape[1]))
                row[0, at], advantage[0, at] = r, value.float()
                position[0, at] = torch.arange(row[0, at].numel(), device=device)
        else:
            first = (self.mpu.get_data_parallel_rank() * count + number) * shape[0]
            row += torch.arange(first, first + shape[0], device=device)[:, None]
            advantage += advantages.float()[:, None]
            position = torch.arange(shape[1], device=device).expand(shape)

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device).float().flatten()

        old = flat(old)
        return Tokens(
            logprob=old, old_logprob=old, advantage=advantage.flatten(), loss_mask=flat(mask) > 0,
            ref_logprob=flat(ref), rollout_logprob=flat(sampled), sequence=row.flatten(), position=position.flatten(),
            token_id=(row * STRIDE + position).flatten(),
        )  # fmt: skip

    def with_stats(self, tokens: Tokens, stats: TokenStats) -> Tokens:
        names = ("logprob", "entropy", "clamped_entropy", "entropy_drift")
        found = {name: getattr(stats, name).flatten() for name in names if getattr(stats, name) is not None}
        return replace(tokens, **found)

    def forward(self, args, state, forward_step_func, iterator, model, forward_backward_func, count, last_stage, named):
        """The current policy's statistics into `batches`, by a forward pass that all pipeline stages enter."""
        found: list[TokenStats] = []

        def step(data_iterator, chunk):
            output, _ = forward_step_func(data_iterator, chunk)
            if last_stage:
                found.append(self.stats)
            return output, lambda output: (output.sum(), {})

        counters = state.sequences_this_iteration_on_rank, state.latest_batch_num_sequences
        for chunk in model:
            chunk.eval()
        with torch.no_grad():
            forward_backward_func(
                forward_step_func=step, data_iterator=iterator, model=model, num_microbatches=count,
                seq_length=args.seq_length, micro_batch_size=args.micro_batch_size,
                decoder_seq_length=args.decoder_seq_length, forward_only=True, **named,
            )  # fmt: skip
        for chunk in model:
            chunk.train()
        state.sequences_this_iteration_on_rank, state.latest_batch_num_sequences = counters  # of the real pass alone
        self.batches = [self.with_stats(*pair) for pair in zip(self.batches, found, strict=True)]

    def divisors(self, config: Any, count: int) -> None:
        """What Megatron divides the losses by: tokens of the mini-batch, or of each micro-batch, and their number."""
        tokens = sum(batch.loss_mask.sum().clamp(min=1) for batch in self.batches)
        dist.all_reduce(tokens, group=self.controlled.group)
        self.count = float(tokens)
        self.scale = 0.0 if config.calculate_per_token_loss else float(count * self.controlled.ranks)

    def numbered(self, forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
        """forward_step with our loss; micro-batches come in their order."""
        numbers = iter(range(len(self.batches)))

        def step(data_iterator, model):
            output, reported = forward_step_func(data_iterator, model)
            return output, functools.partial(self.loss, reported, next(numbers), self.stats)

        return step

    def loss(self, reported: Callable[..., Any], number: int, stats: TokenStats, output: Tensor) -> tuple[Any, ...]:
        """Megatron's 3-tuple (loss, tokens, report). `reported` is the example's loss_func, for its report."""
        _, tokens, report = reported(output.detach())
        loss, _ = self.update.loss(number, self.with_stats(self.batches[number], stats))
        shown = torch.stack([loss.detach() * self.count, tokens.to(loss.dtype)])
        return loss * (self.scale * tokens if self.scale else self.count), tokens, report | {"lm loss": shown}

    def save_checkpoint(self, iteration: int, *rest: Any, **named: Any) -> Any:
        """In the place of Megatron's save_checkpoint: keeps the controls' state beside the checkpoint."""
        saved = self.hooks["save_checkpoint"](iteration, *rest, **named)
        if self.controlled is not None and self.mpu.is_pipeline_last_stage():
            if dist.get_rank(self.controlled.group) == 0 and self.mpu.get_tensor_model_parallel_rank() == 0:
                write_state(state_path(self.hooks["get_args"]().save, iteration), self.controlled)
        return saved


def _globals_of(function: Any) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__globals__", {})


def entcov_grpo(controls: Mapping[str, Any], *, vocab_size: int | None = None, resume: bool = True) -> Patches:
    """Puts the controls into Megatron-LM's RL training, until `remove()` or the end of a `with` block.

    Call it before `pretrain`, on every rank. The run's arguments are checked at the first training step.

    Args:
        controls: names and knobs, such as {"clip_cov": {"clip_cov_ratio": 0.0002}}; {} gives the plain loss.
        vocab_size: of the tokenizer (default: that of Megatron's tokenizer); columns from there on are padding.
        resume: a run that goes on from a checkpoint loads the controls' state, LOAD/entcov/ITERATION.json; False: the
            controls begin anew.
    Returns: the handle; `remove()` leaves Megatron-LM as it was.
    Raises: RuntimeError for a module or function that is missing or has changed, by name.
    """
    training, rl = (framework_module(name, TESTED) for name in ("megatron.training.training", "megatron.rl.rl_utils"))
    if isinstance(getattr(getattr(training, "train_step", None), "__self__", None), Plugin):
        raise RuntimeError("entcov_grpo: it is installed already; remove that handle first")
    plugin = Plugin(controls, vocab_size, resume)
    patches = Patches()
    for owner, names in (
        (training, ("train_step", "save_checkpoint")),
        (rl, ("get_logprobs", "selective_log_softmax", "compute_logprobs_batch")),
    ):
        for name in names:
            patches.replace(owner, name, getattr(plugin, name))
    return patches
