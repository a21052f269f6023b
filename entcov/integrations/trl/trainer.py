"""EntcovGRPOTrainer: TRL's GRPOTrainer with entcov's controls, chosen over the whole mini-batch of all processes.

Where it hooks in, in the order of a generation batch:
    _generate_and_score_completions  rows get numbers before TRL shuffles them; the controls' `begin`
    _prepare_inputs                  on the first micro-batch of an optimizer step: the selection over all of them
    _compute_loss                    the loss of a micro-batch; TRL's own runs without gradient, for TRL's metrics
    training_step                    after the last one: the controls adapt
    _save / _load_optimizer_and_scheduler   entcov.json in the checkpoint
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from entcov.controls import Control, make_control
from entcov.integrations import state_file
from entcov.integrations.controlled_loss import ControlledLoss, Update, entcov_names
from entcov.integrations.trl.head import PolicyHead
from entcov.integrations.trl.keys import TESTED, policy_loss_config
from entcov.integrations.trl.reference_kl import ReferenceKL
from entcov.objective.tokens import Tokens

STATE_NAME = "entcov.json"
POSITIONS = 1 << 24  # token_id = row * 2^24 + position
HOOKS = (
    "_generate_and_score_completions", "_calculate_rewards", "_get_per_token_logps_and_entropies", "_prepare_inputs",
    "_compute_loss", "training_step", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler",
)  # fmt: skip
# Of a batch, what the model's forward takes besides ids and mask; `_get_per_token_logps_and_entropies` has these names.
MODEL_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class EntcovGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with any list of entropy controls. All other arguments, and all keys of GRPOConfig, are TRL's.

    Tokens are chosen over the optimizer's whole mini-batch: all micro-batches (`gradient_accumulation_steps`) of all
    processes, so the choice does not depend on the per-device batch. With `controls=[]` the loss is TRL's, with TRL's
    denominators, for every loss type that is accepted; a control changes nothing but what it is there for. docs/trl.md
    says which keys are accepted, what is exact, and what the metrics `entcov/...` are.

    Args:
        controls: names of entcov.controls.CONTROLS (with default knobs) or controls (`entcov.controls.make_control`).
    Collectives: besides TRL's, those of `ControlledLoss`, over all processes.
    Raises: ValueError that names the key or the control, for what cannot be done as it is asked.
    """

    _tag_names = [*GRPOTrainer._tag_names, "entcov"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        controls: Sequence[str | Control] = (),
        **kwargs: Any,
    ):
        _check_version()
        if isinstance(controls, str | Control):
            raise TypeError(f"controls must be a list, got {controls!r}")
        controls = [make_control(one) if isinstance(one, str) else one for one in controls]
        loss = policy_loss_config(args if args is not None else GRPOConfig())
        if args is not None and args.beta:
            controls.append(ReferenceKL(args.beta, args.use_bias_correction_kl))
        ControlledLoss(controls, loss)  # refuses before a model is loaded
        for control in controls:
            if "ref_logprob" in control.needs and not (args is not None and args.beta):
                raise ValueError(
                    f"beta must be above 0 for control {control.name}, which reads the reference policy: TRL has none "
                    "otherwise; got 0"
                )
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self._check_parallelism()
        self._controlled = ControlledLoss(
            controls, loss, group=dist.group.WORLD if self.accelerator.num_processes > 1 else None
        )
        self._head = PolicyHead(self.temperature, self.args.cast_lm_head_to_fp32, self._controlled.clamp)
        for own in (self.model, self.ref_model):
            if own is not None:
                own = self.accelerator.unwrap_model(own)
                self._head.install(own.get_base_model() if hasattr(own, "get_base_model") else own)
        self._rollouts = 0  # generation batches begun
        self._updates_left = 0  # of the current one
        self._scored_at: int | None = None  # global_step of the policy that scored it
        self._window: list[dict] = []  # the micro-batches of the current optimizer step
        self._micro = 0  # of these, done
        self._update: Update | None = None
        self._scales: list[Tensor] = []  # see _denominators
        self._passes: list[tuple[Tensor, Tensor]] | None = None  # (logprob, columns) of TRL's passes while it generates
        self._given: tuple | None = None  # what TRL's loss is given instead of a pass
        self._rewards: Tensor | None = None  # [rows of all processes], of the last generation batch

    # ---- a generation batch ------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args, **kwargs) -> Tensor:
        each = super()._calculate_rewards(*args, **kwargs)
        rewards = (each * self.reward_weights.to(each.device)).nansum(dim=1)
        self._rewards = rewards.masked_fill(each.isnan().all(dim=1), torch.nan)
        return each

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._passes, self._head.moments = [], self._controlled.begins
        try:
            batch = super()._generate_and_score_completions(inputs)
            scored = next((p for p in self._passes if p[0] is batch.get("old_per_token_logps")), None)
            if scored is None and self._controlled.begins:
                with self._without_gradient():
                    scored = self._statistics(self.model, batch, self.args.per_device_train_batch_size)
        finally:
            self._passes, self._head.moments = None, False
        rows = batch["completion_ids"].shape[0]
        first = self.accelerator.process_index * rows
        batch["entcov_row"] = torch.arange(first, first + rows, device=batch["completion_ids"].device)
        if scored is not None:
            batch["entcov_scored"] = torch.cat([scored[0][..., None], scored[1]], dim=-1)
        self._begin(batch, scored)
        return batch

    def _begin(self, batch: dict, scored: tuple[Tensor, Tensor] | None) -> None:
        """The controls' `begin`, over the generation batch of all processes."""
        rollout = None
        if self._controlled.begins:
            rewards = self._rewards.view(-1, self.num_generations)
            # A completion that no reward function scored counts as the mean of its group, 0 in a group without scores.
            mean = rewards.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
            reward = torch.where(rewards.isnan(), mean, rewards).flatten()[batch["entcov_row"]]
            rollout = self._tokens(batch, *scored, moments=True, reward=reward)
        updates = self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps
        steps = math.ceil(self.state.max_steps / updates)
        self._rollouts += 1
        epochs = self.state.num_train_epochs
        metrics = self._controlled.begin(
            step=self._rollouts,
            steps=max(steps, self._rollouts),
            rollout=rollout,
            epoch=min(int(self.state.epoch or 0) + 1, epochs),
            epochs=epochs,
        )
        self._scored_at, self._updates_left = self.state.global_step, updates
        self._log_entcov(metrics)

    # ---- an optimizer step -------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        batch = super()._prepare_inputs(generation_batch)
        if self.model.training and self._micro == len(self._window):
            self._open_window()
        return batch

    def _open_window(self) -> None:
        """Selects over the micro-batches of the coming optimizer step."""
        first = self._step % self.args.steps_per_generation
        self._window = self._buffered_inputs[first : first + self.current_gradient_accumulation_steps]
        if len(self._window) < self.current_gradient_accumulation_steps:
            raise RuntimeError(
                "an optimizer step spans two generation batches: steps_per_generation must be a multiple of "
                f"gradient_accumulation_steps, and micro-batch {first} of {self.args.steps_per_generation} begins one "
                f"of {self.current_gradient_accumulation_steps}"
            )
        self._micro = 0
        tokens = [self._tokens(batch, *self._policy_before(batch)) for batch in self._window]
        sequences = sum(len(batch["completion_ids"]) for batch in self._window) * self.accelerator.num_processes
        self._update = self._controlled.update(tokens, num_sequences=sequences)
        self._scales = self._denominators()
        self._log_entcov(self._update.metrics)

    def _policy_before(self, batch: dict) -> tuple[Tensor, Tensor | None]:
        """(logprob, columns) that the controls select by, under the policy about to be updated; no gradient.

        On the first update after a generation the policy is the one that scored: no pass.
        """
        scored = batch.get("entcov_scored")
        if scored is not None and self.state.global_step == self._scored_at:
            return scored[..., 0], scored[..., 1:]
        if not self._controlled.selects:  # nothing reads it
            return torch.zeros_like(batch["completion_ids"], dtype=torch.float32), None
        with self._without_gradient():
            return self._statistics(self.model, batch)

    def _denominators(self) -> list[Tensor]:
        """For each micro-batch, what its loss is multiplied by to have TRL's denominator in the place of entcov's.

        Where both count responses there is nothing to do. dapo, cispo, vespo: TRL divides by the tokens of the
        generation batch times the share of its micro-batches that the step has, entcov by those of the step. bnpo: TRL
        takes the mean over each micro-batch alone, and the mean of these. What a control drops changes neither factor.
        """
        masks = [_loss_mask(batch) for batch in self._window]
        if self.loss_type not in ("dapo", "cispo", "vespo", "bnpo"):
            return [torch.ones((), device=masks[0].device)] * len(masks)
        counts = torch.stack([mask.sum() for mask in masks])
        tokens = self.accelerator.reduce(counts.sum(), reduction="sum")
        if self.loss_type == "bnpo":
            return list(tokens / (counts.clamp(min=1) * len(masks) * self.accelerator.num_processes))
        share = len(masks) / self.args.steps_per_generation
        return [tokens / (batch["num_items_in_batch"].clamp(min=1) * share) for batch in self._window]

    def _compute_loss(self, model: Any, inputs: dict) -> Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        logprob, columns, aux_loss = self._pass(model, inputs)
        self._given = logprob.detach(), columns[..., 0].detach(), aux_loss
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)  # for its metrics
        finally:
            self._given = None
        loss, _ = self._update.loss(self._micro, self._tokens(inputs, logprob, columns))
        # Gradients are averaged over processes, and the loss is a sum over them.
        loss = loss * self._scales[self._micro] * self.accelerator.num_processes
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro += 1
        if self._micro == len(self._window):
            metrics = self._update.finish()
            self._updates_left -= 1
            if self._updates_left == 0:
                metrics |= self._controlled.after_step()
            self._log_entcov(metrics)
        return loss

    def _log_entcov(self, metrics: Mapping[str, float]) -> None:
        for name, value in entcov_names(metrics).items():
            self._metrics["train"][name].append(value)

    # ---- the policy's statistics -------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args, **kwargs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL calls it: the columns but the entropy are left out."""
        if self._given is not None:
            return self._given
        if self._passes is not None:
            kwargs["compute_entropy"] = True
        logprob, columns, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._passes is not None:
            self._passes.append((logprob, columns))
        return logprob, None if columns is None else columns[..., 0], aux_loss

    def _pass(self, model: Any, batch: dict, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logprob [B, T], columns [B, T, C], auxiliary loss), `rows` at a time."""
        return super()._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            batch_size=rows,
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled and torch.is_grad_enabled(),
            **{name: batch.get(name) for name in MODEL_INPUTS},
        )

    def _statistics(self, model: Any, batch: dict, rows: int | None = None) -> tuple[Tensor, Tensor]:
        logprob, columns, _ = self._pass(model, batch, rows)
        return logprob, columns

    @contextlib.contextmanager
    def _without_gradient(self) -> Iterator[None]:
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            yield

    def _tokens(
        self,
        batch: dict,
        logprob: Tensor,
        columns: Tensor | None,
        *,
        moments: bool = False,
        reward: Tensor | None = None,
    ) -> Tokens:
        """The loss tokens of a batch; logprob [B, T], columns [B, T, C], reward [B]."""
        mask = _loss_mask(batch)
        at = mask.flatten().nonzero()[:, 0]
        position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        row = batch["entcov_row"]

        def of_token(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.flatten()[at]

        def of_row(value: Tensor | None) -> Tensor | None:
            return None if value is None else of_token(value[:, None].expand(mask.shape) if value.dim() == 1 else value)

        old = batch.get("old_per_token_logps")
        old = logprob.detach() if old is None else old
        sampled = batch.get("sampling_per_token_logps")
        names = self._head.columns if not moments else PolicyHead(1.0, clamp=self._head.clamp, moments=True).columns
        statistics = {} if columns is None else {n: of_token(columns[..., i]) for i, n in enumerate(names)}
        return Tokens(
            logprob=of_token(logprob),
            old_logprob=of_token(old),
            advantage=of_row(batch["advantages"]),
            loss_mask=torch.ones_like(at, dtype=torch.bool),
            ref_logprob=of_token(batch.get("ref_per_token_logps")),
            # vLLM could not score a token where its log-probability is NaN: no correction there, as in TRL
            rollout_logprob=None if sampled is None else of_token(torch.where(sampled.isnan(), old, sampled)),
            sequence_length=of_row(mask.sum(dim=1)),
            token_id=of_token(row[:, None] * POSITIONS + position),
            sequence=of_row(row),
            position=of_token(position),
            reward=of_row(reward),
            group=of_row(row // self.num_generations),
            **statistics,
        )

    # ---- the checkpoint ----------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"rollouts": self._rollouts, "loss": self._controlled.state_dict()}
            state_file.write(Path(output_dir, STATE_NAME), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, STATE_NAME)
        advice = (
            "Another trainer has written this checkpoint; give its folder as `model`, not as resume_from_checkpoint, "
            "to begin a new run from its weights"
        )
        state = state_file.read(path, ("rollouts", "loss"), advice)
        try:
            self._controlled.load_state_dict(state["loss"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"resume_from_checkpoint: {path}: {error}") from error
        self._rollouts = state["rollouts"]

    def _check_parallelism(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        for name in ("tp_size", "cp_size", "sp_size"):
            size = getattr(parallel, name, 1)
            if size > 1:
                raise ValueError(
                    f"{name} must be 1: processes that share tokens or a vocabulary are not supported, got {size}"
                )


def _loss_mask(batch: dict) -> Tensor:
    """[B, T] bool, as TRL's loss has it."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def _check_version() -> None:
    """One line on stderr for another version than the tested one; RuntimeError where a method is missing.

    Raises: RuntimeError that names it and the version.
    """
    missing = [name for name in HOOKS if not hasattr(GRPOTrainer, name)]
    if missing:
        raise RuntimeError(
            f"trl {trl.__version__} has no GRPOTrainer.{', '.join(missing)}, which entcov's plug-in extends; it was "
            f"tested with trl {TESTED}"
        )
    if trl.__version__ != TESTED:
        print(
            f"entcov: tested with trl {TESTED}, this is {trl.__version__} (transformers {transformers.__version__})",
            file=sys.stderr,
        )
