"""The output layer of a Megatron-Core model that passes hidden states on instead of logits.

verl's forward hands them, with tokens and temperatures that it has packed alike, to the function that otherwise gets
the logits. That function computes the statistics from them and from the layer's weight.
"""

from collections.abc import Sequence

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from verl.utils.megatron_utils import unwrap_model

from entcov.integrations.verl.fused_head import refused


class HiddenStates(ColumnParallelLinear):
    """Returns its input, of the whole sequence under sequence parallelism; `used` is the weight of that call."""

    used: Tensor | None = None

    @property
    def reduces(self) -> bool:
        """Whether the gradient of the hidden states still has to be summed over the tensor-parallel ranks: the backward
        of sequence parallelism's all-gather does it."""
        return not self.sequence_parallel

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        weight = self.weight if weight is None else weight  # it is given where the embeddings are tied
        object.__setattr__(self, "used", weight)  # not as a parameter of this layer
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        return input_, None


def install(models: Sequence[nn.Module]) -> None:
    """Makes the output layer of this pipeline stage's models HiddenStates, in place; stages before the last have none.

    Raises:
        NotImplementedError: the output layer is not a ColumnParallelLinear.
    """
    for model in map(_language_model, models):
        if model.post_process:
            if type(model.output_layer) is not ColumnParallelLinear:
                raise refused(f"the output layer must be ColumnParallelLinear, is {type(model.output_layer).__name__}")
            model.output_layer.__class__ = HiddenStates


def layer_of(models: Sequence[nn.Module]) -> HiddenStates:
    """The layer that `install` has changed."""
    return next(model.output_layer for model in map(_language_model, models) if model.post_process)


def _language_model(model: nn.Module) -> nn.Module:
    model = unwrap_model(model)
    return getattr(model, "language_model", model)
