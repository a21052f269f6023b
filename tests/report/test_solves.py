"""Plots of solve counts: the numbers in the figures, and that `plot` writes them."""

from __future__ import annotations

import numpy as np

from entcov.report.solves import build_figures, plot_solves
from entcov.rl.solve_counts import SolveCounts

FIRST, LAST = SolveCounts.of(4, [0, 0, 1, 4]), SolveCounts.of(4, [0, 2, 3, 4])


def test_first_and_last_evaluation_of_every_source():
    runs = {
        "none": {0: {"a": FIRST, "b": FIRST}, 20: {"a": FIRST}, 40: {"a": LAST, "b": LAST}},
        "clip_cov": {0: {"a": FIRST}},
        "greedy": {0: {"a": SolveCounts.of(1, [1])}},
    }
    figures = build_figures(runs)
    assert list(figures) == ["pass_at_k", "solve_counts"]
    a, b = figures["pass_at_k"].axes
    assert [line.get_gid() for line in a.lines] == ["none, step 0", "none, step 40", "clip_cov, step 0"]
    assert [line.get_linestyle() for line in a.lines] == ["--", "-", "-"]  # one evaluation is the last one
    curve = {k: LAST.pass_at(k) for k in (1, 2, 4)}
    assert a.lines[1].get_xydata().tolist() == [[k, v] for k, v in curve.items()]
    assert (a.get_title("left"), b.get_title("left"), len(b.lines)) == ("a", "b", 2)
    bars = {patch.get_gid(): patch.get_data() for patch in figures["solve_counts"].axes[0].patches}
    np.testing.assert_allclose(bars["none, step 40"].values, [1 / 4, 0, 1 / 4, 1 / 4, 1 / 4])
    np.testing.assert_allclose(bars["none, step 0"].edges, [-1 / 8, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 9 / 8])


def test_files_only_where_there_are_counts(tmp_path):
    assert plot_solves({"none": {}, "greedy": {0: {"a": SolveCounts.of(1, [1])}}}, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
    paths = plot_solves({"none": {0: {"a": FIRST}}}, tmp_path / "plots")
    assert [path.name for path in paths] == ["pass_at_k.png", "solve_counts.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
