"""The first-order change of the entropy against the measured one, over five decades of step sizes.

To first order a change dz of the logits changes the entropy by -Cov_{a~p}(log p_a, dz_a) (docs/math.md (13)); what is
left is of second order, so it falls a hundredfold where the step falls tenfold: a slope of 2.

Tables of logits: 16 states with 50 actions, logits drawn with a standard deviation of 2, advantages drawn and centred
under the policy. Four steps, each predicted from what is known before it:
    policy gradient     dz = eta p A              -eta Cov(log p, p A)      Cui et al., arXiv 2505.22617, theorem 1
    natural gradient    dz = eta A                -eta Cov(log p, A)        theorem 2
    sampled gradient    of `entcov.policy_loss`   eta mean(entropy_drift A) over 256 sampled tokens of each state
    AdamW               of that gradient          no theorem knows its dz: -Cov(log p, dz) of the step as it was made
There the change is known in float64, and `entcov.logit_covariance` (float32) is compared with it.

Transformers of this project: two layers, some thousand weights, taught one-digit addition, then one rollout of 128
responses scored as in training, and one step on it by gradient descent or by AdamW (whose averages come from four
other parts of the rollout). Changes are those of the logits at the response tokens. Here entropy_drift A says what the
token's own gradient would do to its own distribution, as if the logits were the weights.

Nothing is chosen: every seed is reported (tables 0 to 9, transformers 0 to 2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens
from entcov.report.compare import Estimate
from entcov.report.plots import COLOURS, new_figure
from entcov.rl.batch import Batch
from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from entcov.studies.base import Findings, PartsStudy, Table
from entcov.studies.small_policy import response_rows, small_policy
from entcov.studies.words import shown, verdict

STATES, ACTIONS, SAMPLES = 16, 50, 256
TABLE_STEPS = tuple(10 ** (k / 2) for k in range(-8, 3))
NETWORK_STEPS = {
    "gradient descent": tuple(10 ** (k / 2) for k in range(-8, 0)),
    "AdamW": tuple(10 ** (k / 2) for k in range(-11, -3)),
}
TABLE_SEEDS, NETWORK_SEEDS = tuple(range(10)), tuple(range(3))
UNCLIPPED = PolicyLossConfig(clip_low=1.0, clip_high=math.inf)
AT_KL = 1e-3  # nats a token: about what an update of a training run does
MEASURABLE = 1e-4  # nats: a mean change below is too close to the rounding of float32 logits
WARM_START = 150  # supervised steps
PROMPTS = 16

Rows = list[dict[str, float]]


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def covariance(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cov_{a~p}(x_a, y_a) over the last dimension."""
    return (p * x * y).sum(-1) - (p * x).sum(-1) * (p * y).sum(-1)


def compared(old: Tensor, new: Tensor, predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over the rows of [T, V] logits. predicted, truth: [T], of the entropy change.

    error: mean |predicted - truth|; size: mean |truth|; product_*: `logit_covariance` in float32 in place of both;
    correlation: of predicted and truth over the rows; kl: KL(old || new).
    """
    found = logit_covariance(old.float(), new.float())
    return {
        "error": float((predicted - truth).abs().mean()),
        "size": float(truth.abs().mean()),
        "product_error": float((found.predicted_entropy_change - found.entropy_change).abs().mean()),
        "rounding": float((found.entropy_change - truth).abs().mean()),
        "correlation": float(np.corrcoef(predicted.numpy(), truth.numpy())[0, 1]),
        "kl": float(found.kl.double().mean()),
    }


# ---- tables of logits ------------------------------------------------------------------------------------------------


def table(seed: int, steps: Sequence[float]) -> dict[str, Rows]:
    """Rows of `compared` by kind of step."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    p = logits.softmax(-1)
    advantage = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    advantage -= (p * advantage).sum(-1, keepdim=True)
    action = torch.multinomial(p, SAMPLES, replacement=True, generator=g)
    gradient, drift = sampled_gradient(logits, action, advantage.gather(1, action))
    log_p = logits.log_softmax(-1)
    moves = {  # kind -> (dz, predicted change of the entropy) of a step of size eta
        "policy gradient": lambda eta: (eta * p * advantage, -eta * covariance(p, log_p, p * advantage)),
        "natural gradient": lambda eta: (eta * advantage, -eta * covariance(p, log_p, advantage)),
        "sampled gradient": lambda eta: (-eta * gradient, eta * drift),
        "AdamW": lambda eta: (dz := adamw_step(logits, gradient, eta), -covariance(p, log_p, dz)),
    }
    rows = {}
    for kind, move in moves.items():
        rows[kind] = []
        for eta in steps:
            change, predicted = move(eta)
            truth = entropy((logits + change).log_softmax(-1)) - entropy(log_p)
            own = {"eta": eta} | compared(logits, logits + change, predicted, truth)
            if kind == "AdamW":  # what the gradient's drift says of it
                own["of_drift"] = float(np.corrcoef(drift.numpy(), truth.numpy())[0, 1])
            rows[kind].append(own)
    return rows


def sampled_gradient(logits: Tensor, action: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the loss [S, V], mean over samples of entropy_drift * advantage [S]), for action, advantage [S, n].

    The loss is the mean over the n samples of a state, summed over states.
    """
    samples = action.shape[1]
    free = logits.float().requires_grad_()
    stats = token_stats(free.repeat_interleave(samples, 0), action.flatten(), moments=True)
    mask = torch.ones(action.numel(), dtype=torch.bool)
    tokens = Tokens(stats.logprob, stats.logprob.detach(), advantage.flatten().float(), mask)
    loss, _ = policy_loss(tokens, PolicyLossConfig(clip_low=1.0, clip_high=math.inf, aggregation="token-sum"))
    (gradient,) = torch.autograd.grad(loss / samples, free)
    drift = (stats.entropy_drift.double() * advantage.flatten()).view(-1, samples).mean(1)
    return gradient.double(), drift


def adamw_step(logits: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """The change of the logits by AdamW's first step."""
    weights = nn.Parameter(logits.clone())
    weights.grad = gradient
    torch.optim.AdamW([weights], lr=lr).step()
    return weights.detach() - logits


# ---- transformers ----------------------------------------------------------------------------------------------------


def network(seed: int, steps: Mapping[str, Sequence[float]], warm_start: int) -> dict[str, Any]:
    """Rows of `compared` by optimizer; "drift" in them: correlation over tokens of entropy_drift * advantage with the
    measured change. And the mean entropy and reward of the rollout."""
    model, batch = small_policy(seed, warm_start=warm_start, prompts=PROMPTS)
    with torch.no_grad():
        before = response_rows(model, batch)[0]
    stats = token_stats(before, batch.target[batch.loss_mask], moments=True)
    drift = (stats.entropy_drift * batch.advantage[batch.loss_mask]).double()
    rows = {
        name: [{"eta": eta} | stepped(model, batch, name, eta, before, drift) for eta in sizes]
        for name, sizes in steps.items()
    }
    return {"rows": rows, "entropy": float(stats.entropy.mean()), "reward": float(batch.responses.score.mean())}


def gradient_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Of the policy loss on the batch, by weight."""
    at = batch.loss_mask
    stats = token_stats(response_rows(model, batch)[0], batch.target[at])
    loss, _ = policy_loss(batch.loss_tokens(at, stats.logprob), UNCLIPPED)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def stepped(model: nn.Module, batch: Batch, name: str, eta: float, before: Tensor, drift: Tensor) -> dict[str, float]:
    """One step on the batch by a copy of the model, compared with the model."""
    moved = copy.deepcopy(model)
    weights = list(moved.parameters())
    if name == "AdamW":
        optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
        for part in range(4):
            _step(optimizer, weights, gradient_of(moved, batch.subset(range(part, batch.num_sequences, 4))))
        optimizer.param_groups[0]["lr"] = eta
    else:
        optimizer = torch.optim.SGD(weights, lr=eta)
    _step(optimizer, weights, gradient_of(moved, batch))
    with torch.no_grad():
        after = response_rows(moved, batch)[0]
    found = logit_covariance(before, after)
    own = compared(before, after, found.predicted_entropy_change.double(), found.entropy_change.double())
    own["drift"] = float(np.corrcoef(drift.numpy(), found.entropy_change.double().numpy())[0, 1])
    return own | {
        "mean_predicted": float(found.predicted_entropy_change.double().mean()),
        "mean_change": float(found.entropy_change.double().mean()),
    }


def _step(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], gradient: Sequence[Tensor]) -> None:
    for weight, own in zip(weights, gradient, strict=True):
        weight.grad = own
    optimizer.step()


# ---- findings --------------------------------------------------------------------------------------------------------


class Drift(PartsStudy):
    name = "drift"
    title = "First-order entropy change against the measured one"
    question = "Up to which step does the covariance predict what an update does to the entropy?"

    def parts(self, smoke: bool) -> Mapping[str, Callable[[], Any]]:
        tables, networks = (TABLE_SEEDS[:3], NETWORK_SEEDS[:2]) if smoke else (TABLE_SEEDS, NETWORK_SEEDS)
        warm_start = 80 if smoke else WARM_START
        parts = {f"table {seed}": partial(table, seed, TABLE_STEPS) for seed in tables}
        return parts | {f"transformer {seed}": partial(network, seed, NETWORK_STEPS, warm_start) for seed in networks}

    def findings(self, results: Mapping[str, Any]) -> Findings:
        tables = [own for label, own in results.items() if label.startswith("table")]
        networks = [own for label, own in results.items() if label.startswith("transformer")]
        by_kind = {kind: [own[kind] for own in tables] for kind in tables[0]}
        by_optimizer = {name: [own["rows"][name] for own in networks] for name in NETWORK_STEPS}
        statements = [
            _tables(by_kind),
            _product(by_kind),
            _networks(by_optimizer),
            _means(by_optimizer),
            *_own_gradient(by_kind, by_optimizer),
        ]
        listed = [_summary(by_kind, by_optimizer), _network_steps(by_optimizer, networks)]
        values = _rounded({"tables": tables, "transformers": networks})
        return Findings(statements, listed, {"drift": _figure(by_kind, by_optimizer)}, values)


def slope(rows: Rows, error: str = "error", smallest: float = 0.0, largest: float = math.inf) -> float:
    """Of log error against log step, by least squares, where the measured change lies between the two."""
    used = [row for row in rows if smallest <= row["size"] and row["kl"] <= largest and row[error] > 0]
    if len(used) < 3:
        return math.nan
    x, y = (np.log([row[name] for row in used]) for name in ("eta", error))
    return float(np.polyfit(x, y, 1)[0])


def relative_error(rows: Rows, kl: float, error: str = "error") -> float:
    """mean |predicted - measured| / mean |measured| where the step has this KL, by interpolation of the logs.

    NaN where no step is so large or so small.
    """
    pairs = sorted((math.log(row["kl"]), math.log(row[error] / row["size"])) for row in rows if row["kl"] > 0)
    x, y = zip(*pairs, strict=True)
    return math.exp(np.interp(math.log(kl), x, y)) if x[0] <= math.log(kl) <= x[-1] else math.nan


def _over(seeds: Sequence[float]) -> Estimate:
    """Of the seeds that have a number."""
    return Estimate.of({seed: own for seed, own in enumerate(seeds) if not math.isnan(own)})


def _slopes(runs: Mapping[str, Sequence[Rows]], **where: float) -> dict[str, Estimate]:
    return {name: _over([slope(rows, **where) for rows in seeds]) for name, seeds in runs.items()}


def _relative(runs: Mapping[str, Sequence[Rows]]) -> dict[str, Estimate]:
    return {name: _over([relative_error(rows, AT_KL) for rows in seeds]) for name, seeds in runs.items()}


SMALL_TABLE = {"largest": 1e-3}  # KL: beyond, the third order shows
SMALL_NETWORK = {"smallest": MEASURABLE, "largest": 1e-2}


def _percent(of: Estimate) -> str:
    return shown(Estimate(100 * of.mean, 100 * of.half_width, of.by_seed), 1) + " %"


def _tables(by_kind: Mapping[str, Sequence[Rows]]) -> str:
    slopes, relative = _slopes(by_kind, **SMALL_TABLE), _relative(by_kind)
    each = "; ".join(f"{kind} {shown(own, 3)}" for kind, own in slopes.items())
    off = [kind for kind, own in slopes.items() if not abs(own.mean - 2) <= 0.05]
    close = "as theory says" if not off else f"which is not the 2 of theory for {', '.join(off)}"
    errors = "; ".join(f"{kind} {_percent(own)}" for kind, own in relative.items())
    return (
        f"Tables of logits: the error of the prediction falls with a slope of {each}, {close}. Where a step moves the "
        f"policy by KL = {AT_KL:g} nats, the error is, of the change itself: {errors}."
    )


def _product(by_kind: Mapping[str, Sequence[Rows]]) -> str:
    rows = [row for seeds in by_kind.values() for one in seeds for row in one]
    rounding = max(row["rounding"] for row in rows if row["kl"] <= AT_KL)
    trusted = [row["size"] for row in rows if row["rounding"] > 0.01 * row["size"]]
    text = (
        f"Up to there `logit_covariance` in float32 differs from float64 by at most {rounding:.1e} nats, mean over rows"
    )
    if not trusted:
        return text + ", less than 1 % of the change at every step."
    return text + f"; above a change of {max(trusted):.1e} nats its rounding is below 1 % of the change."


def _networks(runs: Mapping[str, Sequence[Rows]]) -> str:
    slopes, relative = _slopes(runs, **SMALL_NETWORK), _relative(runs)
    each = "; ".join(
        f"{name}: slope {shown(slopes[name], 2)}, error at KL = {AT_KL:g} {_percent(relative[name])}" for name in runs
    )
    off = [name for name, own in slopes.items() if not abs(own.mean - 2) <= own.half_width + 0.1]
    close = "The slope is 2 for each" if not off else f"The slope is not 2 for {', '.join(off)}"
    return f"Transformers, with the logits' own change known (`logit_covariance`): {each}. {close}."


def _means(runs: Mapping[str, Sequence[Rows]]) -> str:
    """The change that a metric shows is the mean over tokens, in which rises and falls cancel."""
    clauses = []
    for name, seeds in runs.items():
        cancel = _over([abs(_at(rows, "mean_change")) / _at(rows, "size") for rows in seeds])
        errors = [abs(_at(rows, "mean_predicted") / _at(rows, "mean_change") - 1) for rows in seeds]
        wrong = sum(_at(rows, "mean_predicted") * _at(rows, "mean_change") < 0 for rows in seeds)
        clauses.append(
            f"{name}: the mean change is {_percent(cancel)} of the mean size, its prediction is off by "
            f"{min(errors):.0%} to {max(errors):.0%}, and has the wrong sign in {wrong} of {len(seeds)}"
        )
    return (
        "The mean over tokens, which a run logs, is predicted worse than its parts, since rises and falls cancel. Near "
        f"KL = {AT_KL:g}: " + "; ".join(clauses) + "."
    )


def _own_gradient(tables: Mapping[str, Sequence[Rows]], networks: Mapping[str, Sequence[Rows]]) -> list[str]:
    """What entropy_drift * advantage, known before the step, says of the change."""
    on_table = _over([rows[0]["correlation"] for rows in tables["sampled gradient"]])
    adamw = _over([rows[0]["of_drift"] for rows in tables["AdamW"]])
    own = {name: _over([_at(rows, "drift") for rows in seeds]) for name, seeds in networks.items()}
    each = " and ".join(f"{shown(e, 2)} ({name})" for name, e in own.items())
    least = min(own.values(), key=lambda e: e.mean)
    words = verdict(
        least, "it has the right sign there", "it has the wrong sign there", "none is resolved for each of them"
    )
    small = max(e.mean for e in own.values()) < 0.9
    so = (
        "which way a token pushes, and not by how much its entropy will change"
        if small
        else "that of single tokens too"
    )
    return [
        "entropy_drift × advantage is known before the step. Over the states of a table it correlates with the change "
        f"by {shown(on_table, 3)} under the sampled gradient and by {shown(adamw, 3)} under AdamW, at the "
        "smallest step. Over the tokens of a transformer, whose weights are shared by all tokens, by "
        f"{each}: {words}. So it says {so}. Theorems 1 and 2 of Cui et al. are about tables; their own measurement "
        "(figure 8) is a mean over responses of a model of 7 billion weights, and nothing here contradicts it."
    ]


def _at(rows: Rows, name: str) -> float:
    """The value at the step whose KL is nearest to AT_KL."""
    return min((row for row in rows if row["kl"] > 0), key=lambda row: abs(math.log(row["kl"] / AT_KL)))[name]


def _summary(by_kind: Mapping[str, Sequence[Rows]], networks: Mapping[str, Sequence[Rows]]) -> Table:
    rows = []
    for place, runs, where in (("table", by_kind, SMALL_TABLE), ("transformer", networks, SMALL_NETWORK)):
        slopes, relative = _slopes(runs, **where), _relative(runs)
        for name in runs:
            errors = [_over([relative_error(one, kl) for one in runs[name]]) for kl in (1e-4, 1e-2)]
            cells = [_percent(own) if own.by_seed else "—" for own in (errors[0], relative[name], errors[1])]
            rows.append([place, name, str(len(runs[name])), shown(slopes[name], 3), *cells])
    header = ["logits of", "step", "seeds", "slope", "error at KL 1e-4", f"at {AT_KL:g}", "at 1e-2"]
    return Table(
        "Error of the first-order prediction: slope over step sizes, and size relative to the change", header, rows
    )


def _network_steps(runs: Mapping[str, Sequence[Rows]], networks: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for name, seeds in runs.items():
        for index, row in enumerate(seeds[0]):
            own = [one[index] for one in seeds]
            means = [sum(r[key] for r in own) / len(own) for key in ("kl", "mean_change", "mean_predicted")]
            correlation = _over([r["drift"] for r in own])
            rows.append([name, f"{row['eta']:.1e}", *(f"{mean:.2e}" for mean in means), shown(correlation, 2)])
    where = ", ".join(f"{own['entropy']:.2f} nats and reward {own['reward']:.2f}" for own in networks)
    header = ["step", "learning rate", "KL", "change, nats", "predicted", "corr. with drift × A"]
    return Table(f"Transformers, means over seeds and tokens; they begin with {where}", header, rows)


def _geometric(values: Sequence[float]) -> float:
    """Mean, NaN where a value is 0: a change that float32 does not show."""
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else math.nan


def _rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, Mapping):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _figure(by_kind: Mapping[str, Sequence[Rows]], networks: Mapping[str, Sequence[Rows]]):
    figure = new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for number, (kind, seeds) in enumerate(by_kind.items()):
        style = {"color": COLOURS[number], "marker": "osD^"[number], "markersize": 4}
        for error, line in (("error", "-"), ("product_error", ":")):
            x = [row["eta"] for row in seeds[0]]
            y = [np.mean([rows[i][error] for rows in seeds]) for i in range(len(x))]
            left.plot(x, y, line, linewidth=1.5, label=kind if error == "error" else None, **style)
    x = np.array(TABLE_STEPS)
    left.plot(x, 0.02 * x**2, color="#777777", linewidth=0.8, linestyle="--", label="slope 2")
    left.set_xlabel("step size (dotted: float32, as the product measures)")
    left.set_ylabel("error of the prediction, nats")
    left.set_title("Tables of logits", loc="left")
    runs = {f"table, {kind}": seeds for kind, seeds in by_kind.items()} | {
        f"transformer, {name}": seeds for name, seeds in networks.items()
    }
    for number, (name, seeds) in enumerate(runs.items()):
        kl = [_geometric([rows[i]["kl"] for rows in seeds]) for i in range(len(seeds[0]))]
        y = [_geometric([rows[i]["error"] / rows[i]["size"] for rows in seeds]) for i in range(len(kl))]
        shape = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if name.startswith("table") else "--"}
        right.plot(kl, y, linewidth=1.5, label=name, **shape)
    right.axvline(AT_KL, color="#777777", linewidth=0.8, linestyle=":")
    right.set_xlim(1e-7, 10)
    right.set_ylim(1e-4, 10)
    right.set_xlabel("KL(old || new), nats a token")
    right.set_ylabel("error / change")
    right.set_title("Relative error, means over seeds", loc="left")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    return figure
