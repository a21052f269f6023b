"""A premature style: what reinforcement on short sums does to the styles of working that long sums need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from entcov.report.compare import Comparison, Estimate, Measure, summarize, tables
from entcov.report.plots import COLOURS, new_figure
from entcov.studies.base import Findings, How, Table
from entcov.studies.figures import Rows
from entcov.studies.plan import Plan
from entcov.studies.styles import KINDS, RIGHT_SHARE, SHARE
from entcov.studies.training import TrainingStudy, evaluate

PLAIN, ALONE = "none", "long_alone"  # plain GRPO on both phases, and on the second one alone
WINDOW = 4  # steps whose mean is taken: at the beginning and at the end of a phase, and of every point of a curve
REACHED = 0.8  # reward in phase 2 whose first window is looked for; of the pilots' runs, all came to it
_SCORE = "critic/score"
MEASURES = (
    Measure("reward_1", "reward, end of phase 1", 3, "reward_1"),
    Measure("entropy_1", "entropy, end of phase 1", 3, "entropy_1"),
    Measure("top_1", "share of the preferred style, end of phase 1", 3, "top_1"),
    Measure("reward_start", "reward, beginning of phase 2", 3, "reward_start"),
    Measure("top_2", "share of the preferred style, end of phase 2", 3, "top_2"),
    Measure("reward_2", "reward, end of phase 2", 3, "reward_2"),
    Measure("entropy", "entropy, end of phase 2", 3, "entropy_2"),
    Measure("steps", f"steps of phase 2 until a reward of {REACHED}", 1, "steps"),
    Measure("reached", "runs that reach it", 2, "reached"),
    Measure("held_out", "held-out long sums", 3, r"val-core/.+/held_out/acc/mean@\d+", last_only=True),
    Measure("short", "held-out short sums", 3, r"val-core/.+/short/acc/mean@\d+", last_only=True),
)
_SAID = ("reward_start", "reward_2", "steps", "held_out", "short", "entropy")


class StyleStudy(TrainingStudy):
    """The runs of the plan `style`, phase by phase."""

    def run(self, how: How) -> Findings:
        if how.arms is not None:
            how = replace(how, arms=[*how.arms, PLAIN])  # what all statements compare with
        plan, rows, chosen, tried = self.trained(how)
        found = style_findings(plan, rows)
        common = evaluate(plan, rows, chosen, tried)
        return Findings(
            statements=found.statements,
            tables=[*found.tables, *(table for table in common.tables if table.title.startswith("Strengths"))],
            figures={**found.figures, "pass_at_k": common.figures["pass_at_k"]},
            values={**found.values, "chosen": common.values["chosen"], "tried": common.values["tried"]},
        )


def phases(plan: Plan, run: Sequence[Mapping[str, float]]) -> tuple[list[Mapping], list[Mapping]]:
    """The training steps of the first phase, none where the run has the second alone, and those of the second."""
    steps = [row for row in run if f"{_SCORE}/mean" in row]
    second = plan.prompts.long_prompts // plan.recipe["rollout"]["prompts_per_step"]
    return steps[:-second], steps[-second:]


def preferred(plan: Plan, rows: Rows) -> str:
    """The style with the largest share at the end of the first phase, mean over the seeds of plain GRPO."""
    ends = [phases(plan, run)[0][-WINDOW:] for run in rows[PLAIN].values()]
    return max(KINDS, key=lambda kind: fmean(_mean(end, f"{SHARE}/{kind}") for end in ends))


def values_of(plan: Plan, run: Sequence[Mapping[str, float]], style: str) -> dict[str, float]:
    """The measures of a run by the patterns of MEASURES, evaluations as they were logged last.

    steps: the last step of the first WINDOW steps of phase 2 whose mean reward is at least REACHED; the number of all
    its steps where there are none, so a lower bound.
    """
    first, second = phases(plan, run)
    rewards = [_mean(second[i : i + WINDOW], "mean") for i in range(max(1, len(second) - WINDOW + 1))]
    at = next((i for i, reward in enumerate(rewards) if reward >= REACHED), None)
    found = {
        "reward_start": rewards[0], "reward_2": rewards[-1], "entropy_2": _entropy(second[-WINDOW:]),
        "top_2": _mean(second[-WINDOW:], f"{SHARE}/{style}"), "reached": float(at is not None),
        "steps": float(len(second) if at is None else at + min(WINDOW, len(second))),
    }  # fmt: skip
    if first:
        end = first[-WINDOW:]
        found |= {
            "reward_1": _mean(end, "mean"), "entropy_1": _entropy(end), "top_1": _mean(end, f"{SHARE}/{style}"),
        }  # fmt: skip
    evaluated = [{key: value for key, value in row.items() if key.startswith("val-core/")} for row in run]
    return found | next(row for row in reversed(evaluated) if row)


def style_findings(plan: Plan, rows: Rows) -> Findings:
    style = preferred(plan, rows)
    values = {
        arm: {seed: [{"step": 1, **values_of(plan, run, style)}] for seed, run in by_seed.items()}
        for arm, by_seed in rows.items()
    }
    comparison = summarize(values, plan.baselines, command="", measures=MEASURES)
    ends, differences = (Table(*table) for table in tables(comparison, MEASURES))
    shares, said_shares = _shares(plan, rows)
    return Findings(
        statements=statements(plan, rows, comparison, style),
        tables=[ends._replace(title=f"The two phases; the preferred style is {style}"), differences, shares],
        figures={"phases": _figure(plan, rows, style)},
        values={"comparison": asdict(comparison), "preferred": style, "window": WINDOW, "shares": said_shares},
    )


def statements(plan: Plan, rows: Rows, comparison: Comparison, style: str) -> list[str]:
    """Whether phase 1 prefers a style, whether phase 2 can use it, whether plain GRPO stays with it, and what the arms
    change. Each answer may be no."""
    rise, right, others = {}, {}, {}
    for seed, run in rows[PLAIN].items():
        first, second = phases(plan, run)
        rise[seed] = _mean(first[-WINDOW:], f"{SHARE}/{style}") - _mean(first[:WINDOW], f"{SHARE}/{style}")
        share, gain = (_mean(second[:WINDOW], f"{kind}/{style}") for kind in (SHARE, RIGHT_SHARE))
        whole = _mean(second[:WINDOW], "mean")
        if 0 < share < 1:
            right[seed], others[seed] = gain / share, (whole - gain) / (1 - share)
    end = comparison.estimates[PLAIN]["top_1"]
    settled = _verdict(Estimate.of(rise), "rises", "falls", "is not told from its beginning")
    said = [
        f"Phase 1 of {PLAIN}: the share of {style} {settled}, and is {_shown(end)} at its end; entropy "
        f"{_shown(comparison.estimates[PLAIN]['entropy_1'])} nats."
    ]
    if right:
        gap = Estimate.of({seed: right[seed] - others[seed] for seed in right})
        said.append(
            f"In the first {WINDOW} steps of phase 2 {_shown(Estimate.of(right))} of the responses in {style} are "
            f"right, of the others {_shown(Estimate.of(others))}: the preferred style "
            f"{_verdict(gap, 'is the better one', 'is the worse one', 'is not told from the others')}."
        )
    reached = comparison.estimates[PLAIN]["reached"]
    said.append(
        f"Phase 2 of {PLAIN}: {_shown(reached, 2)} of the runs reach a reward of {REACHED}; at the end "
        f"{_shown(comparison.estimates[PLAIN]['top_2'])} of the responses are in {style}, and the reward is "
        f"{_shown(comparison.estimates[PLAIN]['reward_2'])}."
    )
    titles = {measure.name: measure.title for measure in MEASURES}
    for arm, baseline in plan.baselines.items():
        parts = [
            f"{titles[name]} {_verdict(difference, 'higher', 'lower', 'not told apart')}"
            for name in _SAID
            if (difference := comparison.differences[arm][name]).by_seed and difference.excludes_zero is not None
        ]
        if parts:
            said.append(f"{arm} against {baseline}: {'; '.join(parts)}.")
    return said


def _shares(plan: Plan, rows: Rows) -> tuple[Table, dict[str, dict[str, dict[str, float]]]]:
    """Of each style among the training responses, mean over seeds, and the same as arm -> when -> style -> share."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for arm, by_seed in rows.items():
        both = [phases(plan, run) for run in by_seed.values()]
        for phase in (0, 1):
            for when, part in (("beginning", slice(WINDOW)), ("end", slice(-WINDOW, None))):
                windows = [own[phase][part] for own in both if own[phase]]
                if windows:
                    found.setdefault(arm, {})[f"phase {phase + 1}, {when}"] = {
                        kind: fmean(_mean(window, f"{SHARE}/{kind}") for window in windows) for kind in KINDS
                    }
    cells = [
        [arm, when, *(f"{share:.2f}" for share in shares.values())]
        for arm, own in found.items()
        for when, shares in own.items()
    ]
    title = f"Share of each style among training responses, means over {WINDOW} steps and the seeds"
    return Table(title, ["arm", "when", *KINDS], cells), found


def _figure(plan: Plan, rows: Rows, style: str) -> Figure:
    """Reward, entropy and the share of the preferred style over the steps, mean over seeds; the line parts the phases.

    A run of phase 2 alone is drawn where the others have that phase."""
    figure = new_figure(12, 4.2)
    panels = (
        ("Reward", f"{_SCORE}/mean"), ("Entropy, nats per token", "actor/entropy"),
        (f"Share of responses in {style}", f"{_SCORE}/{SHARE}/{style}"),
    )  # fmt: skip
    border = max(len(phases(plan, run)[0]) for by_seed in rows.values() for run in by_seed.values())
    for ax, (title, key) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (arm, by_seed), colour in zip(rows.items(), COLOURS * len(rows), strict=False):
            both = [phases(plan, run) for run in by_seed.values()]
            curve = np.mean([[row[key] for row in (*first, *second)] for first, second in both], axis=0)
            smooth = np.convolve(curve, np.full(WINDOW, 1 / WINDOW), "valid") if len(curve) >= WINDOW else curve
            start = border - len(both[0][0]) + len(curve) - len(smooth) + 1
            ax.plot(range(start, start + len(smooth)), smooth, color=colour, label=arm, gid=arm)
        ax.axvline(border + 0.5, color="#999999", linewidth=1)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("step")
        ax.set_ylim(bottom=0)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def _mean(window: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(row[f"{_SCORE}/{name}"] for row in window)


def _entropy(window: Sequence[Mapping[str, float]]) -> float:
    return fmean(row["actor/entropy"] for row in window)


def _shown(estimate: Estimate, digits: int = 3, sign: str = "") -> str:
    half = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:{sign}.{digits}f}{half}"


def _verdict(difference: Estimate, more: str, less: str, neither: str) -> str:
    """What the interval of a difference says, with its numbers; one seed says nothing but the number."""
    if difference.excludes_zero is None:
        return f"differs ({_shown(difference, sign='+')}, one seed)"
    verdict = (more if difference.mean > 0 else less) if difference.excludes_zero else neither
    return f"{verdict} ({_shown(difference, sign='+')})"
