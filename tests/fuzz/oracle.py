"""What the public ops must return, in float64 and in closed form: written for the fuzzers alone, from docs/math.md, and
from nothing in entcov. Gradients are formulas too, not autograd. Rows are [T, V] of the columns that exist.

Of a row, y = (x - max) / temperature, and `rest` is sum e^y without one occurrence of the maximum, so that a peaked row
keeps its digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    y: Tensor  # [T, V]
    log_p: Tensor  # [T, V]; -inf where p is 0
    p: Tensor
    log_total: Tensor  # [T], log sum e^y

    def mean(self, values: Tensor) -> Tensor:
        """E_p[values]; a column of probability 0 counts 0."""
        return (self.p * torch.where(self.p > 0, values, 0.0)).sum(-1)

    @property
    def entropy(self) -> Tensor:
        return self.log_total - self.mean(self.y)

    @property
    def surprise(self) -> Tensor:
        """log p + H, 0 where p is 0."""
        return torch.where(self.p > 0, self.y - self.mean(self.y)[:, None], 0.0)

    @property
    def surprise_terms(self) -> Tensor:
        """The sizes of the two numbers that the kernels make it of, added."""
        return torch.where(self.p > 0, self.y.abs() + self.mean(self.y).abs()[:, None], 0.0)


def row(logits: Tensor, temperature: float) -> Row:
    x = logits.double()
    top, at = x.max(-1, keepdim=True)
    y = (x - top) / temperature
    e = y.exp()
    log_total = e.scatter(1, at, 0.0).sum(-1).log1p()
    log_p = y - log_total[:, None]
    return Row(y, log_p, log_p.exp(), log_total)


def token_stats(logits: Tensor, target: Tensor, temperature: float, kept: int | None) -> dict[str, Tensor]:
    r = row(logits, temperature)
    at = target[:, None]
    s = r.p * r.surprise
    out = {
        "logprob": r.log_p.gather(1, at)[:, 0],
        "entropy": r.entropy,
        "collision": (r.p * r.p).sum(-1),
        "varentropy": r.mean(r.surprise**2),
        "entropy_drift": (r.p * s).sum(-1) - s.gather(1, at)[:, 0],
    }
    if kept is not None:
        out["clamped_entropy"] = row(logits.double().sort(-1, descending=True).values[:, :kept], temperature).entropy
    return out


def clamp_weights(logits: Tensor, kept: int) -> Tensor:
    """1 above the kept-th largest logit, 0 below; those equal to it share what is left."""
    x = logits.double()
    threshold = x.kthvalue(x.shape[1] - kept + 1, -1, keepdim=True).values
    above, tied = x > threshold, x == threshold
    return above + tied * (kept - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)


def token_stats_gradient(
    logits: Tensor, target: Tensor, temperature: float, kept: int | None, grads: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """d sum(grads[name] * name) / d logits [T, V], and the sum of the sizes of its terms."""
    r = row(logits, temperature)
    grad, terms = torch.zeros_like(r.p), torch.zeros_like(r.p)

    def add(g: Tensor, direction: Tensor, size: Tensor) -> None:
        grad.add_(g.double()[:, None] * direction / temperature)
        terms.add_(g.double().abs()[:, None] * size / temperature)

    if "logprob" in grads:
        direction = -r.p
        chosen = -torch.expm1(r.log_p.gather(1, target[:, None]))
        direction = direction.scatter(1, target[:, None], chosen)
        add(grads["logprob"], direction, direction.abs())
    if "entropy" in grads:
        add(grads["entropy"], -r.p * r.surprise, r.p * r.surprise_terms)
    if "clamped_entropy" in grads:
        weights = clamp_weights(logits, kept)
        top = row(logits.double().sort(-1, descending=True).values[:, :kept], temperature)
        log_q = r.y - top.log_total[:, None]  # of a whole token; the weight counts its share
        q = torch.where(weights > 0, log_q.exp(), 0.0)
        surprise = torch.where(q > 0, log_q + top.entropy[:, None], 0.0)
        size = torch.where(q > 0, log_q.abs() + top.entropy[:, None], 0.0)
        add(grads["clamped_entropy"], -weights * q * surprise, weights * q * size)
    return grad, terms


class Change(NamedTuple):
    values: dict[str, Tensor]
    sizes: dict[str, Tensor]  # of the terms that each value is a difference of
    raw_sizes: dict[str, Tensor]  # the same, of changes that are not yet relative to those of the maxima
    grads: dict[str, Tensor]  # d value / d new logits [T, V]
    grad_terms: dict[str, Tensor]


def logit_covariance(old: Tensor, new: Tensor, temperature: float) -> Change:
    before, after = row(old, temperature), row(new, temperature)
    d = torch.where(before.p > 0, (new.double() - old.double()) / temperature, 0.0)
    shift = d - ((new.double().amax(-1) - old.double().amax(-1)) / temperature)[:, None]
    mean_d = before.mean(d)[:, None]
    values = {
        "covariance": before.mean(before.surprise * (d - mean_d)),
        "entropy_change": after.entropy - before.entropy,
        "kl": before.mean(before.log_p - after.log_p),
    }
    x = torch.where(before.p > 0, before.y, 0.0)
    sizes = {
        "covariance": before.mean((x * shift).abs()) + before.mean(x.abs()) * before.mean(shift.abs()),
        "entropy_change": after.entropy + before.entropy,
        "kl": before.mean(shift.abs()) + before.log_total + after.log_total,
    }
    raw_sizes = {  # x itself is rounded too, where it is 0 by the difference of two products
        "covariance": before.mean((1 + x.abs()) * d.abs()) + before.mean(x.abs()) * before.mean(d.abs()),
        "entropy_change": torch.zeros_like(sizes["kl"]),
        "kl": before.mean(d.abs()),
    }
    grads = {
        "covariance": before.p * before.surprise / temperature,
        "entropy_change": -after.p * after.surprise / temperature,
        "kl": (after.p - before.p) / temperature,
    }
    grad_terms = {
        "covariance": before.p * before.surprise_terms / temperature,
        "entropy_change": after.p * after.surprise_terms / temperature,
        "kl": (after.p + before.p) / temperature,
    }
    return Change(values, sizes, raw_sizes, grads, grad_terms)
