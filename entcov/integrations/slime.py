"""slime with entropy controls: statistics of vocabulary-parallel logits, selections over the whole mini-batch.

    --custom-megatron-init-path entcov.integrations.slime.install
    --loss-type custom_loss --custom-loss-function-path entcov.integrations.slime.loss
    --custom-config-path entcov.yaml        entcov: {controls: {clip_cov: {clip_cov_ratio: 2.0e-4}}}

docs/other_trainers.md says what is exact. slime calls `install` in every training process. Three of its functions are
replaced: its training step (the selection, before its first backward pass), its log-probabilities, and the one that
saves a checkpoint (the controls' state goes with it).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.stats.token_stats import token_stats

TESTED = "slime 624b824 of 2026-08-21"  # read, and imitated by the tests; slime itself was never run
PACKAGE = "slime.backends.megatron_utils"
HOOKS = {
    "model": {
        "train_one_step": (
            "args rollout_id step_id data_iterator model optimizer opt_param_scheduler num_microbatches "
            "step_global_batch_size microbatch_pbar"
        ),
        "forward_only": "f args model data_iterator num_microbatches store_prefix",
        "save_checkpoint": "iteration",
    },
    "actor": {"get_log_probs_and_entropy": "logits args unconcat_tokens total_lengths response_lengths with_entropy"},
    "loss": {
        "_build_shifted_tokens": "T device unconcat_tokens total_lengths response_lengths allgather_cp",
        "_extract_per_sample": "log_prob_full entropy_full total_lengths response_lengths allgather_cp",
        "_allgather_cp_redistribute": "res logits_local_len total_lengths response_lengths",
    },
    "cp_utils": {"slice_log_prob_with_cp": "log_prob total_length response_length"},
    "data": {"DataIterator": "rollout_data micro_batch_indices"},
}
FORWARD = ("tokens", "loss_masks", "multimodal_train_inputs", "total_lengths", "response_lengths")
STRIDE = 2**32  # token_id = sample * STRIDE + position


def policy_loss_config(args: Namespace) -> PolicyLossConfig:
    """The loss that slime's own arguments ask for; ValueError, with the reason, for what entcov's loss has not."""
    refuse(
        {
            "entropy_coef must be 0: take the control entropy_bonus": args.entropy_coef,
            "rollout_top_p must be 1: the statistics are of the whole distribution": args.rollout_top_p != 1.0,
            "use_rollout_logprobs must be off: the controls need the old policy's log-probabilities as the trainer "
            "computes them; use_tis corrects for the sampler": args.use_rollout_logprobs,
            "keep_old_actor must be off: its log-probabilities are not those of the policy about to be updated, by "
            "which the first update selects": args.keep_old_actor,
            "compute_advantages_and_returns must be on: the selection reads the advantages and old log-probabilities": (
                not args.compute_advantages_and_returns
            ),
            "recompute_loss_function must be off: it runs the loss twice, and the statistics keep nothing of the size "
            "of the logits": args.recompute_loss_function,
            "use_opsm, get_mismatch_metrics, use_unbiased_kl, custom_tis_function_path and "
            "custom_pg_loss_reducer_function_path must be off: entcov's loss has nothing in their place": (
                args.use_opsm
                or args.get_mismatch_metrics
                or args.use_unbiased_kl
                or args.custom_tis_function_path
                or getattr(args, "custom_pg_loss_reducer_function_path", None)
            ),
        }
    )
    knobs: dict[str, Any] = {"objective": {"gspo": "gspo", "cispo": "cispo"}.get(args.advantage_estimator, "ppo")}
    knobs |= {"clip_low": args.eps_clip, "clip_high": args.eps_clip_high}
    if args.eps_clip_c is not None:
        knobs["dual_clip"] = args.eps_clip_c
    knobs["aggregation"] = "token-mean" if args.calculate_per_token_loss else "seq-mean-token-mean"
    if args.use_kl_loss:
        kind = "k3" if args.kl_loss_type == "low_var_kl" else args.kl_loss_type
        knobs |= {"kl_coef": args.kl_loss_coef, "kl_estimator": kind}
    if args.use_tis:
        knobs |= {"tis_cap": args.tis_clip, "tis_floor": args.tis_clip_low}
    return PolicyLossConfig(**knobs)


class Plugin:
    """What `install` leaves in a training process."""

    def __init__(self, args: Namespace):
        settings = getattr(args, "entcov", None)
        if not isinstance(settings, dict) or set(settings) - {"controls", "resume"} or "controls" not in settings:
            raise ValueError(
                "--custom-config-path must give a mapping entcov with the keys controls and, if the controls begin "
                f"anew in the middle of a run, resume; got {settings!r}"
            )
        self.controlled = ControlledLoss(make_controls(settings["controls"]), policy_loss_config(args))
        self.resume, self.save = settings.get("resume", True), args.save
        modules = {name: framework_module(f"{PACKAGE}.{name}", TESTED) for name in HOOKS}
        self.mpu = framework_module("megatron.core.parallel_state", TESTED)
        self.hooks: dict[str, Callable[..., Any]] = {}
        for name, functions in HOOKS.items():
            for function, parameters in functions.items():
                self.hooks[function] = check_signature(modules[name], function, parameters.split(), TESTED)
        self.modules = modules
        self.begun = False  # whether this process has trained on a rollout
        self.update: Update | None = None
        self.batches: list[Tokens] = []
        self.number: dict[int, int] = {}  # of the micro-batch, by the id of its first sample's token tensor
        self.scale: float = 0.0

    def statistics(
        self,
        logits: Tensor,
        args: Namespace,
        tokens: list[Tensor],
        total: list[int],
        response: list[int],
        **options: Any,
    ) -> dict[str, list[Tensor]]:
        """Each sample's statistics on this context-parallel rank, in the order in which slime slices its responses."""
        rows = torch.arange(logits.size(1), device=logits.device)
        shifted = self.hooks["_build_shifted_tokens"](
            len(rows), logits.device, tokens, total, response, args.allgather_cp
        )
        samples, _ = self.hooks["_extract_per_sample"](rows, None, total, response, args.allgather_cp)
        at = torch.cat(samples)
        target = torch.full_like(shifted, -100)  # rows of prompts and padding are not read
        target[at] = shifted[at]
        group = self.mpu.get_tensor_model_parallel_group()
        group = None if dist.get_world_size(group) == 1 else group
        knobs = {"vocab_size": args.vocab_size, "temperature": args.rollout_temperature}
        stats = token_stats(logits.squeeze(0), target, group=group, **knobs, **options, **self.controlled.clamp)
        names = ["logprob", "entropy", *(("clamped_entropy",) if self.controlled.clamp else ())]
        names += ["entropy_drift"] if options.get("moments") else []
        found = {name: [getattr(stats, name)[sample] for sample in samples] for name in names}
        if args.allgather_cp:
            self.hooks["_allgather_cp_redistribute"](
                found, logits_local_len=len(rows), total_lengths=total, response_lengths=response
            )
        return found

    def log_probs(
        self,
        logits: Tensor,
        *,
        args: Namespace,
        unconcat_tokens: list[Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        with_entropy: bool = False,
        non_loss_data: bool = True,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """In the place of slime's get_log_probs_and_entropy; entropies come with it at no cost."""
        begins = {"moments": True} if self.controlled.begins else {}
        found = self.statistics(logits, args, unconcat_tokens, total_lengths, response_lengths, **begins)
        return torch.empty(0, device=logits.device), {"log_probs": found.pop("logprob"), **found}

    def tokens(
        self, args: Namespace, data: dict[str, Any], samples: list[int], scored: dict[str, list[Tensor]]
    ) -> Tokens:
        """The response tokens of these samples of the rollout on this context-parallel rank.

        `scored` has the statistics: logprob, and entropies where they are known; a list over `samples` each.
        """
        cut = self.hooks["slice_log_prob_with_cp"]

        def column(name: str) -> Tensor | None:
            return None if data.get(name) is None else torch.cat([data[name][i] for i in samples]).float()

        parts: dict[str, list[Tensor]] = {
            n: [] for n in ("loss_mask", "position", "sequence", "length", "reward", "group")
        }
        for i in samples:
            total, response, mask = data["total_lengths"][i], data["response_lengths"][i], data["loss_masks"][i]
            count = int(mask.sum())
            if not args.calculate_per_token_loss and int(data["rollout_mask_sums"][i]) != count:
                raise ValueError(
                    "calculate_per_token_loss must be on where a rollout has several samples: slime's mean over the "
                    f"rollout's tokens is divided over micro-batches; sample {data['partition'][i]} has {count} loss "
                    f"tokens and its rollout {int(data['rollout_mask_sums'][i])}"
                )
            parts["loss_mask"].append(cut(mask, total, response).bool())
            parts["position"].append(cut(torch.arange(response, device=mask.device), total, response))
            like, reward = parts["position"][-1], data.get("local_raw_reward", data["rewards"])[i]
            parts["sequence"].append(torch.full_like(like, data["partition"][i]))
            parts["length"].append(torch.full_like(like, count))
            parts["group"].append(torch.full_like(like, data["sample_indices"][i] // args.n_samples_per_prompt))
            parts["reward"].append(torch.full(like.shape, float(reward), device=mask.device))
        whole = {name: torch.cat(part) for name, part in parts.items()}
        old = column("log_probs")
        stats = {name: torch.cat(values).float() for name, values in scored.items()}
        return Tokens(
            **({"logprob": old} | stats),
            old_logprob=old,
            advantage=column("advantages"),
            ref_logprob=column("ref_log_probs"),
            rollout_logprob=column("rollout_log_probs"),
            sequence_length=whole.pop("length"),
            token_id=whole["sequence"] * STRIDE + whole["position"],
            **whole,
        )

    def train_one_step(
        self, args, rollout_id, step_id, data_iterator, model, optimizer, opt_param_scheduler, num_microbatches,
        step_global_batch_size, microbatch_pbar=None,
    ):  # fmt: skip
        """In the place of slime's train_one_step: selects, runs it, and adds metrics under entcov/."""
        rest = (model, optimizer, opt_param_scheduler, num_microbatches, step_global_batch_size)
        call = (args, rollout_id, step_id, data_iterator, *rest)
        if args.loss_type != "custom_loss":  # a critic's step
            return self.hooks["train_one_step"](*call, microbatch_pbar=microbatch_pbar)
        controlled, iterator = self.controlled, data_iterator[0]
        data, at = iterator.rollout_data, iterator.offset
        rows = iterator.micro_batch_indices[at : at + num_microbatches]
        current: dict[str, list[Tensor]] = {}
        if step_id and controlled.selects:
            current = self.current(args, model, data, sum(rows, []), rows, len(data_iterator))
        if not self.mpu.is_pipeline_last_stage(ignore_virtual=True):
            return self.hooks["train_one_step"](*call, microbatch_pbar=microbatch_pbar)

        controlled.group = self.mpu.get_data_parallel_group(with_context_parallel=True)
        scored = {name: data[name] for name in ("entropy", "clamped_entropy", "entropy_drift") if name in data}
        metrics = {}
        if step_id == 0:
            metrics = self.begin(args, rollout_id, data, scored)
            current = scored
        else:
            order = {sample: i for i, sample in enumerate(sum(rows, []))}
        self.batches = []
        for samples in rows:
            own = samples if step_id == 0 else [order[i] for i in samples]
            values = {name: [column[i] for i in own] for name, column in current.items()}
            self.batches.append(self.tokens(args, data, samples, values))
        self.number = {id(data["tokens"][samples[0]]): number for number, samples in enumerate(rows)}
        self.scale = self.divisor(args, data, rows, step_global_batch_size)
        self.update = controlled.update(self.batches, num_sequences=step_global_batch_size)
        try:
            losses, grad_norm = self.hooks["train_one_step"](*call, microbatch_pbar=microbatch_pbar)
        except BaseException:
            self.update.abandon()
            raise
        metrics |= self.update.finish()
        if step_id == len(data["num_microbatches"]) - 1:
            metrics |= controlled.after_step()
        return losses | entcov_names(metrics), grad_norm

    def begin(
        self, args: Namespace, rollout_id: int, data: dict[str, Any], scored: dict[str, list[Tensor]]
    ) -> dict[str, float]:
        """Begins the training step on this rollout."""
        cp = self.mpu.get_context_parallel_world_size()
        objective = self.controlled.loss.objective
        refuse(
            {
                f"context_parallel_size must be 1 for advantage_estimator {objective}, whose ratio is of a whole "
                "response": cp > 1 and objective == "gspo"
            }
        )
        self.resumed(args, rollout_id)
        rollout = self.tokens(args, data, list(range(len(data["tokens"]))), scored) if "entropy" in scored else None
        return self.controlled.begin(step=rollout_id + 1, steps=max(args.num_rollout, rollout_id + 1), rollout=rollout)

    def resumed(self, args: Namespace, rollout_id: int) -> None:
        """Loads the controls' state before the first rollout of a process whose run goes on."""
        if not self.begun and rollout_id > 0 and self.resume:
            read_state(state_path(args.load, rollout_id - 1), self.controlled)
        self.begun = True

    def save_checkpoint(self, iteration: int, *rest: Any, **named: Any) -> Any:
        """In the place of slime's save_checkpoint: keeps the controls' state beside the checkpoint."""
        saved = self.hooks["save_checkpoint"](iteration, *rest, **named)
        if self.begun and dist.get_rank(self.controlled.group) == 0 and self.mpu.get_tensor_model_parallel_rank() == 0:
            write_state(state_path(self.save, iteration), self.controlled)
        return saved

    def current(
        self, args: Namespace, model: Any, data: dict[str, Any], order: list[int], rows: list[list[int]], chunks: int
    ) -> dict[str, list[Tensor]]:
        """A forward pass over the step's samples; every pipeline stage enters it, the last one has the statistics."""
        refuse(
            {
                "use_routing_replay must be off where several updates are made of a rollout and a control selects: the "
                "forward pass before an update would use up the recorded routes": args.use_routing_replay
            }
        )
        part = {name: [data[name][i] for i in order] for name in FORWARD if data.get(name) is not None}
        ends = [sum(map(len, rows[: n + 1])) for n in range(len(rows))]
        indices = [list(range(end - len(row), end)) for row, end in zip(rows, ends, strict=True)]
        iterators = [self.hooks["DataIterator"](part, indices) for _ in range(chunks)]
        found = self.hooks["forward_only"](self.log_probs, args, model, iterators, [len(rows)])
        return {"logprob" if name == "log_probs" else name: values for name, values in found.items()}

    def divisor(
        self, args: Namespace, data: dict[str, Any], rows: list[list[int]], step_global_batch_size: int
    ) -> float:
        """What slime and Megatron divide the sum of all losses by: the loss is multiplied by it."""
        if not args.calculate_per_token_loss:
            return float(step_global_batch_size)
        count = sum(data["loss_masks"][i].sum().clamp(min=1) for samples in rows for i in samples).long()
        dist.all_reduce(count, group=self.mpu.get_data_parallel_group(with_context_parallel=False))
        return float(count)

    def loss(self, args: Namespace, batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        number = self.number.get(id(batch["unconcat_tokens"][0]))
        if number is None or self.update is None:
            raise RuntimeError(
                "the batch's unconcat_tokens must be the tensors of the step's rollout_data, by which entcov knows the "
                f"micro-batch ({TESTED}); these are others"
            )
        found = self.statistics(
            logits, args, batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"]
        )
        tokens = replace(self.batches[number], **{name: torch.cat(values) for name, values in found.items()})
        sequences = None
        if self.mpu.get_context_parallel_world_size() > 1:  # ranks of the group have parts of the same responses
            index = [torch.full_like(x, i, dtype=torch.int64) for i, x in enumerate(found["logprob"])]
            group = self.mpu.get_context_parallel_group()
            sequences = SequenceIndex(torch.cat(index), len(index), group)
        loss, _ = self.update.loss(number, tokens, sequences=sequences)
        loss = loss * self.scale
        return loss, {"loss": loss.detach()}


_plugin: Plugin | None = None


def install(args: Namespace) -> Patches:
    """For --custom-megatron-init-path. Checks the arguments and slime's functions, and replaces three of them.

    Returns: a handle whose `remove()` leaves slime as it was.
    Raises: ValueError for arguments that entcov cannot honour, with the reason; RuntimeError for a function of slime
        that is missing or has other parameters, by name.
    """
    global _plugin
    refuse(
        {
            "loss_type must be custom_loss, and custom_loss_function_path entcov.integrations.slime.loss: without them "
            "the controls reach no loss": args.loss_type != "custom_loss"
            or args.custom_loss_function_path != f"{__name__}.loss"
        }
    )
    if _plugin is not None:
        raise RuntimeError("install: entcov is installed already; remove that handle first")
    plugin = Plugin(args)
    patches = Patches()
    patches.replace(plugin.modules["model"], "train_one_step", plugin.train_one_step)
    patches.replace(plugin.modules["model"], "save_checkpoint", plugin.save_checkpoint)
    patches.replace(plugin.modules["actor"], "get_log_probs_and_entropy", plugin.log_probs)
    patches.callback(_forget)
    _plugin = plugin
    return patches


def _forget() -> None:
    global _plugin
    _plugin = None


def loss(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """For --custom-loss-function-path: the loss of a micro-batch, times what slime divides by.

    Args: slime's. logits: [1, T, V / TP], any float dtype; never written. sum_of_sample_mean is not used: the
        denominators are those of the mini-batch.
    Returns: (loss, {"loss"}). The other metrics are in what the training step returns.
    Collectives: those of `token_stats`. Raises: RuntimeError without `install`, or for a batch of another step.
    """
    if _plugin is None:
        raise RuntimeError(f"--custom-megatron-init-path must be {__name__}.install: entcov is not installed")
    return _plugin.loss(args, batch, logits)
