"""token_select: the stages of a selection of tokens, and of a quantile of their scores (csrc/token_select.h)."""

from typing import NamedTuple

import torch
from torch import Tensor

from entcov import _cpu
from entcov.ops.core import KERNELS, addresses, check_rows, define, launch

DRAW, LARGEST, QUANTILE = 0, 1, 2  # SelectKind
MARK, CHECK = 6, 7  # stages 0 to 5 count digits
STAGES = {DRAW: (2, CHECK), LARGEST: (0, CHECK), QUANTILE: (0, 1)}  # the first and the last one
LAYOUT = _cpu.SELECT_LAYOUT  # of a SelectWorkspace, in int64


class SelectSpec(NamedTuple):
    """SelectSpec of csrc/token_select.h."""

    kind: int
    strict: bool = False
    round_up: bool = False
    low: float = 0.0
    high: float = 0.0
    ratio: float = 0.0
    at_least: int = 0
    seed: int = 0  # taken modulo 2^64; not used where a tensor is given
    step: int = 0


def select_workspace(T: int, like: Tensor, kind: int) -> Tensor:
    """What `token_select` keeps between its stages, on the device of `like`."""
    kernels = KERNELS.get(like.device.type)  # none: a tensor without values
    words = kernels.select_workspace(0 if kind == QUANTILE else T) if kernels else LAYOUT["words"]
    return like.new_empty(words, dtype=torch.int64)


def own_of(workspace: Tensor) -> Tensor:
    """[2] int64 that every rank tells the others with its first sum."""
    return workspace[:2]


def part_to_sum(workspace: Tensor, kind: int, stage: int) -> Tensor:
    """What the ranks add up after this stage, a view of the workspace; not after CHECK."""
    if stage == MARK:
        return workspace[LAYOUT["marks"] : LAYOUT["words"]]
    at = LAYOUT["histograms"] + stage * LAYOUT["histogram"]
    return workspace[LAYOUT["sums"] if kind == QUANTILE and stage == 0 else at : at + LAYOUT["histogram"]]


def _prepare(
    workspace, chosen, result, threshold, value, mask, token_id, exclude, num_tokens, seed, step, own, refused, *spec
):
    (*spec, first, last), T = spec, value.shape[:1]
    spec = SelectSpec(*spec)
    check_rows(value, "value", torch.float32, T, value)
    check_rows(mask, "mask", torch.bool, T, value)
    no_ids = spec.kind == QUANTILE
    check_rows(token_id, "token_id", torch.int64, T, value, optional=no_ids)
    check_rows(exclude, "exclude", torch.bool, T, value, optional=True)
    check_rows(chosen, "chosen", torch.bool, T, value, optional=no_ids)
    check_rows(result, "result", torch.int64, (3,), value, optional=no_ids)
    check_rows(threshold, "threshold", torch.float32, (1,), value, optional=no_ids)
    for name, number in (("num_tokens", num_tokens), ("seed", seed), ("step", step)):
        check_rows(number, name, torch.int64, (), value, optional=name != "num_tokens")
    check_rows(own, "own", torch.int64, (len(own), 2), value)
    check_rows(refused, "refused", torch.bool, (), value, optional=True)
    begin, end = STAGES[spec.kind]
    if not begin <= first <= last <= end:
        raise ValueError(f"first and last must be stages from {begin} to {end}, got {first} and {last}")
    check_rows(workspace, "workspace", torch.int64, workspace.shape[:1], value)
    kernels = KERNELS.get(value.device.type)
    if kernels and len(workspace) < kernels.select_workspace(0 if no_ids else len(value)):
        raise ValueError(f"workspace must be what select_workspace returns, got {len(workspace)} words")


def _fill(
    _, workspace, chosen, result, threshold, value, mask, token_id, exclude, num_tokens, seed, step, own, refused, *spec
):
    tokens = (value, mask, token_id, exclude, num_tokens, seed, step, own, refused)
    *spec, first, last = spec
    launch(
        "token_select", value.device, addresses(tokens, 9), len(value), tuple(spec), len(own), first, last, workspace,
        addresses((chosen, result, threshold), 3),
    )  # fmt: skip


_token_select = define(
    "token_select",
    "(Tensor(a!) workspace, Tensor(b!)? chosen, Tensor(c!)? result, Tensor(d!)? threshold, Tensor value, Tensor mask, "
    "Tensor? token_id, Tensor? exclude, Tensor num_tokens, Tensor? seed, Tensor? step, Tensor own, Tensor? refused, "
    "int kind, bool strict, bool round_up, float low, float high, float ratio, int at_least, int seed_number, "
    "int step_number, int first, int last) -> ()",
    _prepare,
    _fill,
)


class Selecting:
    """A selection under way: the tensors that its stages share.

    Args:
        value: [T] float32 scores. mask: [T] bool. num_tokens: 0-d int64, under the mask, over all ranks.
        token_id: [T] int64; None for QUANTILE. exclude: [T] bool or None, tokens that are no candidates of a DRAW.
        seed, step: 0-d int64 tensors that replace those of `spec`, or None.
    """

    def __init__(
        self,
        spec: SelectSpec,
        value: Tensor,
        mask: Tensor,
        num_tokens: Tensor,
        token_id: Tensor | None = None,
        exclude: Tensor | None = None,
        seed: Tensor | None = None,
        step: Tensor | None = None,
    ):
        self.spec, self.stages = spec, STAGES[spec.kind]
        self.workspace = select_workspace(len(value), value, spec.kind)
        self.own = own_of(self.workspace)  # [2], to be gathered
        outputs = (None, None, None)
        if spec.kind != QUANTILE:
            self.chosen, self.result = torch.empty_like(mask), value.new_empty(3, dtype=torch.int64)
            self.threshold = value.new_empty(1)
            outputs = self.chosen, self.result, self.threshold
        self._arguments = (*outputs, value, mask, token_id, exclude, num_tokens, seed, step)

    def run(self, first: int, last: int, own: Tensor, refused: Tensor | None = None) -> Tensor | None:
        """Stages first to last; what the ranks have to add up before the next one.

        own: [ranks, 2] int64, `self.own` of all ranks. refused: 0-d bool or None, whether the ranks do not agree.
        """
        _token_select(self.workspace, *self._arguments, own, refused, *self.spec, first, last)
        return None if last == CHECK else part_to_sum(self.workspace, self.spec.kind, last)
