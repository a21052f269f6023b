"""Plots of the diagnostics: the numbers in the panels, what is left out, the file, and the section of a report."""

from __future__ import annotations

import json
import math
import re

import numpy as np
from matplotlib import image
from matplotlib.colors import same_color

from entcov.diagnostics import Calibration
from entcov.report.diagnostics import Diagnosed, build_figure, panel_figures, panels, plot_diagnostics
from entcov.report.page import build_page, read_runs
from entcov.report.plots import new_figure
from entcov.rl.answers import Answers
from entcov.rl.solve_counts import SolveCounts
from tests.support.recorded_run import made_up_run

TITLES = [
    "Covariance of the top tokens, mean", "Entropy change by the updates", "Entropy by position in the response",
    "Tokens of each class", "Their part in the entropy's change", "Groups with no, some and only right responses",
    "Different answers to a prompt", "Most common answer", "Reliability of the held-out most common answer",
]  # fmt: skip
FIRST, LAST = Calibration(((6, 0.25, 0.5), (2, 1.0, 1.0))), Calibration(((8, 0.75, 0.5),))
SOLVES = {
    0: {"sums": SolveCounts(4, (1, 0, 0, 0, 1), (0, 4), Answers(2.0, FIRST)), "own": SolveCounts(4, (2,), (0,))},
    4: {"sums": SolveCounts(4, (1, 0, 0, 0, 1), (0, 4), Answers(2.0, FIRST))},
    8: {"sums": SolveCounts(4, (1, 0, 0, 0, 1), (0, 4), Answers(1.0, LAST))},
}


def row(step: int) -> dict[str, float]:
    found = {"step": step, "actor/cov_mean": 0.1 - 0.1 * (step == 3), "training/distinct_answers": 5 - step / 10}
    found |= {f"actor/cov_top_{share}": share**-0.5 for share in (0.0002, 0.002, 0.02, 0.2, 0.5)}
    found |= {f"entropy_by_position/{i}": i / step for i in range(1, 11) if i != 4}
    found |= {"actor/entropy_change": -step / 100, "actor/entropy_change_predicted": -step / 90}
    for number, name in enumerate(("rewarded_likely", "rewarded_unlikely", "punished_likely", "punished_unlikely")):
        found |= {f"token_classes/{name}/tokens": number / 6, f"token_classes/{name}/change": number / 6 - 0.25}
    found |= {f"training/groups_{name}_right": share for name, share in (("none", 0.5), ("some", 0.3), ("all", 0.2))}
    return found | {"calibration/confidence": 0.8, "calibration/accuracy": 0.6, "calibration/ece": 0.25}


RUN = Diagnosed([[row(step) for step in range(1, 21)]], SOLVES)


def lines(title: str, run: Diagnosed = RUN) -> dict[str, list]:
    """Of a panel, x and y of every line by the name in its legend."""
    ax = new_figure(4, 3).subplots()
    panels(run)[title](ax)
    return {name: [handle.get_xdata().tolist(), handle.get_ydata().tolist()]
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}  # fmt: skip


def test_the_panels_hold_the_logged_numbers():
    assert list(panels(RUN)) == TITLES
    top = lines(TITLES[0])
    assert list(top) == ["top 0.02 %", "top 0.2 %", "top 2 %", "top 20 %", "top 50 %", "all"]
    assert top["top 2 %"] == [list(range(1, 21)), [0.02**-0.5] * 20]
    assert [step for step, value in zip(*top["all"], strict=True) if math.isnan(value)] == [3]  # 0 has no logarithm
    np.testing.assert_allclose(lines(TITLES[1])["predicted, first order"][1], [-step / 90 for step in range(1, 21)])
    place = lines(TITLES[2])
    assert list(place) == ["steps 1 to 2", "steps 10 to 11", "steps 19 to 20"]
    x, y = place["steps 19 to 20"]
    np.testing.assert_allclose(x, [0.05 + 0.1 * i for i in range(10)])
    np.testing.assert_allclose(y, [i * (1 / 19 + 1 / 20) / 2 if i != 4 else math.nan for i in range(1, 11)])
    assert lines(TITLES[3])["punished, unlikely"][1][0] == 0.5
    assert lines(TITLES[4])["rewarded, likely"][1][0] == -0.25
    assert {name: y[0] for name, (_, y) in lines(TITLES[5]).items()} == {
        "none right": 0.5, "some right": 0.3, "all right": 0.2,
    }  # fmt: skip
    assert {name: y[0] for name, (_, y) in lines(TITLES[7]).items()} == {
        "confidence": 0.8, "accuracy": 0.6, "expected calibration error": 0.25,
    }  # fmt: skip


def test_reliability_of_the_first_evaluation_and_the_last_one():
    found = lines(TITLES[8])
    assert found == {"step 0: error 18.8%": [[0.25, 1.0], [0.5, 1.0]], "step 8: error 25.0%": [[0.75], [0.5]]}
    ax = new_figure(4, 3).subplots()
    panels(RUN)[TITLES[8]](ax)
    first, last = (points.get_sizes().tolist() for points in ax.collections)
    assert first[0] == 3 * first[1] and last == [sum(first)]
    assert all(same_color(line.get_color(), ax.lines[1].get_color()) for line in ax.lines[1:])  # of one source


def test_seeds_are_averaged_and_what_was_not_logged_is_left_out():
    other = [{**row(step), "training/distinct_answers": 2.0} for step in range(1, 11)]
    found = Diagnosed([RUN.seeds[0], other], {}).series("training/distinct_answers")
    assert found[0].tolist() == list(range(1, 11)) and found[1][0] == (4.9 + 2) / 2
    partly = Diagnosed([[{"step": 1, "training/distinct_answers": 2.0, "actor/entropy": 1.0}]], {})
    assert list(panels(partly)) == [TITLES[6]]
    assert panels(Diagnosed([[{"step": 1, "actor/entropy": 1.0}]], {0: {"own": SOLVES[0]["own"]}})) == {}
    assert build_figure({"none": Diagnosed([[{"step": 1}]], {})}) is None


def test_one_file_with_the_panels_of_every_run(tmp_path):
    bare = Diagnosed([[{"step": 1, "actor/entropy": 1.0}]], {})
    assert plot_diagnostics({"bare": bare}, tmp_path / "plots") == [] and not (tmp_path / "plots").exists()
    figure = build_figure({"tiny": RUN, "bare": bare, "other": RUN})
    assert [part.get_suptitle() for part in figure.subfigs] == ["tiny", "other"]
    assert [ax.get_title("left") for ax in figure.axes] == 2 * TITLES
    (path,) = plot_diagnostics({"tiny": RUN}, tmp_path / "plots")
    assert path.name == "diagnostics.png" and image.imread(path).shape[0] > 1000
    assert list(panel_figures(RUN)) == TITLES


def test_a_page_has_the_panels_of_every_label(tmp_path):
    for name in ("none", "aent"):
        run = made_up_run(tmp_path / name, steps=10, tokens=2, prompts=1)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line | {"training/distinct_answers": 2.0} for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "solve_counts").mkdir()
        counts = {source: one.state_dict() for source, one in SOLVES[8].items()}
        (run / "solve_counts" / "step_8.json").write_text(json.dumps(counts))
    page = build_page(read_runs([tmp_path / "none", tmp_path / "aent"]))
    section = page.partition('<section id="diagnostics"')[2].partition("</section>")[0]
    assert re.findall('alt="([^"]*)"', section) == 2 * [TITLES[6], TITLES[8]]
    assert section.index("<h3>none</h3>") < section.index("<h3>aent</h3>")
