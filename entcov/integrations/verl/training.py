"""The controls of one actor, through its training steps: from verl's workers and engines to `ControlledLoss`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.metric.utils import AggregationType, Metric

from entcov import arguments as check
from entcov.integrations.controlled_loss import ControlledLoss, Update, entcov_names
from entcov.integrations.remembered import decides
from entcov.integrations.verl.config import AT, RolloutWeights, controls_of, loss_of
from entcov.integrations.verl.loss import using
from entcov.integrations.verl.rollout import Rollout, Scored, output_column, response_column, taken
from entcov.objective.tokens import Tokens

ROW = "entcov_row"  # [B] int64 in verl's data: the number of the sequence in this rank's rollout
# Names in an engine's model_output -> fields of Tokens.
STATISTICS = {
    "log_probs": "logprob", "entropy": "entropy", "entropy_drift": "entropy_drift", "collision": "collision",
    "clamped_entropy": "clamped_entropy",
}  # fmt: skip
OURS = ("entropy_drift", "collision", "clamped_entropy")  # of these: what verl does not know
VERLS_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")


class Training:
    """`ControlledLoss` over the mini-batches of an engine, each before the engine divides it.

    Args:
        engine: the actor's, initialised; `has_outputs` says whether this rank sees what the model says (with pipeline
            parallelism the last stage does; the others only take part in the forward passes).
        actor: verl's ActorConfig with a loss mode of entcov.
        steps: training steps of the whole run.
    """

    def __init__(self, engine: Any, actor: Any, steps: int):
        self.weights = RolloutWeights()
        controls = [*controls_of(actor.policy_loss), self.weights]
        self.controlled = ControlledLoss(controls, loss_of(actor), group=engine.get_data_parallel_group())
        # Whether a control's `begin` sees the rollout; `begins` is true for controllers of its means too.
        self.decides = any(map(decides, controls))
        self.has_outputs: bool = engine.has_outputs
        self.needs = self.controlled.needs
        self.steps, self.step = steps, 0  # of the run, and done
        self._scored: Scored | None = None  # what the policy of the moment said when it was last asked
        self.rollout: Rollout | None = None  # of the current step
        self._tokens: Tokens | None = None  # of the rollout; with the current policy's statistics, if they are known

    def score(self, data: TensorDict, infer: Callable[[TensorDict], dict]) -> dict:
        """A forward pass over a rollout that verl asked for; its statistics are kept until the weights change."""
        if self.decides:
            tu.assign_non_tensor(data, entcov_moments=True, entcov_clamp=self.controlled.clamp)
        output = infer(data)
        said = output.get("model_output", {})
        self._scored = Scored(data, said, tuple(STATISTICS))
        for name in OURS:
            said.pop(name, None)
        return output

    def weights_changed(self) -> None:
        self._scored = None

    def begin(self, worker: Any, data: TensorDict) -> dict[str, float]:
        """Begins a training step on this rank's share of a rollout; returns the controls' metrics of it.

        Where a control decides over the rollout and the policy has not been asked about it since the last update, it
        is asked now: one forward pass.
        """
        controlled = self.controlled
        known = (controlled.begins or controlled.selects) and self._all_know(data)
        if not known:
            self._scored = None
            if controlled.begins:
                again = data.select(*data.keys())
                worker.infer_batch(tu.assign_non_tensor(again, calculate_entropy=True, compute_loss=False))
        data[ROW] = torch.arange(len(data))
        self.step += 1
        self.rollout = Rollout(data, controlled.group, get_device_id()) if self.has_outputs else None
        if self.rollout is None:
            return {}
        self._tokens = self.rollout.tokens
        if self._scored is not None:
            places, width = self._scored.places(data), self.rollout.mask.shape[1]
            columns = {name: column[places, :width] for name, column in self._scored.columns.items()}
            found = {STATISTICS[name]: self.rollout.packed(column) for name, column in columns.items()}
            device = self._tokens.loss_mask.device
            self._tokens = replace(self._tokens, **{name: column.to(device) for name, column in found.items()})
        if self.decides:
            self._check_rollout()
        return controlled.begin(step=self.step, steps=max(self.steps, self.step), rollout=self._tokens)

    def train_batch(
        self,
        data: TensorDict,
        loss_function: Callable,
        infer: Callable[[TensorDict], dict],
        train: Callable[[TensorDict, Callable], dict],
    ) -> dict:
        """One optimizer update: selects over the mini-batch, then lets verl do the update with the controlled loss."""
        if ROW not in data:
            raise RuntimeError(
                "train_batch: entcov's loss modes need TrainingWorker.train_mini_batch, which begins and ends a "
                "training step"
            )
        controlled, said = self.controlled, None
        wanted = {"calculate_entropy": True} if "entropy" in self.needs else {}
        if controlled.selects and self._scored is None:
            copy = tu.assign_non_tensor(data.select(*data.keys()), **({"calculate_entropy": False} | wanted))
            said = infer(copy).get("model_output", {})
        if controlled.clamp:
            wanted["entcov_clamp"] = controlled.clamp
        tu.assign_non_tensor(data, **wanted)
        if not self.has_outputs:
            return train(data, loss_function)
        rows = data[ROW].tolist()
        tokens = taken(self._tokens, self.rollout.index(rows))
        if said is not None:
            mask = response_column(data, "response_mask").bool()
            tokens = replace(tokens, **_packed(said, ("log_probs", "entropy"), data, mask))
        sequences = tu.get_non_tensor_data(data, "global_batch_size", None)
        update = controlled.update([tokens], num_sequences=sequences)
        try:
            output = train(data, _MiniBatchLoss(self, update, tokens, rows, loss_function))
        except BaseException:
            update.abandon()
            raise
        for name, value in entcov_names(update.finish()).items():  # equal on all ranks: their maximum is the number
            output["metrics"][name] = Metric(AggregationType.MAX, value)
        return output

    def end(self) -> dict[str, float]:
        """Ends the training step; the controls adapt."""
        self.rollout = self._tokens = None
        return self.controlled.after_step() if self.has_outputs else {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.controlled.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of other controls."""
        check.integer("step", state["step"], 0)
        self.controlled.load_state_dict(state["loss"])
        self.step, self._scored = state["step"], None

    def _all_know(self, data: TensorDict) -> bool:
        """Whether every rank has the statistics of its sequences by the current policy. 1 all-reduce over all ranks."""
        known = self._scored is not None and self._scored.places(data) is not None
        votes = torch.tensor(int(known), device=get_device_id())
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes)

    def _check_rollout(self) -> None:
        """A control that decides over the rollout may read all of these."""
        origins = {
            "reward": "token_level_scores or rm_scores in the data that verl's trainer sends",
            "group": "uid in the data that verl's trainer sends",
            "entropy": "the engine's model_output",
            "entropy_drift": f"the engine's model_output: {AT}.use_fused_kernels=False, or "
            "actor_rollout_ref.model.fused_kernel_options.impl_backend=entcov",
        }
        for name, origin in origins.items():
            if getattr(self._tokens, name) is None:
                names = ", ".join(control.name for control in self.controlled.controls if control is not self.weights)
                raise ValueError(f"the rollout must have {name}, which comes from {origin}; controls: {names}")


class _MiniBatchLoss:
    """verl's loss function of the micro-batches of one mini-batch, with the policy loss of its `Update`."""

    def __init__(self, training: Training, update: Update, tokens: Tokens, rows: list[int], own: Callable):
        self.training, self.update, self.tokens, self.own = training, update, tokens, own
        ends = accumulate((training.rollout.length(row) for row in rows), initial=0)
        self.places = {row: torch.arange(a, b) for row, (a, b) in zip(rows, pairwise(ends), strict=True)}

    def __call__(self, model_output: dict, data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict]:
        part = torch.cat([self.places[row] for row in data[ROW].tolist()]).to(self.tokens.loss_mask.device)

        def policy_loss(log_prob: Tensor, mask: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, float]]:
            fields = {"entropy": None, "clamped_entropy": None} | _packed(
                model_output, ("entropy", "clamped_entropy"), data, mask
            )
            missing = [name for name, value in fields.items() if value is None and name in self.training.needs]
            if missing:
                raise ValueError(f"the engine's model_output must have {missing[0]}, a control needs it; got none")
            tokens = taken(self.tokens, part, **fields, logprob=log_prob[mask].float())
            self.training.weights.weight = None if weights is None else weights[mask].float()
            loss, metrics = self.update.loss(0, tokens, part=part)
            share = float(self.update.totals.num_tokens) / max(1, len(part))  # verl's are means of the micro-batch
            return loss * data["dp_size"], {name: float(metrics[name]) * share for name in VERLS_METRICS}

        with using(policy_loss):
            return self.own(model_output=model_output, data=data, dp_group=dp_group)


def _packed(output: dict, names: Sequence[str], data: TensorDict, mask: Tensor) -> dict[str, Tensor]:
    """Those of the statistics that the output has, of the loss tokens, by the names of Tokens."""
    found = {STATISTICS[name]: output_column(output, name, data) for name in names if name in output}
    return {name: column[mask.to(column.device)] for name, column in found.items()}
