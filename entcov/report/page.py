"""`python -m entcov report`: one HTML file of one run or several, which opens without a network.

The curves are matplotlib's SVG export, as images. The token lens is the script page.js over data that stands in the
page as JSON. A content security policy allows this script and the style sheet by their hashes, images from data: and
nothing else, so that no text of a model can act, whatever it holds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from entcov.report import diagnostics, fit_law
from entcov.report.compare import FINAL_FRACTION, summarize, tables
from entcov.report.plots import new_figure, panel_figures
from entcov.report.token_lens import Record, lens, read_records, to_json, visible
from entcov.rl.record.durable import atomic_write, make_folder
from entcov.rl.record.metrics import FILE_NAME, read_metrics
from entcov.rl.solve_counts import read_solve_counts

MAX_BYTES = 10 * 10**6  # of a page; the lens gets what the curves and tables leave
_FORECAST_FROM = 0.15  # the first part of a run, as `entcov fit-law` takes it
_SEED = re.compile(r"seed_(\d+)")


@dataclass(frozen=True)
class Runs:
    """What a report is about: `rows[label][seed]` are the metrics of a run, and `records` what its lens shows."""

    rows: dict[str, dict[int, list[dict[str, float]]]]
    records: dict[str, dict[str, list[Record]]]  # by label and seed
    folders: dict[str, Path]  # by label and seed
    solves: dict[str, diagnostics.Recorded]  # by label: solve counts of its first seed
    baselines: dict[str, str]
    commands: list[str]


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes the page, in one step: a reader sees the old file or the new one.

    Args:
        runs: folders of runs, and folders that `entcov compare` has written. Runs in folders called seed_N beside each
            other are the seeds of one label, the name of the folder above.
        out: the file; its folder is made.

    Raises:
        FileNotFoundError: a folder is neither; the message names it.
        ValueError: no runs; metrics or a record are damaged; or they hold none of the plotted metrics.
    """
    page, out = build_page(read_runs(runs)), Path(out)
    make_folder(out.parent)
    atomic_write(out, page.encode())
    return out


def read_runs(folders: Sequence[str | Path]) -> Runs:
    """Reads the runs of `write_report`."""
    if not folders:
        raise ValueError("runs must hold at least one folder, got none")
    baselines: dict[str, str] = {}
    commands: list[str] = []
    found: list[Path] = []
    for folder in map(Path, folders):
        comparison = folder / "comparison.json"
        if not comparison.is_file():
            found.append(folder)
            continue
        try:
            stored = json.loads(comparison.read_bytes())
            own, command, controls = dict(stored["baselines"]), str(stored["command"]), list(stored["estimates"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{comparison} is damaged ({error!r}); the same `entcov compare` writes it anew") from None
        baselines |= own
        commands.append(command)
        seeds = [
            sorted(p for p in (folder / control).glob("seed_*") if (p / FILE_NAME).exists()) for control in controls
        ]
        found += [path for paths in seeds for path in paths]
    found = list({path.resolve(): path for path in found}.values())
    labels = _labels(found)
    runs = Runs({}, {}, {}, {}, {}, commands)
    for path, (label, seed) in zip(found, labels, strict=True):
        rows = read_metrics(path)
        if not rows:
            raise ValueError(f"{path / FILE_NAME} holds no step yet")
        runs.rows.setdefault(label, {})[seed] = rows
        if label not in runs.solves:
            runs.solves[label] = read_solve_counts(path)
        name = label if sum(label == other for other, _ in labels) == 1 else f"{label}, seed {seed}"
        runs.records[name], runs.folders[name] = read_records(path), path
    runs.baselines.update({a: b for a, b in baselines.items() if a in runs.rows and b in runs.rows})
    return runs


def build_page(runs: Runs, max_bytes: int = MAX_BYTES) -> str:
    """The page as text."""
    head = f"<h1>{_text(', '.join(runs.rows))}</h1>\n" + "".join(f"<pre>{_text(c)}</pre>\n" for c in runs.commands)
    body = [
        _section("curves", "Curves", _curves(runs)),
        _section("tables", "Tables", _tables(runs)),
        _section("law", "The law of entropy and reward", _law(runs)),
    ]
    if diagnosed := _diagnostics(runs):
        body.append(_section("diagnostics", "Diagnostics", diagnosed))
    style, script = (resources.files("entcov.report").joinpath(name).read_text() for name in ("page.css", "page.js"))
    static = [*body, head, style, script]
    data = lens(runs.records, max_bytes - sum(len(part.encode()) for part in static) - 10_000)
    body.append(_section("lens", "Token lens", _lens(data)))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(', '.join(runs.rows))} · entcov report</title>", f"<style>{style}</style>", "</head>",
            "<body>", '<a class="skip" href="#lens">to the token lens</a>', f"<header>{head}</header>", "<main>",
            *body, "</main>", f'<script type="application/json" id="data">{to_json(data)}</script>',
            f"<script>{script}</script>", "</body>", "</html>", "",
        ]
    )  # fmt: skip


def _images(figures: Mapping[str, Figure]) -> str:
    return '<div class="curves">' + "\n".join(_image(title, figure) for title, figure in figures.items()) + "</div>"


def _curves(runs: Runs) -> str:
    figures = panel_figures({label: list(by_seed.values()) for label, by_seed in runs.rows.items()})
    return _images(figures)


def _diagnostics(runs: Runs) -> str:
    """The panels of each label, means over its seeds; evaluations are those of its first seed."""
    parts = []
    for label, by_seed in runs.rows.items():
        if figures := diagnostics.panel_figures(diagnostics.Diagnosed(list(by_seed.values()), runs.solves[label])):
            head = f"<h3>{_text(label)}</h3>" if len(runs.rows) > 1 else ""
            parts.append(head + _images(figures))
    return "\n".join(parts)


def _image(title: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    # Text as text would take the reader's fonts, which have other widths than those that the figure was laid out for.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "entcov"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="curve" decoding="async" alt="{_text(title)}" src="data:image/svg+xml;base64,{data}">'


def _tables(runs: Runs) -> str:
    comparison = summarize(runs.rows, runs.baselines, command="; ".join(runs.commands))
    note = (
        f"Mean over the last {FINAL_FRACTION:.0%} of the steps; held-out numbers: the last evaluation. ± is half the "
        "95 % interval over seeds (Student t); * marks a difference whose interval does not contain 0."
    )
    return f'<p class="note">{_text(note)}</p>' + "".join(_table(*table) for table in tables(comparison))


def _law(runs: Runs) -> str:
    """The fits of `entcov fit-law` at its defaults, or why a run has none."""
    keys = fit_law.columns("response_mean")
    found, reasons = {}, ""
    for name, folder in runs.folders.items():
        try:
            found[name] = fit_law.run_law(fit_law.read_points(folder, *keys), _FORECAST_FROM)
        except ValueError as error:
            reasons += f'<p class="note">{_text(name)}: {_text(str(error))}.</p>'
    if not found:
        return reasons
    figures = [new_figure(4.8, 3.5), new_figure(4.8, 3.5)]
    panels = [figure.subplots() for figure in figures]
    fit_law.draw(*panels, found, keys, _FORECAST_FROM)
    titles = ("Reward over entropy, with the fitted law", f"Reward, and forecast from the first {_FORECAST_FROM:.0%}")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=10)
    pictures = "".join(_image(title, figure) for title, figure in zip(titles, figures, strict=True))
    shown = "".join(_table(*table) for table in fit_law.tables(found, _FORECAST_FROM))
    return f'<div class="curves">{pictures}</div>{shown}{reasons}'


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(title)}"><table><caption>{_text(title)}'
        f"</caption><thead>{row(header, 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody>"
        "</table></div>"
    )


def _lens(data: Mapping) -> str:
    """The controls that page.js fills. Without a record, and without scripts, it says what is missing."""
    if not data["runs"]:
        return "<p>These runs have no record of responses: token_record.max_mb was 0, or they were made before it.</p>"
    left_out = f" {data['left_out']} records are left out to keep the page small." if data["left_out"] else ""
    return resources.files("entcov.report").joinpath("lens.html").read_text().replace("LEFT_OUT", left_out)


def _section(name: str, title: str, content: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{content}\n</section>'
    )


def _labels(paths: Sequence[Path]) -> list[tuple[str, int]]:
    """(label, seed) of each run: unlike for different runs."""
    names = []
    for path in map(Path.resolve, paths):
        match = _SEED.fullmatch(path.name)
        names.append((path.parent.name, int(match[1]), path.parent) if match else (path.name, 0, path))
    folders = {label: {folder for other, _, folder in names if other == label} for label, _, _ in names}
    return [(label if len(folders[label]) == 1 else str(folder), seed) for label, seed, folder in names]


def _text(text: str) -> str:
    return html.escape(visible(text))


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
