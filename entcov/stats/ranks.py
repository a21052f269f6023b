"""Agreement of the ranks of a group: how all ranks detect that one has failed or was called with other arguments.

A rank that raised before a collective would leave the others waiting until the group's time-out. So a rank that fails
still enters the collective, with a message of the right size. Every message contains one 64-bit word: a digest of the
arguments that must be equal on all ranks (never 0), or 0 on a rank that failed. The word is part of the first
collective that the call needs anyway, so agreement costs no additional collective.

On the CPU the host compares the words. If they differ, one more collective exchanges the arguments, and all ranks
raise: the rank that failed raises its own error, the others raise one that names it. On a GPU the comparison would make
the host wait in every call. There the results become NaN on the device, and only the rank that failed raises. With
TORCH_DISTRIBUTED_DEBUG=DETAIL the host compares the words on a GPU too.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from entcov.ops.core import hash_text
from entcov.ops.message import hash_values


def eager(function: Callable) -> Callable:
    """`function`, excluded from tracing by torch.compile: it enters collectives and checks their results.

    A decorator would import the compiler when entcov is imported, which doubles the import time.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def host_may_read(device: torch.device) -> bool:
    """Whether the host may read the result of a collective. On a GPU it would have to wait for it."""
    return device.type == "cpu" or dist.get_debug_level() == dist.DebugLevel.DETAIL


def attempt(function: Callable[[], Any], group: dist.ProcessGroup | None) -> tuple[Any, Exception | None]:
    """(function(), None), or (None, its exception) if there are other ranks, which wait for this one. Without other
    ranks the exception is raised."""
    check_member(group)
    try:
        return function(), None
    except Exception as error:
        if group is None or dist.get_world_size(group) == 1:
            raise
        return None, error


def check_member(group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_rank(group) < 0:  # no rank of the group waits for this one
        raise ValueError("group must contain the calling rank, and does not")


def digest(op: str, call: dict[str, Any]) -> int:
    """64-bit hash of the public function's name and the arguments that must be equal on all ranks; never 0."""
    return hash_text(repr((op, list(call.items()))))


def raise_together(
    op: str, group: dist.ProcessGroup, failure: Exception | None, call: dict[str, Any], checksums: dict[str, int]
) -> NoReturn:
    """Raises on every rank, after the words have been found to differ. One collective of Python objects.

    Args:
        op: public name of the call, for messages.
        failure: this rank's own exception, or None.
        call: this rank's arguments as in its digest, by name.
        checksums: hashes of this rank's tensors of values, by name.

    Raises:
        `failure` on a rank that has one. Elsewhere a RuntimeError that names the first rank that failed, or the first
        difference between rank 0 and another rank.
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
    """The all-reduces of one call over a group. The first one also exchanges the words of all ranks.

    Args:
        op: public name of the call, for messages.
        group: None or a group of one rank: nothing is sent or compared.
        call: the arguments that must be equal on all ranks, by name. A tensor of one int64 or float64 stands for its
            value, which is compared on its device.
        own: [n] int64 to be gathered from all ranks, with the first sum.
        failure: this rank's exception. The rank enters every collective, with the data of a rank without tokens;
            `finish` raises it.
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
        self.refused: Tensor | None = None  # 0-d bool on a GPU, true if the ranks do not agree; None: they agree
        self.own = None if own is None else own[None]  # [ranks, n] after the first sum
        self._words: Tensor | None = None  # [ranks, 1 + n], zeros except in this rank's row; None after the first sum
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
        """The sum of the int64 `tensor` over the ranks. May overwrite `tensor`. One all-reduce.

        Raises: if the ranks do not agree and the host may read the words, as `raise_together`.
        """
        if self.group is None:
            return tensor
        if self._words is None:
            dist.all_reduce(tensor, group=self.group)
            return tensor
        joined = torch.cat([tensor.flatten(), self._words.flatten()])
        dist.all_reduce(joined, group=self.group)
        words = joined[tensor.numel() :].view(self._words.shape)
        self._words, self.own = None, words[:, 1:].contiguous()
        differ = (words[:, 0] != words[0, 0]).any() | (words[0, 0] == 0)
        if not host_may_read(tensor.device):
            self.refused = differ
        elif differ:
            call = {name: x.item() if isinstance(x, Tensor) else x for name, x in self.call.items()}
            raise_together(self.op, self.group, self.failure, call, {})
        return joined[: tensor.numel()].view(tensor.shape)

    def finish(self) -> None:
        """Raises this rank's own exception, if any; the other ranks have raised or their results are NaN."""
        if self.failure is not None:
            raise self.failure
