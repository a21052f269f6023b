"""An output embedding of a Hugging Face model that returns statistics of its tokens instead of their logits.

The statistics are computed where the logits would be, in the embedding's own forward. So FSDP gathers its weight before
and reduces the weight's gradient after, as for any layer, whether it wraps the embedding by itself or not.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # hidden [..., D], weight [V, D], bias -> [..., n]


class StatisticsHead(nn.Linear):
    """`nn.Linear`, whose next forward after `ask(compute)` returns compute(hidden, weight, bias) instead.

    The model passes the result on as its logits, and `take(logits)` returns it. A head that was not asked gives logits.
    """

    _compute: Compute | None = None
    _made: Tensor | None = None

    def ask(self, compute: Compute) -> None:
        self._compute, self._made = compute, None

    def forward(self, hidden: Tensor) -> Tensor:
        compute, self._compute = self._compute, None
        if compute is None:
            return super().forward(hidden)
        if isinstance(self.weight, DTensor):
            raise refused("the output embedding's weight must be whole in its forward, and is a DTensor")
        self._made = compute(hidden, self.weight, self.bias)
        return self._made

    def take(self, logits: Tensor) -> Tensor:
        """The statistics, out of the model's output.

        Raises:
            NotImplementedError: the model computes its logits in another way than by this layer alone.
        """
        made, self._made, self._compute = self._made, None, None
        if made is None:
            raise refused("the model does not call its output embedding")
        if logits is not made or made._version:
            raise refused("the model changes its logits after the output embedding (a scale or a softcap)")
        return made


def install(model: nn.Module) -> None:
    """Makes the output embedding of a Hugging Face model a StatisticsHead, in place. Before FSDP wraps the model.

    Raises:
        NotImplementedError: the output embedding is not an `nn.Linear`.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise refused(f"the output embedding must be torch.nn.Linear, and is {type(head).__name__}")
    head.__class__ = StatisticsHead


def installed(model: nn.Module) -> StatisticsHead:
    """The StatisticsHead of a model, which FSDP or PEFT may have wrapped.

    Raises:
        NotImplementedError: something has taken its place (LoRA on the output embedding).
    """
    head = model.get_output_embeddings()
    if not isinstance(head, StatisticsHead):
        raise refused(f"the output embedding must not be wrapped (by LoRA), and is {type(head).__name__}")
    return head


def refused(reason: str) -> NotImplementedError:
    """The error where this back end cannot be used."""
    return NotImplementedError(
        f"fused_kernel_options.impl_backend=entcov cannot be used: {reason}. Set model.use_fused_kernels=False; entcov "
        "then computes its statistics from logits."
    )
