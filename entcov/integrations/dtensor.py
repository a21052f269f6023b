"""Logits and LM heads that are DTensors: what `token_stats` and `linear_token_stats` are given of them.

    logits [..., V], Shard(-1)      local, place = vocab_shard(logits)
                                    token_stats(local, target, **place)
    weight [V, D], Shard(0)         local, place = vocab_shard(weight, dim=0)
                                    linear_token_stats(hidden, local, target, **place)
    weight that FSDP2 shards        a plain tensor in the forward of the module that holds it; elsewhere
                                    weight.full_tensor(grad_placements=[Partial("avg")])

`hidden` and `target` are the same tensors on all ranks that share the vocabulary: `hidden.to_local()` of a replicated
DTensor, whose gradient `linear_token_stats` all-reduces. docs/own_loop.md has the layouts in use.
"""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def vocab_shard(tensor: Tensor, dim: int = -1) -> tuple[Tensor, dict[str, Any]]:
    """(this rank's part of a vocabulary-sharded DTensor, the arguments group, vocab_start and vocab_size).

    Equivalent to `tensor.to_local()`, and the mesh dimension over which `dim` is sharded as a process group. Gradients
    reach `tensor` with its own placements: a rank's columns have their whole gradient from its tokens.

    Args:
        tensor: DTensor. Exactly one mesh dimension shards `dim`, evenly or not, as `distribute_tensor` divides. Others
            may shard dimensions before `dim` (batch or sequence: then this rank has the statistics of its own tokens,
            and `target` must be theirs), or replicate logits. For a weight (dim=0) all others have size 1.
        dim: of the vocabulary: -1 of logits, 0 of an LM head's weight.
    Returns: the local tensor, for `token_stats` or `linear_token_stats`, and a dict of their keyword arguments.
        vocab_size is the tensor's; columns of padding at its end are left out by `place | {"vocab_size": n}`.
    Collectives: none. Mutated: nothing.
    Raises: TypeError for what is no DTensor, ValueError for a placement without such a meaning, which it names.
    """
    if not isinstance(tensor, DTensor):
        raise TypeError(f"tensor must be a DTensor, got {type(tensor).__name__}")
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"dim must be in [{-tensor.ndim}, {tensor.ndim}), got {dim}")
    mesh, placements, dim = tensor.device_mesh, tensor.placements, dim % tensor.ndim

    def refuse(rule: str) -> ValueError:
        names = mesh.mesh_dim_names or range(mesh.ndim)
        got = ", ".join(f"{name}: {placement}" for name, placement in zip(names, placements, strict=True))
        return ValueError(f"tensor {tuple(tensor.shape)} must {rule}, got the placements {got}")

    own = [i for i, placement in enumerate(placements) if placement.is_shard(dim)]
    if any(placement.is_partial() for placement in placements):
        raise refuse("hold values, not partial sums (redistribute it)")
    if not all(placement.is_replicate() or type(placement).__name__ == "Shard" for placement in placements):
        raise refuse("be sharded in the order of the mesh (full_tensor() gathers it)")
    if not own:
        raise refuse(f"be sharded over dimension {dim}, the vocabulary; one that every rank has whole needs no group")
    if len(own) > 1:
        raise refuse(f"be sharded over dimension {dim}, the vocabulary, by one mesh dimension")
    if any(placement.is_shard() and placement.dim > dim for placement in placements):
        raise refuse(f"be whole along the dimensions after {dim}, the vocabulary")
    if dim < tensor.ndim - 1 and mesh.size() > mesh.size(own[0]):
        raise refuse("be on the mesh of the vocabulary alone: over other ranks its gradient is a sum")
    ranks, columns = mesh.size(own[0]), tensor.shape[dim]
    each = -(-columns // ranks)
    start = min(mesh.get_local_rank(own[0]) * each, columns)
    return tensor.to_local(), {"group": mesh.get_group(own[0]), "vocab_start": start, "vocab_size": columns}
