"""verl's engines with entcov: which engine gets which mixins, and the mixin that takes part in the updates."""

from functools import cache, partial, wraps
from types import ModuleType
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from entcov.integrations.verl import checkpoint
from entcov.integrations.verl.hooks import at_uninstall, replace_attribute
from entcov.integrations.verl.statistics import FSDPStatistics, MegatronStatistics
from entcov.integrations.verl.training import Training

# Engines that are covered, by module and name, and the mixins of their statistics. Subclasses of these engines (VeOmni,
# NPU) override what the mixins stand before: they are left alone.
COVERED = {
    "verl.workers.engine.fsdp.transformer_impl.FSDPEngineWithLMHead": FSDPStatistics,
    "verl.workers.engine.megatron.transformer_impl.MegatronEngineWithLMHead": MegatronStatistics,
}

_process_uses_entcov = False


def use_in_process() -> None:
    """From now on the statistics of every covered engine of this process are entcov's: the reference policy's too."""
    global _process_uses_entcov
    _process_uses_entcov = True
    at_uninstall(_use_no_more)


def _use_no_more() -> None:
    global _process_uses_entcov
    _process_uses_entcov = False


def hook(base: ModuleType) -> None:
    """Lets verl's registry of engines give out classes with the mixins, whatever device or vendor it looks up."""

    def made(own: Any) -> Any:
        look_up = own.__func__

        @wraps(look_up)
        def get_engine_cls(cls: type, model_type: str, backend: str) -> type:
            return with_mixins(look_up(cls, model_type, backend))

        return classmethod(get_engine_cls)

    replace_attribute(base.EngineRegistry, "get_engine_cls", made)


@cache
def with_mixins(engine: type) -> type:
    """The engine's class with entcov, or the class itself if it is none of COVERED."""
    statistics = COVERED.get(f"{engine.__module__}.{engine.__qualname__}")
    if statistics is None:
        return engine
    bases = (ControlledEngine, statistics, engine)
    return type(f"Entcov{engine.__name__}", bases, {"statistics": statistics})


class ControlledEngine:
    """Mixin before an engine and its statistics. With `training` set, every update selects over the whole mini-batch.

    The statistics are verl's own until a loss mode of entcov is used, or model.fused_kernel_options asks for entcov's.
    """

    statistics: type  # the mixin of entcov/integrations/verl/statistics.py
    training: Training | None = None

    @property
    def has_outputs(self) -> bool:
        """Whether this rank has the model's outputs: with pipeline parallelism the ranks of the last stage do."""
        if not hasattr(self, "tf_config"):
            return True
        from megatron.core import parallel_state

        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    @property
    def _next(self) -> Any:
        """The class after this one that computes statistics."""
        entcov = self.training is not None or _process_uses_entcov or getattr(self, "_without_logits", False)
        return super() if entcov else super(self.statistics, self)

    def prepare_model_outputs(self, *args: Any, **kwargs: Any) -> dict:
        return self._next.prepare_model_outputs(*args, **kwargs)

    def _lm_head_logits_processor(self, *args: Any, **kwargs: Any) -> dict:  # of Megatron's engine
        return self._next._lm_head_logits_processor(*args, **kwargs)

    def infer_batch(self, data: TensorDict, loss_function: Any = None) -> dict:
        infer = partial(super().infer_batch, loss_function=loss_function)
        scores = loss_function is None and tu.get_non_tensor_data(data, "calculate_entropy", False)
        return infer(data) if self.training is None or not scores else self.training.score(data, infer)

    def train_batch(self, data: TensorDict, loss_function: Any) -> dict:
        if self.training is None:
            return super().train_batch(data, loss_function)
        return self.training.train_batch(data, loss_function, super().infer_batch, super().train_batch)

    def optimizer_step(self) -> Any:
        if self.training is not None:
            self.training.weights_changed()
        return super().optimizer_step()

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.training is not None:
            checkpoint.save(self.training, local_path)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        state = None
        if self.training is not None and local_path is not None:
            state = checkpoint.read(local_path)  # before verl, which may delete what it has loaded
        super().load_checkpoint(local_path, *args, **kwargs)
        if state is not None:
            checkpoint.restore(self.training, state, local_path)
