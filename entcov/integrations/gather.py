"""The tokens of all data-parallel ranks on every rank, in one order for every division over ranks."""

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from entcov.objective.tokens import Tokens
from entcov.stats.ranks import AllReduces, attempt


@torch.no_grad()
def gather_tokens(own: Tokens, group: dist.ProcessGroup | None) -> Tokens:
    """The loss tokens of all ranks, in the order of their `token_id`; `loss_mask` is True everywhere.

    Args:
        own: this rank's tokens; `token_id` must be set, and unique over all ranks.
        group: the ranks; None: this process has all.
    Returns: [N] tokens, every field that `own` has, float32 unless a field of `own` is float64. Equal on all ranks.
    Collectives: 1 all-reduce of 16 bytes a rank, 2 all-gathers (4 bytes a floating field and token, 8 an integer one).
    Raises: ValueError where `token_id` is missing or repeated; RuntimeError on every rank where the ranks have other
        fields or one has failed (CPU; on an accelerator the rank that failed raises alone).
    """

    def columns() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if own.token_id is None:
            raise ValueError("tokens.token_id must be given to gather them from all ranks, got None")
        floats, integers = {}, {}
        for field in fields(Tokens):
            value = getattr(own, field.name)
            if value is not None and field.name != "loss_mask":
                (floats if value.is_floating_point() else integers)[field.name] = value.detach()[own.loss_mask]
        return floats, integers

    result, failure = attempt(columns, group)
    floats, integers = result or ({}, {})
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats.values()) else torch.float32
    call = {"floating fields": list(floats), "integer fields": list(integers), "dtype": str(dtype)}
    device = own.loss_mask.device if isinstance(own.loss_mask, Tensor) else torch.device("cpu")
    count = torch.tensor([len(next(iter(integers.values()), []))], device=device)
    ranks = AllReduces("gather_tokens", group, device, call, own=count, failure=failure)
    ranks.sum(torch.zeros(1, dtype=torch.int64, device=device))
    ranks.finish()
    counts = ranks.own[:, 0].tolist()
    table = {}
    for part, kind in ((floats, dtype), (integers, torch.int64)):
        stacked = torch.stack([value.to(kind) for value in part.values()], dim=1)
        table |= dict(zip(part, _all_rows(stacked, counts, ranks.group).unbind(1), strict=True))
    order = table["token_id"].argsort(stable=True)
    table = {name: value[order] for name, value in table.items()}
    repeated = int((table["token_id"][1:] == table["token_id"][:-1]).sum())
    if repeated:
        raise ValueError(f"token_id must be unique over all ranks: {repeated} of {len(order)} tokens repeat one")
    return Tokens(**table, loss_mask=torch.ones(len(order), dtype=torch.bool, device=device))


def _all_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows [n, k] of all ranks end to end; rank r has counts[r] of them."""
    if group is None:
        return rows
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
