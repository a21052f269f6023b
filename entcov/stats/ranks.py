"""What the ranks of a group must agree on, and how the error of one rank becomes an error of all.

A rank that raised before its collective would leave the others waiting for the group's time-out. So a rank that cannot
do its part enters the collective all the same, with a message of the right size and a mark. The mark is one word: a
digest of what all ranks must be called with, never 0, and 0 on a rank that failed. It travels in the first collective
that the call has anyway, so ranks that agree pay for no other.

On the CPU the host looks at the words. Where they differ, the ranks tell one another in one more collective what they
were called with, and all of them raise: the one that failed its own error, the others an error that names it. On a GPU
the host would have to wait to see the words, in every call, so there the results are made NaN on the device, and only
the rank that failed raises. With TORCH_DISTRIBUTED_DEBUG=DETAIL the host looks there too.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from entcov.ops.core import hash_text
from entcov.ops.message import hash_values


def eager(function: Callable) -> Callable:
    """`function` under torch.compiler.disable: collectives, and checks of what they bring, are not traced.

    Decided at the call and not by a decorator, which would import the compiler, and double the time to import entcov.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def host_may_read(device: torch.device) -> bool:
    """Whether the host looks at what a collective brought: on a GPU it would wait for it."""
    return device.type == "cpu" or dist.get_debug_level() == dist.DebugLevel.DETAIL


def attempt(function: Callable[[], Any], group: dist.ProcessGroup | None) -> tuple[Any, Exception | None]:
    """(function(), None), or (None, its exception) where other ranks wait for this one; elsewhere it is raised."""
    check_member(group)
    try:
        return function(), None
    except Exception as error:
        if group is None or dist.get_world_size(group) == 1:
            raise
        return None, error


def check_member(group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_rank(group) < 0:  # nobody waits for this rank
        raise ValueError("group must contain the calling rank, and does not")


def digest(op: str, call: dict[str, Any]) -> int:
    """A hash of what every rank must be called with; not 0."""
    return hash_text(repr((op, list(call.items()))))


def raise_together(
    op: str, group: dist.ProcessGroup, failure: Exception | None, call: dict[str, Any], checksums: dict[str, int]
) -> NoReturn:
    """What every rank of the group does once it has seen that their words differ. One collective of Python objects.

    Args:
        failure: this rank's own exception.
        call: what this rank was called with, by the argument's name: as in its digest.
        checksums: the same for values that are too many to be shown.
    """
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone: list = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, (op, text, call, checksums), group=group)
    except RuntimeError as error:  # gloo ends the process of a rank that gets more than it expects
        raise failure or RuntimeError(
            f"{op}: the ranks of the group do not agree on the call, and one ended before it said what it was called "
            "with. Every rank must make the call, with equally many tokens and the same outputs (moments, clamp). The "
            f"backend says: {error}"
        ) from error
    if failure is not None:
        raise failure
    for rank, (_, theirs, *_) in enumerate(everyone):
        if theirs is not None:
            raise RuntimeError(f"{op}: rank {rank} of the group cannot do its part: {theirs}")
    same = "all ranks of the group must be called with the same"
    first_op, _, first_call, first_checksums = everyone[0]
    for rank, (other, *_) in enumerate(everyone):
        if other != first_op:
            raise RuntimeError(
                f"all ranks of the group must make the same call: rank 0 makes {first_op}, rank {rank} makes {other}"
            )
    for name, value in first_call.items():
        for rank, (_, _, theirs, _) in enumerate(everyone):
            if repr(theirs.get(name)) != repr(value):
                raise RuntimeError(f"{op}: {same} {name}: rank 0 has {value}, rank {rank} has {theirs.get(name)}")
    for name, value in first_checksums.items():
        for rank, (*_, theirs) in enumerate(everyone):
            if theirs.get(name) != value:
                raise RuntimeError(f"{op}: {same} {name}: the values on rank {rank} are not those on rank 0")
    raise RuntimeError(f"{op}: the ranks of the group do not agree on the call, though they say the same: {everyone}")


class AllReduces:
    """The all-reduces of one call over a group. The first carries each rank's word, in a place of its own.

    Args:
        op: public name of the call, for messages.
        group: None: this process is alone, and nothing is sent or compared.
        call: what every rank must be called with, by the argument's name. A tensor of one int64 or float64 stands for
            its value, which is compared on its device.
        own: [n] int64 that the others want to know of this rank.
        failure: the exception that this rank has to raise. It takes part all the same, in every collective, with what
            a rank without tokens would send; `finish` raises it.
    """

    def __init__(
        self,
        op: str,
        group: dist.ProcessGroup | None,
        device: torch.device,
        call: dict[str, Any],
        own: Tensor | None = None,
        failure: Exception | None = None,
    ):
        self.op, self.call, self.failure = op, call, failure
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.refused: Tensor | None = None  # 0-d bool: the ranks do not agree; None: they do
        self.own = None if own is None else own[None]  # [ranks, n] once the first sum is there
        self._words: Tensor | None = None  # [ranks, 1 + n] of which this rank's row is filled in
        if self.group is not None:
            size = (dist.get_world_size(group), 1 + (0 if own is None else len(own)))
            self._words = torch.zeros(size, dtype=torch.int64, device=device)
            if own is not None:
                self._words[dist.get_rank(group), 1:] = own
            if failure is None:
                self._words[dist.get_rank(group), :1] = self._word(device)

    def _word(self, device: torch.device) -> Tensor:
        tensors = {name: value for name, value in self.call.items() if isinstance(value, Tensor)}
        word = digest(self.op, {**self.call, **dict.fromkeys(tensors)})
        if not tensors:
            return torch.full((1,), word, dtype=torch.int64, device=device)
        values = [value.reshape(1).view(torch.int64).to(device) for value in tensors.values()]
        return hash_values(torch.cat(values), word)[None]

    def sum(self, tensor: Tensor) -> Tensor:
        """The int64 `tensor` added up over the ranks, which it may overwrite."""
        if self.group is None:
            return tensor
        if self._words is None:
            dist.all_reduce(tensor, group=self.group)
            return tensor
        joined = torch.cat([tensor.flatten(), self._words.flatten()])
        dist.all_reduce(joined, group=self.group)
        words = joined[tensor.numel() :].view(self._words.shape)
        self._words, self.own = None, words[:, 1:]
        differ = (words[:, 0] != words[0, 0]).any() | (words[0, 0] == 0)
        if not host_may_read(tensor.device):
            self.refused = differ
        elif differ:
            call = {name: x.item() if isinstance(x, Tensor) else x for name, x in self.call.items()}
            raise_together(self.op, self.group, self.failure, call, {})
        return joined[: tensor.numel()].view(tensor.shape)

    def finish(self) -> None:
        """Raises this rank's own exception. The others have had their NaN."""
        if self.failure is not None:
            raise self.failure
