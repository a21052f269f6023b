"""Shared by the tests of the objective: selections in Python numbers, a rollout batch, a watch for host reads."""

from fractions import Fraction

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entcov.controls import Progress
from entcov.objective.tokens import Tokens

M64 = 2**64 - 1
PROGRESS = Progress(step=1, steps=10, update=0)


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def hash64(seed, step, token_id):
    golden = 0x9E3779B97F4A7C15
    h = mix((token_id + 1) * golden & M64)
    h = mix((h + (seed + 1) * golden) & M64)
    return mix((h + (step + 1) * golden) & M64)


def exact_covariance(logprob, advantage, mask):
    """float32 covariances (nan outside the mask) from rational arithmetic."""
    inside = [i for i, m in enumerate(mask.tolist()) if m]
    x = [Fraction(v) for v in torch.where(mask, logprob, 0.0).tolist()]
    a = [Fraction(v) for v in advantage.tolist()]
    mean_x = sum(x[i] for i in inside) / len(inside)
    mean_a = sum(a[i] for i in inside) / len(inside)
    out = np.full(len(mask), np.nan, np.float32)
    for i in inside:
        out[i] = np.float32(float((x[i] - mean_x) * (a[i] - mean_a)))
    return out


def top_by_hash(ids, n, seed, step):
    return set(sorted(ids, key=lambda i: hash64(seed, step, i), reverse=True)[:n])


def clip_cov_oracle(value, mask, ids, ratio, low, high, seed, step):
    rows = zip(value.tolist(), mask.tolist(), ids.tolist(), strict=True)
    candidates = [i for v, m, i in rows if m and low <= v <= high]
    return top_by_hash(candidates, int(ratio * int(mask.sum())), seed, step)


def kl_cov_oracle(value, mask, ids, n, seed, step):
    rows = zip(value.tolist(), mask.tolist(), ids.tolist(), strict=True)
    ranked = sorted(((v, hash64(seed, step, i), i) for v, m, i in rows if m), reverse=True)
    return {i for _, _, i in ranked[:n]}


def make_batch(seed, sequences=24, longest=40):
    """A rollout batch as the trainer has it: one advantage a sequence, some tokens masked and then NaN."""
    g = torch.Generator().manual_seed(seed)
    logprob, advantage, mask, sequence = [], [], [], []
    for s in range(sequences):
        length = int(torch.randint(1, longest + 1, (), generator=g))
        logprob.append(-torch.empty(length).exponential_(generator=g) * 1.5)
        advantage.append(torch.full((length,), float(torch.randn((), generator=g))))
        mask.append(torch.rand(length, generator=g) < 0.9)
        sequence.append(torch.full((length,), s))
    logprob, advantage, mask, sequence = map(torch.cat, (logprob, advantage, mask, sequence))
    old = logprob + 0.1 * torch.randn(len(logprob), generator=g)
    logprob[~mask] = torch.nan
    ids = torch.randperm(10 * len(mask), generator=g)[: len(mask)]
    return Tokens(logprob, old, advantage, mask, token_id=ids), sequence


def chosen_ids(micro_batches, selections, k):
    return sorted(i for t, s in zip(micro_batches, selections, strict=True) for i in t.token_id[s[k].mask].tolist())


def make_tokens(seed=0, lengths=(5, 1, 7, 3, 4, 2), dtype=torch.float64):
    """Six sequences; one token in five is masked and NaN; ratios far enough from 1 for every clip to act."""
    g = torch.Generator().manual_seed(seed)
    t = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.rand(t, generator=g) < 0.8
    mask[torch.tensor(lengths).cumsum(0) - 1] = True  # every sequence has a loss token
    old = -torch.empty(t, dtype=dtype).exponential_(generator=g)
    noise = lambda scale: scale * torch.randn(t, generator=g, dtype=dtype)  # noqa: E731
    fields = dict(
        logprob=old + noise(0.7),
        old_logprob=old,
        advantage=noise(1.0),
        entropy=noise(1.0).abs(),
        clamped_entropy=noise(1.0).abs(),
        ref_logprob=old + noise(0.5),
        rollout_logprob=old + noise(0.3),
        old_entropy=noise(1.0).abs(),
    )
    for value in fields.values():
        value[~mask] = torch.nan
    length = torch.zeros(len(lengths), dtype=torch.int64).index_add_(0, sequence, mask.long())[sequence]
    return Tokens(loss_mask=mask, sequence_length=length, token_id=torch.arange(t) + 100, **fields), sequence


def part(tokens, index):
    values = {n: v[index] for n, v in vars(tokens).items() if v is not None}
    return Tokens(**values)


class NoHostRead(TorchDispatchMode):
    """Fails on operations that make the host wait for a device, or whose result's shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        self.seen.add(name)
        assert not any(name.startswith(bad) for bad in self.FORBIDDEN), f"host read: {name}"
        assert name not in ("randperm", "sort") and not name.startswith("_unique"), name
        if name == "index":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "boolean indexing is a nonzero"
        return func(*args, **(kwargs or {}))
