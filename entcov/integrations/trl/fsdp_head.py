"""The LM head's weight where FSDP2 has sharded it: gathered, with the gradient of FSDP2's own reduction."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def gathered(weight: DTensor) -> Tensor:
    """The whole weight of a sharded parameter that its own module's forward does not gather.

    Every rank multiplies it with other tokens, so the gradient of the parameter is the mean over the ranks of their
    gradients, as FSDP2 reduces those of other parameters. `weight.full_tensor()` alone takes the gradient for one that
    is equal on all ranks: then each rank keeps its shard of its own tokens' gradient, and the others' is lost
    (TRL 1.16.0, trl/trainer/utils.py:1637; tests/integrations/trl/test_fsdp_head.py has the numbers).

    Differentiable in weight. Collectives: one all-gather; in backward one reduce-scatter. Every rank must call.
    """
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
