"""Who computes the workloads: entcov, the usual formulas in torch, and these compiled. Rivals are in rivals.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import ops_benchmark
from benchmarks.gpu.workloads import CLAMP_P, Function
from entcov import linear_token_stats, logit_covariance, token_stats

CHUNKS = 4


@dataclass(frozen=True)
class Contender:
    """functions: workload -> (inputs) -> outputs, a dict of [T] tensors that may lack some of the workload's."""

    name: str
    source: str
    functions: dict[str, Function]
    # Bytes that the algorithm has to move for a logit of this size: (workload, backward, size); None: not counted.
    traffic: Callable[[str, bool, int], float | None] = lambda workload, backward, size: None
    note: str = ""
    # Whether it writes over its inputs: (dtype, backward). It then gets a fresh copy, untimed, for each repetition.
    overwrites: Callable[[torch.dtype, bool], bool] = lambda dtype, backward: False


def _entcov(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    stats = token_stats(logits, target)
    return {"logprob": stats.logprob, "entropy": stats.entropy}


def _entcov_clamped(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    stats = token_stats(logits, target, clamp_p=CLAMP_P)
    return {"logprob": stats.logprob, "clamped_entropy": stats.clamped_entropy}


def _entcov_covariance(old: Tensor, new: Tensor) -> dict[str, Tensor]:
    change = logit_covariance(old, new)
    return {"covariance": change.covariance, "kl": change.kl}


def _usual(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    logprob, entropy = ops_benchmark.usual(logits, target)
    return {"logprob": logprob, "entropy": entropy}


def _usual_clamped(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The entropy over the values of torch.topk, on the GPU; AEnt's own code selects on the CPU."""
    columns = logits.shape[-1]
    log_p = torch.log_softmax(logits.float(), dim=-1)
    kept = torch.log_softmax(torch.topk(logits, columns - int(columns * CLAMP_P)).values.float(), dim=-1)
    logprob = log_p.gather(-1, target[:, None])[:, 0]
    return {"logprob": logprob, "clamped_entropy": -(kept.exp() * kept).sum(-1)}


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


def _entcov_traffic(workload: str, backward: bool, size: int) -> float | None:
    if workload in ("token_stats", "clamped_entropy"):  # the clamp's sample, a twentieth of the row, not counted
        return 3 * size if backward else size  # read; then read and write
    if workload == "logit_covariance":
        return 5 * size if backward else 2 * size  # read both; then read both and write
    return None


def _eager_traffic(workload: str, backward: bool, size: int) -> float | None:
    if workload != "token_stats":
        return None
    cast = size + 4 if size < 4 else 0  # operator by operator, as ops_benchmark.usual lists them
    return 32 + cast + (76 + cast if backward else 0)


def entcov() -> Contender:
    functions = {
        "token_stats": _entcov, "logit_covariance": _entcov_covariance, "lm_head": _entcov_head,
        "clamped_entropy": _entcov_clamped,
    }  # fmt: skip
    return Contender("entcov", "this repository", functions, _entcov_traffic, "lm_head: logits kept")


def entcov_chunks() -> Contender:
    functions = {"lm_head": partial(_entcov_head, chunks=CHUNKS)}
    note = "the logits of a quarter of the tokens at a time, made again in backward"
    return Contender("entcov, chunks", "this repository", functions, note=note)


def entcov_materialised() -> Contender:
    functions = {"lm_head": behind_a_head(_entcov)}
    return Contender("entcov, token_stats", "this repository", functions, note="behind torch's own product")


def eager() -> Contender:
    functions = {
        "token_stats": _usual, "logit_covariance": _usual_covariance, "lm_head": behind_a_head(_usual),
        "clamped_entropy": _usual_clamped,
    }  # fmt: skip
    return Contender("eager torch", f"torch {torch.__version__}", functions, _eager_traffic)


def compiled() -> Contender:
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would be eager torch under another name
    functions = {name: torch.compile(f, dynamic=False) for name, f in eager().functions.items()}
    return Contender("torch.compile", f"torch {torch.__version__}", functions)


OWN = {
    "entcov": entcov,
    "entcov, chunks": entcov_chunks,
    "entcov, token_stats": entcov_materialised,
    "eager torch": eager,
    "torch.compile": compiled,
}
