"""The roofline plot: bytes a second that entcov and the others achieve, and the ceilings, against columns."""

import importlib.util
from pathlib import Path

from benchmarks.gpu import report

PASSES = ("forward", "forward+backward")
WORKLOAD = "token_stats"  # most contenders have it


def available() -> bool:
    """Whether this machine can draw."""
    return importlib.util.find_spec("matplotlib") is not None


def points(runs: list[dict]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """{(dtype, pass): {contender: {columns: TB/s}}} of all that was measured; of several runs the latest counts."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for run in runs:
        for r in report.measurements(run):
            if r.get("workload") == WORKLOAD and "pass" in r and "tb_per_s" in r:
                panel = found.setdefault((r["dtype"], r["pass"]), {})
                panel.setdefault(r["contender"], {})[r["columns"]] = r["tb_per_s"]
    return found


def draw(runs: list[dict], path: Path) -> None:
    """One panel for each dtype and pass; solid is entcov, dashed the ceilings of the latest run that measured them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels = points(runs)
    dtypes = sorted({dtype for dtype, _ in panels})
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure = Figure(figsize=(11, 4.2 * len(dtypes) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), len(PASSES), squeeze=False)
    top, _ = report.ceilings(runs[-1], runs)
    for row, dtype in zip(axes, dtypes, strict=True):
        for ax, label in zip(row, PASSES, strict=True):
            for n, name in enumerate(names):
                line = sorted(panels.get((dtype, label), {}).get(name, {}).items())
                ours = name == "entcov"
                ax.plot(*zip(*line, strict=True) if line else ([], []), marker="o", label=name, zorder=3 if ours else 2,
                        color="black" if ours else f"C{n % 10}", linewidth=2.2 if ours else 1.2)  # fmt: skip
            for kind, rate in top.items():
                ax.axhline(rate, linestyle="--", color="grey", linewidth=1)
                ax.annotate(f"{kind} ceiling {rate:.3g}", (1, rate), xycoords=("axes fraction", "data"), ha="right",
                            va="bottom", fontsize=8, color="grey")  # fmt: skip
            columns = sorted({c for line in panels.get((dtype, label), {}).values() for c in line})
            ax.set_xscale("log")
            ax.set_xticks(columns, [f"{c:,}" for c in columns])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_ylim(bottom=0)
            ax.set_title(f"{dtype}, {label}")
            ax.set_xlabel("columns")
            ax.set_ylabel("TB/s that the algorithm must move")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    rehearsal = "REHEARSAL on a CPU, no measurement: " if runs[-1]["rehearsal"] else ""
    figure.suptitle(f"{rehearsal}{WORKLOAD} on {runs[-1]['environment'].get('device', 'unknown device')}")
    figure.savefig(path, dpi=110, format="png")
