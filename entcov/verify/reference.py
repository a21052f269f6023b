"""Float64 oracles of everything the ops compute: the obvious formula, no trick, no regard for speed or memory.

Numbers in brackets are the formulas of docs/math.md. Every function takes whole rows (no shards), any leading dims,
any floating dtype; it computes in float64 on the values as they were rounded, and is differentiable by plain autograd
unless it says otherwise. Logits of -inf have probability 0 and add 0 to every sum. Everything is in nats.

Imported by tests, benchmarks and `python -m entcov check` only.
"""

import torch
from torch import Tensor


def log_probs(logits: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """(1) log softmax(z / T) over the first `vocab_size` columns, [..., V] -> [..., vocab_size] float64."""
    return (logits[..., :vocab_size].double() / temperature).log_softmax(-1)


def where_possible(log_p: Tensor, values: Tensor) -> Tensor:
    """`values`, with 0 for outcomes of probability 0 (their gradient is 0 too)."""
    return torch.where(log_p == -torch.inf, 0.0, values)


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """E_{a~p}[values]; an outcome of probability 0 adds 0 even if its value is infinite or NaN."""
    return (log_p.exp() * where_possible(log_p, values)).sum(-1)


def entropy_of(log_p: Tensor) -> Tensor:
    """(3) H = -sum_j p_j log p_j."""
    return -expectation(log_p, log_p)


def kept_count(vocab_size: int, clamp_p: float | None, top_k: int | None) -> int:
    """Number of logits a clamp keeps: `top_k`, or what is left when the int(V * clamp_p) lowest are removed."""
    return top_k if top_k is not None else vocab_size - int(vocab_size * clamp_p)


def clamped_entropy(logits: Tensor, kept: int, temperature: float = 1.0) -> Tensor:
    """(10) Entropy of the softmax over the `kept` largest logits, chosen by a full sort.

    Which of several equal logits the sort keeps does not change the value, but does change the gradient:
    see `tied_clamped_entropy`.
    """
    largest = logits.double().sort(dim=-1, descending=True).values[..., :kept]
    return entropy_of(log_probs(largest, temperature))


def clamp_weights(logits: Tensor, kept: int) -> Tensor:
    """(11) Weight of every logit in the kept set: 1 above the threshold, 0 below, equal fractions on the threshold."""
    z = logits.double()
    threshold = z.sort(dim=-1, descending=True).values[..., kept - 1 : kept]
    above, tied = z > threshold, z == threshold
    fraction = (kept - above.sum(-1, keepdim=True)).double() / tied.sum(-1, keepdim=True)
    return above.double() + tied * fraction


def tied_clamped_entropy(logits: Tensor, kept: int, temperature: float = 1.0) -> Tensor:
    """(11) Clamped entropy with fractional weights at the threshold.

    Its value is `clamped_entropy`'s; its gradient is the mean of the gradients over all ways to break the ties.
    """
    weights = clamp_weights(logits.detach(), kept)
    z = logits.double() / temperature
    log_weighted = torch.where(weights > 0, z + weights.log(), -torch.inf).log_softmax(-1)
    # Every copy of a tied logit has the probability of a whole token; the weight counts the copies.
    return -expectation(log_weighted, log_weighted - torch.where(weights > 0, weights.log(), 0.0))


def collision_of(log_p: Tensor) -> Tensor:
    """(7) sum_j p_j^2, the chance that two draws agree."""
    return (2 * log_p).exp().sum(-1)


def varentropy_of(log_p: Tensor) -> Tensor:
    """(8) Var_{a~p}(log p_a)."""
    return expectation(log_p, (where_possible(log_p, log_p) + entropy_of(log_p)[..., None]) ** 2)


def entropy_drift_of(log_p: Tensor, target: Tensor) -> Tensor:
    """(9) dH/d(alpha) of the step dz = alpha (e_target - p): -(S_target - sum_j p_j S_j), S_j = p_j (H + log p_j)."""
    s = log_p.exp() * (entropy_of(log_p)[..., None] + where_possible(log_p, log_p))
    return (log_p.exp() * s).sum(-1) - s.gather(-1, target[..., None])[..., 0]


def token_stats(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    clamp_p: float | None = None,
    top_k: int | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Every output of `entcov.token_stats` on unsharded logits, as float64 [...].

    Keys: logprob, entropy, collision, varentropy, entropy_drift, and clamped_entropy when a clamp is given.
    Rows whose target is `ignore_index` are 0 in every key, and pass no gradient.
    """
    ignored = target == ignore_index
    z = logits[..., :vocab_size].masked_fill(ignored[..., None], 0.0)
    token = target.masked_fill(ignored, 0)
    log_p = log_probs(z, temperature)
    out = {
        "logprob": log_p.gather(-1, token[..., None])[..., 0],
        "entropy": entropy_of(log_p),
        "collision": collision_of(log_p),
        "varentropy": varentropy_of(log_p),
        "entropy_drift": entropy_drift_of(log_p, token),
    }
    if clamp_p is not None or top_k is not None:
        out["clamped_entropy"] = tied_clamped_entropy(z, kept_count(z.shape[-1], clamp_p, top_k), temperature)
    return {name: value.masked_fill(ignored, 0.0) for name, value in out.items()}


def covariance_under(log_p: Tensor, values: Tensor) -> Tensor:
    """(13) Cov_{a~p}(log p_a, values_a), from centred factors."""
    surprise = where_possible(log_p, log_p) + entropy_of(log_p)[..., None]
    return expectation(log_p, surprise * (where_possible(log_p, values) - expectation(log_p, values)[..., None]))


def logit_covariance(
    logits_old: Tensor, logits_new: Tensor, *, vocab_size: int | None = None, temperature: float = 1.0
) -> dict[str, Tensor]:
    """(14), (15): every output of `entcov.logit_covariance` on unsharded logits, as float64 [...]."""
    old, new = log_probs(logits_old, temperature, vocab_size), log_probs(logits_new, temperature, vocab_size)
    change = (logits_new[..., :vocab_size].double() - logits_old[..., :vocab_size].double()) / temperature
    covariance = covariance_under(old, change)
    return {
        "covariance": covariance,
        "predicted_entropy_change": -covariance,
        "entropy_change": entropy_of(new) - entropy_of(old),
        "kl": expectation(old, old - new),
    }
