"""The stages of a selection with the sums over the ranks of a group between them."""

from typing import Any

import torch.distributed as dist

from entcov.ops.token_select import Selecting
from entcov.stats.ranks import AllReduces


def run_stages(
    op: str, group: dist.ProcessGroup | None, selecting: Selecting, call: dict[str, Any], failure: Exception | None
) -> AllReduces:
    """Runs all stages of `selecting`, and adds up over the ranks what each leaves for the next one.

    Args: op, group, call, failure: of `AllReduces`.
    Collectives: all-reduces of 257 KiB, 2 (QUANTILE), 4 (DRAW) or 6 (LARGEST), and one of 512 KiB but for QUANTILE.
    """
    first, last = selecting.stages
    device, own = selecting.own.device, selecting.own
    if group is None:  # nothing to add up
        ranks = AllReduces(op, None, device, call, own, failure)
        selecting.run(first, last, ranks.own)
        return ranks
    part = selecting.run(first, first, own[None])
    ranks = AllReduces(op, group, device, call, own, failure)  # `own` is known now
    for stage in range(first, last + 1):
        if stage > first:
            part = selecting.run(stage, stage, ranks.own, ranks.refused)
        if part is not None:
            total = ranks.sum(part)
            if total is not part:
                part.copy_(total)
    return ranks
