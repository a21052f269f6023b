"""Calls over a group in which one rank does something else: every public call that enters a collective.

Each entry is (function of (group, rank, world, odd), message). `odd` says whether this rank is the one that differs.
tests/support/gloo_cases.py runs them over gloo, tests/stats/test_sharded_without_waiting.py as a GPU would.
"""

from dataclasses import replace

import torch

from entcov import linear_token_stats, logit_covariance, token_stats
from entcov.controls import ClipCov, EntropyBonus, KLCov, select
from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import covariance_summary, token_covariance
from entcov.objective.token_means import token_means
from entcov.objective.tokens import PolicyLossConfig, Tokens

T, WIDTH, D = 5, 16, 12
TARGET = torch.tensor([3, 9, 0, 2, -100])


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stats(change, **same):
    def call(group, rank, world, odd):
        settings = {"logits": numbers(rank, T, WIDTH), "target": TARGET, **same, **(change if odd else {})}
        return token_stats(settings.pop("logits"), settings.pop("target"), group=group, **settings)

    return call


def linear(change, **same):
    def call(group, rank, world, odd):
        settings = {"hidden": numbers(0, T, D), "weight": numbers(rank, WIDTH, D), "target": TARGET, **same}
        return linear_token_stats(group=group, **{**settings, **(change if odd else {})})

    return call


def logits_pair(change):
    def call(group, rank, world, odd):
        settings = {"logits_old": numbers(rank, T, WIDTH), "logits_new": numbers(rank + 9, T, WIDTH)}
        settings |= {"loss_mask": TARGET != -100, **(change if odd else {})}
        return logit_covariance(group=group, **settings)

    return call


def batch(rank, n=30):
    """Tokens of one rank; their ids are different from those of other ranks."""
    logprob = -numbers(rank, n).abs()
    return Tokens(
        logprob, logprob.clone(), numbers(rank + 5, n), torch.ones(n, dtype=torch.bool),
        token_id=torch.arange(n) + 1000 * rank,
    )  # fmt: skip


def covariance_with(change):
    def call(group, rank, world, odd):
        tokens = batch(rank)
        settings = {"logprob": tokens.logprob, "advantage": tokens.advantage, "mask": tokens.loss_mask}
        return token_covariance(group=group, **{**settings, **(change if odd else {})})

    return call


def summary(change):
    def call(group, rank, world, odd):
        tokens = batch(rank)
        parts = tokens.logprob, tokens.advantage, tokens.loss_mask
        covariance = token_covariance(*parts, group=group)
        return covariance_summary(change(parts) if odd else covariance, group=group)

    return call


def means(change):
    """`change`: other values."""

    def call(group, rank, world, odd):
        tokens = batch(rank)
        return token_means(change if odd else {"entropy": tokens.advantage}, tokens.loss_mask, group=group)

    return call


def selection(which, change):
    """`change`: arguments, or a function of this rank's covariance that returns them."""

    def call(group, rank, world, odd):
        tokens = batch(rank)
        covariance = token_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask, group=group)
        settings = {"scores": covariance, "token_id": tokens.token_id, "ratio": 0.2, "seed": 1, "step": 4}
        settings |= {"low": -9.0, "high": 9.0} if which is select_clip_cov else {}
        op = which
        if odd:
            change_of = change(covariance, tokens) if callable(change) else change
            op = change_of.get("op", which)
            settings |= {name: value for name, value in change_of.items() if name != "op"}
        return op(group=group, **settings)

    return call


CONTROLS = (ClipCov(clip_cov_ratio=0.1, clip_cov_lb=-9.0), KLCov(kl_cov_ratio=0.1), EntropyBonus())


def chosen(change):
    """`change`: arguments of `select`, or a function of this rank's tokens that returns them."""

    def call(group, rank, world, odd):
        tokens = batch(rank)
        settings = {"controls": CONTROLS, "micro_batches": [tokens, batch(rank + 100)], "step": 2}
        settings |= {"config": PolicyLossConfig()}
        if odd:
            settings |= change(tokens) if callable(change) else change
        return select(settings.pop("controls"), settings.pop("micro_batches"), group=group, **settings)

    return call


def without_ids(tokens):
    return {"micro_batches": [replace(tokens, token_id=None)]}


# One rank has an error of its own: what it raises.
FAILURES = {
    "token_stats target shape": (stats({"target": TARGET[:4]}), r"target must have the leading shape of logits"),
    "token_stats target dtype": (stats({"target": TARGET.int()}), "target must be torch.int64"),
    "token_stats target value": (stats({"target": TARGET + 10**6}), "first 1000003 at row 0"),
    "token_stats logits dtype": (stats({"logits": numbers(0, T, WIDTH).double()}), "logits must be float32, bfloat16"),
    "token_stats strides": (stats({"logits": numbers(0, WIDTH, T).t()}), "logits must have stride 1"),
    "token_stats percent": (stats({"clamp_p": 33}, clamp_p=0.3), r"clamp_p must be in \[0, 1\), a fraction"),
    "token_stats both clamps": (stats({"top_k": 3}, clamp_p=0.3), "clamp_p and top_k exclude each other"),
    "token_stats top_k": (stats({"top_k": 0}, top_k=3), "top_k must be in "),
    "token_stats ignore_index": (stats({"ignore_index": -100.0}), "ignore_index must be an integer, got -100.0"),
    "token_stats temperature": (stats({"temperature": 0.0}, moments=True), "temperature must be positive"),
    "token_stats learned temperature": (
        stats({"temperature": torch.tensor(1.0, requires_grad=True)}), "temperature must not require a gradient",
    ),
    "token_stats vocab_start": (stats({"vocab_start": 0}), "vocab_size must be given with vocab_start"),
    "token_stats vocab_size": (stats({"vocab_size": 10**9}), "vocab_size must be at most "),
    "token_stats no number": (stats({"vocab_size": "16"}), "'>' not supported"),
    "linear chunk_size": (linear({"chunk_size": 0}, chunk_size=2), "chunk_size must be at least 1, got 0"),
    "linear memory_budget": (linear({"memory_budget": 0}), "memory_budget must be at least 1, got 0"),
    "linear weight dtype": (linear({"weight": numbers(0, WIDTH, D).half()}), "weight must have the dtype of hidden"),
    "linear weight shape": (linear({"weight": numbers(0, WIDTH, D + 1)}), r"hidden must be \[..., D\] and weight"),
    "linear target shape": (linear({"target": TARGET[:4]}), "target must have the leading shape of hidden"),
    "linear bias": (linear({"bias": numbers(0, 3)}), "bias must have shape"),
    "linear percent": (linear({"clamp_p": 33}, clamp_p=0.3), r"clamp_p must be in \[0, 1\), a fraction"),
    "logit_covariance shapes": (logits_pair({"logits_old": numbers(0, T, 3)}), "logits_old must have the shape of"),
    "logit_covariance dtypes": (logits_pair({"logits_old": numbers(0, T, WIDTH).half()}), "logits_old must have the d"),
    "logit_covariance mask": (logits_pair({"loss_mask": torch.ones(T)}), "row_mask must be torch.bool"),
    "logit_covariance mask shape": (logits_pair({"loss_mask": torch.ones(3)}), "loss_mask must have the leading shape"),
    "token_covariance dtype": (covariance_with({"logprob": numbers(0, 3).half()}), "logprob must be torch.float32 or"),
    "token_covariance shape": (covariance_with({"advantage": numbers(0, 3)}), r"advantage must have shape \(30,\)"),
    "token_covariance mask": (covariance_with({"mask": numbers(0, 30)}), "mask must be torch.bool"),
    "token_covariance no tensor": (covariance_with({"mask": None}), "mask must be a tensor, got NoneType"),
    "token_means dtype": (means({"entropy": numbers(0, 30).half()}), "entropy must be torch.float32 or"),
    "token_means shape": (means({"entropy": numbers(0, 3)}), r"entropy must have shape \(30,\)"),
    "covariance_summary": (summary(lambda parts: None), "covariance must be what token_covariance returns, got None"),
    "select_clip_cov percent": (selection(select_clip_cov, {"ratio": 2}), "ratio must be in"),
    "select_clip_cov low": (selection(select_clip_cov, {"low": "1"}), "low must be a number, got '1'"),
    "select_clip_cov exclude": (selection(select_clip_cov, {"exclude": torch.ones(30)}), "exclude must be torch.b"),
    "select_clip_cov step": (selection(select_clip_cov, {"step": 1.5}), "step must be an integer, got 1.5"),
    "select_largest ids": (selection(select_largest, {"token_id": torch.arange(3)}), r"token_id must have shape"),
    "select_largest id dtype": (selection(select_largest, {"token_id": torch.arange(30).int()}), "token_id must be "),
    "select_largest seed": (selection(select_largest, {"seed": None}), "seed must be an integer, got None"),
    "select_largest scores": (selection(select_largest, {"scores": 1}), "scores must be what token_covariance or"),
    "select without ids": (chosen(without_ids), "tokens.token_id must be given, control clip_cov"),
    "select step": (chosen({"step": torch.tensor(2.0)}), "step must be an integer or a 0-d int64 tensor"),
    "select without tokens": (chosen({"micro_batches": []}), "parts must hold at least one micro-batch"),
    "select with half a field": (
        chosen(lambda tokens: {"micro_batches": [tokens, replace(tokens, token_id=None)]}),
        "token_id must be set in every micro-batch or in none",
    ),
    "select alone": (
        chosen(lambda tokens: {"controls": [KLCov(scope="micro_batch")], "micro_batches": [_repeating(tokens)]}),
        "token_id must be different",
    ),
}  # fmt: skip


def _repeating(tokens):
    return replace(tokens, token_id=torch.zeros_like(tokens.token_id))


def _hidden(seed):
    """Another state for one token."""
    hidden = numbers(0, T, D)
    hidden[1] = numbers(seed, D)
    return hidden


# Ranks are called differently, each in a way that is right by itself: what all of them raise.
SAME = "all ranks of the group must be called with the same "
DISAGREEMENTS = {
    "token_stats temperature": (stats({"temperature": 0.7}), SAME + r"temperature: rank 0 has 1.0, rank \d has 0.7"),
    "token_stats clamp": (stats({"top_k": 4}, top_k=5), SAME + r"number of logits kept .*: rank 0 has 5"),
    "linear hidden": (linear({"hidden": _hidden(77)}), SAME + "hidden: the values on rank"),
    "linear reduction": (
        linear({"hidden": numbers(0, T, D).requires_grad_()}), SAME + "reduction of hidden's gradient",
    ),
    "logit_covariance mask": (logits_pair({"loss_mask": None}), SAME + "loss_mask: rank 0 has given"),
    "token_covariance eps": (covariance_with({"denominator_eps": 1e-8}), SAME + "denominator_eps: rank 0 has 0.0"),
    "token_covariance empty": (covariance_with({"empty_ok": True}), SAME + "empty_ok: rank 0 has False"),
    "token_means names": (means({"logprob": numbers(0, 30)}), SAME + r"values: rank 0 has \['entropy'\]"),
    "select_largest rounding": (selection(select_largest, {"round_up": True}), SAME + "round_up: rank 0 has False"),
    "covariance_summary": (summary(lambda parts: token_covariance(*parts)), SAME + "num_tokens: rank 0"),
    "select_clip_cov step": (selection(select_clip_cov, {"step": 5}), SAME + r"step: rank 0 has 4, rank \d has 5"),
    "select_clip_cov low": (selection(select_clip_cov, {"low": 0.0}), SAME + "low: rank 0 has -9.0"),
    "select_largest seed": (selection(select_largest, {"seed": torch.tensor(2)}), SAME + "seed: rank 0 has 1"),
    "select_largest ratio": (selection(select_largest, {"ratio": 0.3}), SAME + "ratio: rank 0 has 0.2"),
    "select_largest covariance": (
        selection(select_largest, lambda c, t: {"scores": token_covariance(t.logprob, t.advantage, c.mask)}),
        SAME + "num_tokens",
    ),
    "another selection": (
        selection(select_largest, {"op": select_clip_cov, "low": 0.0, "high": 1.0}),
        r"must make the same call: rank 0 makes select_largest, rank \d makes select_clip_cov",
    ),
    "select step": (chosen({"step": 3}), SAME + r"step: rank 0 has 2, rank \d has 3"),
    "select config": (chosen({"config": PolicyLossConfig(clip_high=0.28)}), SAME + "config: rank 0 has Policy"),
    "select knob": (chosen({"controls": (ClipCov(clip_cov_ratio=0.2), *CONTROLS[1:])}), SAME + "controls: rank 0 has"),
}  # fmt: skip

# Token ids that two ranks have both: an error that counts them.
REPEATED = {
    f"{which.__name__} {name}": (selection(which, change), "token_id must be different for every unmasked token")
    for which in (select_clip_cov, select_largest)
    for name, change in {
        "one id": lambda c, t: {"token_id": torch.where(t.token_id == t.token_id[7], 12, t.token_id)},
        "all ids": lambda c, t: {"token_id": torch.arange(30)},
        "negative": lambda c, t: {"token_id": torch.arange(30) - 2},
    }.items()
}
