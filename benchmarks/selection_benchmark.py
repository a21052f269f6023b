"""The selections of Clip-Cov and KL-Cov over a mini-batch of millions of tokens, against the usual torch code for them.

Times are those of the host until the result is on the device, since the usual code makes the host wait in the middle.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.gpu.report import selection_table
from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import token_covariance

CLIP = {"ratio": 2e-4, "low": 1.0, "high": 5.0}
KL = {"ratio": 2e-3}
# The host waits for the device in these: it needs a number, or the size of a result, that is computed there.
READS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::item")


def usual_covariance(logprob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum()
    centred = ((x - torch.where(mask, x, 0.0).sum() / n) for x in (logprob, advantage))
    first, second = centred
    return first * second


def usual_clip(logprob: Tensor, advantage: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """Indices of the candidates, a random permutation of them, and the first few."""
    value = usual_covariance(logprob, advantage, mask)
    candidates = ((value > CLIP["low"]) & (value < CLIP["high"]) & mask).nonzero()[:, 0]
    count = max(int(CLIP["ratio"] * int(mask.sum())), 1)
    chosen = candidates[torch.randperm(len(candidates), device=mask.device)[:count]]
    return torch.zeros_like(mask).index_fill_(0, chosen, True)


def usual_kl(logprob: Tensor, advantage: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    value = usual_covariance(logprob, advantage, mask)
    valid = mask.nonzero()[:, 0]
    chosen = valid[torch.topk(value[valid], max(int(KL["ratio"] * len(valid)), 1)).indices]
    return torch.zeros_like(mask).index_fill_(0, chosen, True)


def our_clip(logprob: Tensor, advantage: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    covariance = token_covariance(logprob, advantage, mask)
    return select_clip_cov(covariance, ids, **CLIP, seed=0, step=1, at_least=1, strict=True).mask


def our_kl(logprob: Tensor, advantage: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    covariance = token_covariance(logprob, advantage, mask)
    return select_largest(covariance, ids, **KL, seed=0, step=1, at_least=1).mask


SELECTIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "Clip-Cov": {"entcov": our_clip, "nonzero + randperm": usual_clip},
    "KL-Cov": {"entcov": our_kl, "nonzero + topk": usual_kl},
}


class Counts(TorchDispatchMode):
    """Counts operations other than views, and those in which the host reads a result of the device. (Our own functions
    read values to check them on a CPU, where it costs nothing, and not on a GPU.)"""

    def __init__(self):
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not function.is_view
        self.reads += function.name().split(".")[0] in READS
        return function(*args, **(kwargs or {}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**17, 2**20, 2**22])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    measure.add_arguments(parser, repeats=5)


def run(args: argparse.Namespace) -> int:
    measure.set_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else measure.machine()["cpu"]
    rows = [row for tokens in args.tokens for row in measure_selections(tokens, device, args.repeats)]
    print(f"{name}, torch {torch.__version__}; the covariance of all tokens and one selection")
    measure.print_table(*selection_table(rows))
    measure.keep({"device": name, "rows": rows}, args.json)
    return 0


def measure_selections(tokens: int, device: torch.device, repeats: int) -> list[dict]:
    rng = torch.Generator().manual_seed(0)
    inputs = (-4 * torch.rand(tokens, generator=rng), torch.randn(tokens, generator=rng),
              torch.rand(tokens, generator=rng) < 0.9, torch.randperm(tokens, generator=rng))  # fmt: skip
    inputs = [x.to(device) for x in inputs]

    def timed(function: Callable[..., Tensor]) -> Tensor:
        mask = function(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return mask

    rows = []
    for selection, functions in SELECTIONS.items():
        seconds = measure.interleaved_seconds({name: partial(timed, f) for name, f in functions.items()}, repeats)
        for name, function in functions.items():
            with Counts() as counts:
                chosen = int(function(*inputs).sum())
            rows.append({
                "selection": selection,
                "tokens": tokens,
                "name": name,
                **measure.times_of(seconds[name], seconds["entcov"]),
                "operations": counts.operations,
                "host_reads": counts.reads,
                "chosen": chosen,
            })  # fmt: skip
    return rows
