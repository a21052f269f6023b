"""Implementations of the workloads: entcov, the usual formulas in torch, and these compiled. rivals.py has others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import ops_benchmark
from benchmarks.gpu.workloads import CLAMP_P, Function
from entcov import linear_token_stats, logit_covariance

CHUNKS = 4


@dataclass(frozen=True)
class Contender:
    """functions: workload -> (inputs) -> outputs, a dict of [T] tensors with some or all of the workload's outputs."""

    name: str
    source: str
    functions: dict[str, Function]
    # (workload, backward, size) -> bytes that the algorithm has to move for a logit of this size; None: not counted.
    traffic: Callable[[str, bool, int], float | None] = lambda workload, backward, size: None
    note: str = ""
    # (dtype, backward) -> whether it overwrites its inputs. It then gets a new copy before each repetition, untimed.
    overwrites: Callable[[torch.dtype, bool], bool] = lambda dtype, backward: False


def named(function: Callable[..., Sequence[Tensor]], *names: str) -> Function:
    """The function with its first outputs in a dict, "logprob" and "entropy" if no names are given."""
    names = names or ("logprob", "entropy")

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        outputs = function(*inputs)
        return {name: outputs[i] for i, name in enumerate(names)}

    return call


def _clamped(function: Callable[..., Sequence[Tensor]]) -> Function:
    return named(partial(function, clamp_p=CLAMP_P), "logprob", "clamped_entropy")


def _entcov_covariance(old: Tensor, new: Tensor) -> dict[str, Tensor]:
    change = logit_covariance(old, new)
    return {"covariance": change.covariance, "kl": change.kl}


def _usual_covariance(old: Tensor, new: Tensor) -> dict[str, Tensor]:
    log_old, log_new = (torch.log_softmax(z.float(), dim=-1) for z in (old, new))
    p, change = log_old.exp(), new.float() - old.float()
    covariance = (p * log_old * change).sum(-1) - (p * log_old).sum(-1) * (p * change).sum(-1)
    return {"covariance": covariance, "kl": (p * (log_old - log_new)).sum(-1)}


def _entcov_head(hidden: Tensor, weight: Tensor, target: Tensor, chunks: int = 1) -> dict[str, Tensor]:
    stats = linear_token_stats(hidden, weight, target, chunk_size=-(-len(hidden) // chunks))
    return {"logprob": stats.logprob, "entropy": stats.entropy}


def behind_a_head(function: Function) -> Function:
    """The same of the logits that an LM head makes: hidden [T, H], weight [V, H]."""
    return lambda hidden, weight, target: function(hidden @ weight.T, target)


ENTCOV, USUAL = named(ops_benchmark.ours), named(ops_benchmark.usual)


def read_once(workload: str, backward: bool, size: int) -> float | None:
    """Bytes of a logit that is read once forward, and read and written once backward."""
    return 3 * size if backward else size


def _entcov_traffic(workload: str, backward: bool, size: int) -> float | None:
    if workload in ("token_stats", "clamped_entropy"):  # the clamp's sample, a twentieth of the row, is not counted
        return read_once(workload, backward, size)
    if workload == "logit_covariance":
        return 5 * size if backward else 2 * size  # read both; then read both and write
    return None


def _eager_traffic(workload: str, backward: bool, size: int) -> float | None:
    return ops_benchmark.bytes_per_logit(size, "eager", backward) if workload == "token_stats" else None


def entcov() -> Contender:
    functions = {
        "token_stats": ENTCOV, "logit_covariance": _entcov_covariance, "lm_head": _entcov_head,
        "clamped_entropy": _clamped(ops_benchmark.ours_clamped),
    }  # fmt: skip
    return Contender("entcov", "this repository", functions, _entcov_traffic, "lm_head: logits kept")


def eager() -> Contender:
    functions = {
        "token_stats": USUAL, "logit_covariance": _usual_covariance, "lm_head": behind_a_head(USUAL),
        "clamped_entropy": _clamped(ops_benchmark.usual_clamped),
    }  # fmt: skip
    return Contender("eager torch", f"torch {torch.__version__}", functions, _eager_traffic)


def compiled() -> Contender:
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it would run as eager torch
    functions = {name: torch.compile(f, dynamic=False) for name, f in eager().functions.items()}
    return Contender("torch.compile", f"torch {torch.__version__}", functions)


OWN = {
    "entcov": entcov,
    "entcov, chunks": lambda: Contender(
        "entcov, chunks", "this repository", {"lm_head": partial(_entcov_head, chunks=CHUNKS)},
        note="the logits of a quarter of the tokens at a time, made again in backward",
    ),
    "entcov, token_stats": lambda: Contender(
        "entcov, token_stats", "this repository", {"lm_head": behind_a_head(ENTCOV)}, note="behind torch's own product",
    ),
    "eager torch": eager,
    "torch.compile": compiled,
}  # fmt: skip
