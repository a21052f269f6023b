"""verl's TrainingWorker opens and closes the training steps: it alone sees a whole rollout."""

from functools import wraps
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from entcov.integrations.controlled_loss import entcov_names
from entcov.integrations.verl.config import AT
from entcov.integrations.verl.engine import COVERED, ControlledEngine, use_in_process
from entcov.integrations.verl.hooks import check_hooked, replace_attribute
from entcov.integrations.verl.loss import is_entcov
from entcov.integrations.verl.training import Training


def hook(engine_workers: ModuleType) -> None:
    worker = engine_workers.TrainingWorker

    def with_controls(own: Any) -> Any:
        @wraps(own)
        def set_loss_fn(self: Any, loss_fn: Any) -> Any:
            set_training(self, loss_fn, engine_workers.ppo_loss)
            return own(self, loss_fn)

        return set_loss_fn

    def as_step(own: Any) -> Any:
        @wraps(own)
        def train_mini_batch(self: Any, data: Any) -> Any:
            training = getattr(self.engine, "training", None)
            if training is None:
                return own(self, data)
            metrics = training.begin(self, data)
            output = own(self, data)
            metrics |= training.end()
            if output is not None:
                found = tu.get(output, "metrics")
                tu.assign_non_tensor(output, metrics=found | {n: [x] for n, x in entcov_names(metrics).items()})
            return output

        return train_mini_batch

    def with_statistics(own: Any) -> Any:
        @wraps(own)
        def init_model(self: Any) -> Any:
            if is_entcov(OmegaConf.select(self.config, "actor.policy_loss.loss_mode")):
                check_hooked()
                use_in_process()  # before the reference policy's engine is built, perhaps in a process without actor
            return own(self)

        return init_model

    replace_attribute(engine_workers.ActorRolloutRefWorker, "init_model", with_statistics)
    replace_attribute(worker, "set_loss_fn", with_controls)
    replace_attribute(worker, "train_mini_batch", as_step)


def set_training(worker: Any, loss_function: Any, ppo_loss: Any) -> None:
    """Gives the worker's engine the controls that the loss function's configuration names; none for another mode.

    Raises: ValueError for a configuration that makes no sense; RuntimeError where entcov cannot do what it asks.
    """
    engine, actor = worker.engine, getattr(loss_function, "keywords", {}).get("config")
    policy_loss = getattr(actor, "policy_loss", None)
    if policy_loss is None or not is_entcov(policy_loss.get("loss_mode")):
        if isinstance(engine, ControlledEngine):
            engine.training = None
        return
    check_hooked()
    mode, settings = policy_loss.loss_mode, worker.engine_config
    if not isinstance(engine, ControlledEngine):
        names = " and ".join(name.rpartition(".")[2] for name in COVERED)
        raise RuntimeError(
            f"{AT}.policy_loss.loss_mode={mode} works with verl's {names}, got {type(engine).__name__} "
            f"({AT}.strategy={settings.strategy})"
        )
    if loss_function.func is not ppo_loss:
        raise RuntimeError(f"{AT}.policy_loss.loss_mode={mode} works with verl's ppo_loss, got {loss_function.func!r}")
    if getattr(settings, "dynamic_context_parallel", False):
        raise RuntimeError(f"{AT}.megatron.dynamic_context_parallel must be False with loss_mode={mode}, got True")
    steps = worker.optimizer_config.total_training_steps
    if steps < 1:
        raise ValueError(f"{AT}.optim.total_training_steps must be at least 1 with loss_mode={mode}, got {steps}")
    engine.training = Training(engine, actor, steps)
