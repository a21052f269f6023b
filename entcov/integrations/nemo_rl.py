"""NeMo-RL's GRPO with entropy controls, by a launch script that runs its own one:

    python -m entcov.integrations.nemo_rl '{"clip_cov": {"clip_cov_ratio": 2.0e-4}}' examples/run_grpo.py --config ...

NeMo-RL has no registry of losses. The script puts a loss in the place of ClippedPGLossFn, and selects in the driver,
which has the whole rollout, before `Policy.train`: the selection travels with the data to the workers. One optimizer
update a rollout is exact; more are refused. docs/other_trainers.md says why.
"""

import importlib
import json
import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from entcov.controls import Control, Selection, selects
from entcov.integrations.controlled_loss import ControlledLoss, entcov_names
from entcov.integrations.dtensor import vocab_shard
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
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.stats.token_stats import TokenStats, token_stats

TESTED = "NeMo-RL 7ea279a of 2026-08-22"  # read, and imitated by the tests; NeMo-RL itself was never run
COLUMN = "entcov_"  # columns of the data that goes to the workers
STRIDE = 2**32  # token_id = row * STRIDE + position


def policy_loss_config(cfg: Any) -> PolicyLossConfig:
    """The loss that NeMo-RL's `loss_fn` section asks for; ValueError, with the reason, for what cannot be honoured."""
    refuse(
        {
            "disable_ppo_ratio must be false: entcov's objectives have a ratio": cfg.disable_ppo_ratio,
            "force_on_policy_ratio must be false: it skips the old log-probabilities, by which controls select": (
                cfg.force_on_policy_ratio
            ),
            "use_on_policy_kl_approximation must be false: entcov's KL has no importance weights": (
                cfg.use_on_policy_kl_approximation
            ),
            "positive_example_nll_weight must be 0: entcov's loss has no such term": cfg.positive_example_nll_weight,
            "truncated_importance_sampling_type must be tis or icepop with use_importance_sampling_correction: "
            "entcov's importance weights are bounded, by token": cfg.use_importance_sampling_correction
            and cfg.truncated_importance_sampling_type not in ("tis", "icepop"),
        }
    )
    objective = "cispo" if cfg.use_cispo else "gspo" if cfg.sequence_level_importance_ratios else "ppo"
    knobs: dict[str, Any] = {"objective": objective, "clip_low": cfg.ratio_clip_min, "clip_high": cfg.ratio_clip_max}
    if cfg.ratio_clip_c is not None:
        knobs["dual_clip"] = cfg.ratio_clip_c
    knobs["aggregation"] = "token-mean" if cfg.token_level_loss else "seq-mean-token-mean"
    if cfg.reference_policy_kl_penalty and not cfg.use_kl_in_reward:
        kind = cfg.reference_policy_kl_type
        # NeMo-RL's gradient of the KL is unbiased (arXiv 2506.09477), like that of the estimators with +
        knobs |= {"kl_coef": cfg.reference_policy_kl_penalty, "kl_estimator": kind if kind == "k2" else f"{kind}+"}
    if cfg.use_importance_sampling_correction:
        knobs["tis_cap"] = cfg.truncated_importance_sampling_ratio
        knobs["tis_floor"] = cfg.truncated_importance_sampling_ratio_min or 0.0
        knobs["tis_mode"] = "mask" if cfg.truncated_importance_sampling_type == "icepop" else "truncate"
    return PolicyLossConfig(**knobs)


class ControlledLossFn:
    """A LossFunction of NeMo-RL: made in the driver, sent to the workers with the data, called a micro-batch at a time.

    inner: NeMo-RL's own loss with the same settings, for the metrics that its loop prints
    totals, scalars: of the mini-batch at hand, set in the driver before the data leaves
    """

    use_fused_linear_logprobs = False

    def __init__(self, inner: Any, input_type: Any, controls: list[Control], config: PolicyLossConfig, clamp: dict):
        self.inner, self.input_type, self.loss_type = inner, input_type, inner.loss_type
        self.controls, self.config, self.clamp = controls, config, clamp
        self.totals: Totals | None = None
        self.scalars: list[dict[str, Tensor]] = []

    def __call__(
        self, logits: Tensor, data: Mapping[str, Any], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics) of rows of the mini-batch; losses of all calls and ranks add up to the mini-batch's.

        Args:
            logits: [rows, length, V / TP], or a DTensor [rows, length, V] divided over the vocabulary.
            data: of the same rows, with the columns that the driver added.
        Raises: RuntimeError without these columns; ValueError for logits of a part of each row.
        """
        if f"{COLUMN}row" not in data or self.totals is None:
            raise RuntimeError(
                "the data must have entcov's columns, which Policy.train adds: data_plane.enabled must be false, and "
                "the run must have been started by python -m entcov.integrations.nemo_rl"
            )
        stats = self.statistics(logits, data)
        length = data["input_ids"].shape[1] - 1
        now = {
            n: getattr(stats, n)[:, :length]
            for n in ("logprob", "entropy", "clamped_entropy")
            if getattr(stats, n) is not None
        }
        tokens = rollout_tokens(data, self.config, data[f"{COLUMN}row"], **{n: x.flatten() for n, x in now.items()})
        selections: list[Selection | None] = []
        for i, control in enumerate(self.controls):
            columns = {n: data.get(f"{COLUMN}{i}_{n}") for n in ("mask", "drop", "weight")}
            columns = {n: None if x is None else x[:, 1:].flatten() for n, x in columns.items()}
            scalars = {n: x.to(logits.device) for n, x in self.scalars[i].items()}
            selections.append(Selection(**columns, scalars=scalars) if selects(control) else None)
        loss, found = policy_loss(
            tokens, self.config, totals=self.totals, controls=self.controls, selections=selections
        )
        with torch.no_grad():
            _, metrics = self.inner(
                next_token_logprobs=now["logprob"].detach(), data=data, global_valid_seqs=global_valid_seqs,
                global_valid_toks=global_valid_toks,
            )  # fmt: skip
        return loss, metrics | {"loss": loss.item()} | {COLUMN + name: value.item() for name, value in found.items()}

    def statistics(self, logits: Tensor, data: Mapping[str, Any]) -> TokenStats:
        """[rows, length]: of the next token of each position; 0 where there is none, or the loss leaves it out."""
        ids = data["input_ids"]
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] > 0
        if logits.shape[1] < ids.shape[1] - 1:
            raise ValueError(
                f"context_parallel_size must be 1: the logits have {logits.shape[1]} of {ids.shape[1]} positions"
            )
        target = ids.new_full((len(ids), max(logits.shape[1], ids.shape[1])), -100)
        target[:, : ids.shape[1] - 1] = torch.where(mask, ids[:, 1:], -100)
        target = target[:, : logits.shape[1]]
        if not isinstance(logits, DTensor):
            return token_stats(logits, target, group=_megatron_group(), **self.clamp)
        if not any(placement.is_shard() for placement in logits.placements):
            return token_stats(logits.to_local(), target, **self.clamp)
        if any(placement.is_shard() and placement.dim % 3 != 2 for placement in logits.placements):
            raise ValueError(f"logits must be divided over the vocabulary alone, got {logits.placements}")
        local, place = vocab_shard(logits)
        return token_stats(local, target, **place, **self.clamp)


def _megatron_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group of a Megatron worker; None in a process without Megatron-Core's groups."""
    mpu = sys.modules.get("megatron.core.parallel_state")
    if mpu is None or not mpu.model_parallel_is_initialized():
        return None
    group = mpu.get_tensor_model_parallel_group()
    return None if dist.get_world_size(group) == 1 else group


def rollout_tokens(data: Mapping[str, Any], config: PolicyLossConfig, row: Tensor, **statistics: Tensor) -> Tokens:
    """The tokens [rows * (length - 1)] of NeMo-RL's columns [rows, length]; token t of a row is position t - 1."""
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] > 0
    device, (rows, length) = mask.device, mask.shape
    position = torch.arange(length, device=device).expand(rows, length)
    number = row.to(device)[:, None].expand(rows, length)

    def flat(name: str) -> Tensor:
        return data[name][:, 1:].float().flatten()

    old = flat("prev_logprobs")
    return Tokens(
        **({"logprob": old} | statistics),
        old_logprob=old,
        advantage=flat("advantages"),
        loss_mask=mask.flatten(),
        ref_logprob=flat("reference_policy_logprobs") if config.kl_coef else None,
        rollout_logprob=flat("generation_logprobs"),
        sequence_length=mask.sum(1, keepdim=True).expand(rows, length).flatten(),
        sequence=number.flatten(),
        position=position.flatten(),
        token_id=(number * STRIDE + position).flatten(),
    )


class Plugin:
    """What `install` leaves in the driver."""

    def __init__(self, controls: Mapping[str, Any], resume: bool):
        self.controls, self.resume = make_controls(controls), resume
        self.controlled: ControlledLoss | None = None
        self.loss: ControlledLossFn | None = None
        self.weights: str | None = None  # that the policy was loaded from
        for control in self.controls:
            read = sorted(control.needs & {"entropy", "clamped_entropy"}) if selects(control) else []
            shapes = type(control).begin is not Control.begin
            refuse(
                {
                    f"control {control.name} cannot be had: before the update it reads {', '.join(read)}, and "
                    "NeMo-RL's workers report log-probabilities alone": read,
                    f"control {control.name} cannot be had: it shapes advantages by statistics of the whole rollout, "
                    "and NeMo-RL's workers report log-probabilities alone": shapes,
                    f"control {control.name} cannot be had: it compares entropies with those of the rollout, and "
                    "NeMo-RL's workers report log-probabilities alone": "old_entropy" in control.needs,
                }
            )

    def make_loss(self, loss_class: Any, input_type: Any, cfg: Any, use_fused_linear_logprobs: bool = False):
        """In the place of ClippedPGLossFn(cfg, use_fused_linear_logprobs) in grpo.py's setup."""
        refuse(
            {
                "use_fused_linear_logprobs must be false: the statistics are computed from the logits": (
                    use_fused_linear_logprobs
                )
            }
        )
        self.controlled = ControlledLoss(self.controls, policy_loss_config(cfg))
        inner = loss_class(cfg)
        self.loss = ControlledLossFn(inner, input_type, self.controls, self.controlled.loss, self.controlled.clamp)
        return self.loss

    def train(self, original: Any, policy: Any, data: Any, loss_fn: Any, **named: Any) -> dict[str, Any]:
        """In the place of Policy.train: selects, sends the selection with the data, and adds metrics."""
        if loss_fn is not self.loss or named.get("eval_mode"):
            return original(policy, data, loss_fn, **named)
        rows, size = len(data["input_ids"]), named.get("gbs") or policy.cfg["train_global_batch_size"]
        generation = policy.cfg.get("generation") or {}
        refuse(
            {
                f"train_global_batch_size must be the rollout's {rows} responses, got {size}: the workers make all "
                "updates of a rollout in one call, and nothing can select between them": rows != size,
                "sequence_packing.fuse_loss must be false: its loss sees no logits": policy.cfg.get(
                    "sequence_packing", {}
                ).get("fuse_loss", False),
                "generation.top_k and generation.top_p must be off: the statistics are of the whole distribution": (
                    generation.get("top_k") not in (None, -1) or generation.get("top_p") not in (None, 1.0)
                ),
            }
        )
        controlled = self.controlled
        if self.weights is not None and self.resume:
            read_state(state_path(os.path.dirname(self.weights), 0), controlled)
        self.weights = None
        step = controlled.updates + 1
        row = torch.arange(rows)
        tokens = rollout_tokens(data, controlled.loss, row)
        shown = controlled.begin(step=step, steps=step, rollout=tokens)
        update = controlled.update([tokens], num_sequences=max(int(data["sample_mask"].sum()), 1))
        columns: dict[str, Tensor] = {f"{COLUMN}row": row}
        for i, chosen in enumerate(update.selections[0]):
            for name in ("mask", "drop", "weight"):
                value = None if chosen is None else getattr(chosen, name)
                if value is not None:
                    value = value.view(rows, -1)
                    columns[f"{COLUMN}{i}_{name}"] = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        self.loss.totals = update.totals
        self.loss.scalars = [{} if chosen is None else chosen.scalars for chosen in update.selections[0]]
        data.update(columns)
        try:
            results = original(policy, data, loss_fn, **named)
        except BaseException:
            update.abandon()
            raise
        finally:
            for name in columns:
                del data[name]
        found = results["all_mb_metrics"]
        sums = {name: found.pop(name) for name in list(found) if name.startswith(COLUMN)}
        update.computed(
            0, {n.removeprefix(COLUMN): torch.tensor(x, dtype=torch.float64).sum() for n, x in sums.items()}
        )
        shown |= update.finish() | controlled.after_step()
        found |= {name: [value] for name, value in entcov_names(shown).items()}
        return results


def install(controls: Mapping[str, Any], *, resume: bool = True) -> Patches:
    """Puts the controls into NeMo-RL's GRPO of this process, the driver, until `remove()`.

    Args:
        controls: names and knobs, such as {"clip_cov": {"clip_cov_ratio": 0.0002}}.
        resume: a run that goes on from a checkpoint loads the controls' state, which is kept in its folder `policy`;
            False: they begin anew.
    Raises: ValueError for a control that cannot be had here; RuntimeError for a function of NeMo-RL that is missing or
        has changed, by name.
    """
    plugin = Plugin(controls, resume)
    grpo = framework_module("nemo_rl.algorithms.grpo", TESTED)
    kinds = framework_module("nemo_rl.algorithms.loss.interfaces", TESTED)
    policy_class = framework_module("nemo_rl.models.policy.lm_policy", TESTED).Policy
    train = check_signature(policy_class, "train", ("data", "loss_fn", "eval_mode", "gbs"), TESTED)
    save = check_signature(policy_class, "save_checkpoint", ("weights_path",), TESTED)
    begin = check_signature(policy_class, "__init__", ("config", "weights_path"), TESTED)
    loss_class = check_signature(grpo, "ClippedPGLossFn", ("cfg", "use_fused_linear_logprobs"), TESTED)
    check_signature(
        loss_class, "__call__", ("next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks"), TESTED
    )

    def make_loss(cfg: Any, use_fused_linear_logprobs: bool = False) -> ControlledLossFn:
        return plugin.make_loss(loss_class, kinds.LossInputType.LOGIT, cfg, use_fused_linear_logprobs)

    def controlled_train(self, data, loss_fn, *rest, **named):
        names = ("eval_mode", "gbs", "mbs", "timer", "check_dim_skip_keys")
        return plugin.train(train, self, data, loss_fn, **dict(zip(names, rest, strict=False)), **named)

    def save_checkpoint(self, weights_path, *rest, **named):
        saved = save(self, weights_path, *rest, **named)
        if plugin.controlled is not None:
            write_state(state_path(os.path.dirname(weights_path), 0), plugin.controlled)
        return saved

    def remember(self, *rest, **named):
        begin(self, *rest, **named)
        plugin.weights = named.get("weights_path") or plugin.weights

    patches = Patches()
    patches.replace(grpo, "ClippedPGLossFn", make_loss)
    patches.replace(policy_class, "train", controlled_train)
    patches.replace(policy_class, "save_checkpoint", save_checkpoint)
    patches.replace(policy_class, "__init__", remember)
    return patches


def main(arguments: list[str]) -> None:
    """CONTROLS (JSON) SCRIPT ARGUMENTS...: runs the script, one of NeMo-RL's examples, with the controls."""
    if len(arguments) < 2:
        raise SystemExit("usage: python -m entcov.integrations.nemo_rl CONTROLS_AS_JSON SCRIPT [ARGUMENT ...]")
    try:
        controls = json.loads(arguments[0])
    except json.JSONDecodeError as error:
        raise SystemExit(
            f"the controls must be JSON, such as '{{\"clip_cov\": {{}}}}'; got {arguments[0]!r}: {error}"
        ) from error
    with install(controls):
        sys.argv = arguments[1:]
        runpy.run_path(arguments[1], run_name="__main__")


if __name__ == "__main__":
    importlib.import_module(__spec__.name).main(sys.argv[1:])  # not of __main__, whose classes the workers do not have
