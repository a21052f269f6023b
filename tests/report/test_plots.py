"""Plots: the numbers in the figures, their labels, and real PNG files; and the intervals behind the bands."""

import math
import random

import numpy as np
import pytest
from matplotlib import image

from entcov.intervals import mean_interval, student_t
from entcov.report.plots import build_figures, plot_runs, smooth, smoothing_window


def run(seed, floor=0.1, steps=60, **extra):
    draw = random.Random(seed)
    rows = [{"step": 0, "val-core/sums/acc/mean@1": 0.25, "val-core/sums/acc/best@8": 0.5}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "actor/entropy": floor + math.exp(-step / 15) + draw.gauss(0, 0.01),
            "critic/score/mean": 0.3 + step / 200 + draw.gauss(0, 0.02),
            "response_length/mean": 14 + draw.gauss(0, 0.5),
            "actor/cov_mean": 0.02 + draw.gauss(0, 0.003),
            "actor/cov_p999": 4 + draw.gauss(0, 0.3),
        }
        if step % 20 == 0:
            row |= {"val-core/sums/acc/mean@1": 0.3 + step / 100, "val-core/words/acc/mean@1": 0.1 + step / 100}
        rows.append(row | extra)
    return rows


def lines(ax):
    """Drawn lines by the id that names them."""
    return {line.get_gid(): line for line in ax.lines}


def test_files_are_real_pictures(tmp_path):
    runs = {"none": [run(i) for i in range(4)], "clip_cov": [run(i, 0.4) for i in range(4, 8)], "aent": run(8)}
    paths = plot_runs(runs, tmp_path / "plots")
    names = ["entropy.png", "reward.png", "response_length.png", "covariance.png", "overview.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
        colours, counts = np.unique(np.rint(pixels * 255).astype(int).reshape(-1, 3), axis=0, return_counts=True)
        assert len(colours) > 50
        drawn = {tuple(colour) for colour, count in zip(colours.tolist(), counts, strict=True) if count > 200}
        assert {(0, 0, 0), (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= drawn  # every label's line
        assert (colours[counts.argmax()] == 255).all()  # on white


@pytest.mark.parametrize("count", [1, 4, 20])
def test_the_legend_covers_no_panel_and_is_in_the_figure(count):
    names = [f"positive_advantage_reweighting {i}" for i in range(count)]
    for figure in build_figures({name: [run(i, steps=5), run(i, steps=5)] for i, name in enumerate(names)}).values():
        figure.canvas.draw()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()][:count] == [f"{name} (2 seeds)" for name in names]
        box, whole = legend.get_window_extent(), figure.bbox
        assert all(box.y0 >= ax.get_tightbbox().y1 for ax in figure.axes)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1


def test_labels_and_units():
    figures = build_figures({"none": [run(0), run(1), run(2)], "clip_cov": run(3)})
    labels = {
        name: [(ax.get_title(loc="left"), ax.get_ylabel()) for ax in figure.axes] for name, figure in figures.items()
    }
    entropy, covariance = (
        ("Policy entropy", "nats per token"),
        "Token covariance of log-probability and advantage, mean",
    )
    assert labels["entropy"] == [entropy]
    assert labels["reward"] == [("Reward", "mean of the step's rollouts")]
    assert labels["response_length"] == [("Response length", "tokens")]
    assert labels["covariance"] == [(covariance, "nats"), ("Its 99.9th percentile over tokens", "nats")]
    assert labels["overview"] == [entropy, *labels["reward"], *labels["response_length"], (covariance, "nats")]
    for figure in figures.values():
        assert figure.axes[-1].get_xlabel() == "step"
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts[:2] == ["none (3 seeds)", "clip_cov"]
        assert figure.get_supxlabel().endswith("faint: every step; faint: the seeds")
    reward = [text.get_text() for text in figures["reward"].legends[0].get_texts()]
    assert reward[2:] == ["held-out accuracy, mean@1", "held-out accuracy, best@8"]


def test_mean_band_and_markers_have_the_right_values():
    """A short series is not smoothed, so that what is drawn can be computed by hand."""
    values = np.array([[1.0, 0.5, 0.2], [0.8, 0.7, 0.3], [0.9, 0.3, 0.1], [0.7, 0.6, 0.4], [0.6, 0.4, 0.5]])
    runs = [
        [{"step": s + 1, "actor/entropy": v, "critic/score/mean": v} for s, v in enumerate(one)]
        + [
            {
                "step": 3,
                "val-core/a/acc/mean@4": 0.5,
                "val-core/b/acc/mean@4": 0.1 * seed,
                "val-core/a/acc/best@4/mean": 0.9,
            }
        ]
        for seed, one in enumerate(values)
    ]
    figures = build_figures({"none": runs})
    (entropy,) = figures["entropy"].axes
    assert np.allclose(lines(entropy)["none"].get_xdata(), [1, 2, 3])
    assert np.allclose(lines(entropy)["none"].get_ydata(), values.mean(axis=0))
    half = 2.776445105198 * values.std(axis=0, ddof=1) / math.sqrt(5)
    band = entropy.collections[0].get_paths()[0].vertices
    for step, (low, high) in enumerate(
        zip(values.mean(axis=0) - half, values.mean(axis=0) + half, strict=True), start=1
    ):
        at = band[band[:, 0] == step, 1]
        assert np.isclose(at.min(), low) and np.isclose(at.max(), high)
    (reward,) = figures["reward"].axes
    assert np.allclose(lines(reward)["mean@4:none"].get_xydata(), [[3, 0.35]])
    assert np.allclose(lines(reward)["best@4:none"].get_xydata(), [[3, 0.9]])


def test_a_single_noisy_run_is_smoothed_and_stays_visible():
    rows = run(0, steps=100)
    ax = build_figures({"tiny": rows})["reward"].axes[0]
    raw = [row["critic/score/mean"] for row in rows if "critic/score/mean" in row]
    assert np.array_equal(lines(ax)["every step:tiny"].get_ydata(), raw)
    smoothed = lines(ax)["tiny"].get_ydata()
    assert np.isclose(smoothed[50], np.mean(raw[48:53])) and np.isclose(smoothed[-1], np.mean(raw[-3:]))
    assert not ax.collections  # one run has no interval


def test_few_seeds_are_shown_as_they_are():
    """The interval of so few values is many standard errors wide: as a band it would hide the curves."""
    figure = build_figures({"none": [run(0, steps=10), run(1, steps=10)]})["entropy"]
    ax = figure.axes[0]
    own = [[row["actor/entropy"] for row in run(seed, steps=10)[1:]] for seed in (0, 1)]
    assert np.allclose(lines(ax)["seed 0:none"].get_ydata(), own[0])
    assert np.allclose(lines(ax)["seed 1:none"].get_ydata(), own[1])
    assert np.allclose(lines(ax)["none"].get_ydata(), np.mean(own, axis=0))
    assert not ax.collections and figure.get_supxlabel() == "faint: the seeds"


def test_steps_that_only_some_seeds_have_are_not_averaged():
    ax = build_figures({"none": [run(0, steps=30), run(1, steps=10)]})["entropy"].axes[0]
    assert lines(ax)["none"].get_xdata().tolist() == list(range(1, 11))


def test_nan_and_missing_metrics(tmp_path):
    rows = [
        {"step": s, "actor/entropy": math.nan if s == 2 else 0.5, "response_length/mean": math.nan} for s in range(5)
    ]
    figures = build_figures({"a": rows, "b": run(0)})
    assert lines(figures["entropy"].axes[0])["a"].get_xdata().tolist() == [0, 1, 3, 4]
    assert [path.name for path in plot_runs({"a": rows}, tmp_path)] == ["entropy.png", "overview.png"]
    texts = [text.get_text() for ax in build_figures({"a": rows})["overview"].axes for text in ax.texts]
    assert texts == ["critic/score/mean:\nno values", "response_length/mean:\nno values", "actor/cov_mean:\nno values"]


def test_many_labels_stay_distinguishable():
    ax = build_figures({f"run {i}": run(i, steps=5) for i in range(16)})["entropy"].axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 16


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="runs must hold at least one run, got none"):
        plot_runs({}, tmp_path)
    for empty in ([], [[]], [run(0), []]):
        with pytest.raises(ValueError, match="run 'none' must have at least one row for every seed"):
            plot_runs({"none": empty}, tmp_path)
    with pytest.raises(ValueError, match=r"finite values of at least one of actor/entropy, .*; got \['a', 'step'\]"):
        plot_runs({"none": [{"step": 1, "a": 1}]}, tmp_path)


def test_smoothing_by_hand():
    assert [smoothing_window(n) for n in (1, 39, 40, 60, 100, 400)] == [1, 1, 3, 3, 5, 21]
    assert np.allclose(smooth(np.array([1.0, 2.0, 6.0, 4.0]), 3), [1.5, 3, 4, 5])
    assert np.array_equal(smooth(np.array([1.0, 2.0]), 1), [1.0, 2.0])


# Published tables of Student's t, two-sided.
@pytest.mark.parametrize(
    "degrees, level, expected",
    [(1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.95, 3.18245), (4, 0.95, 2.77645), (5, 0.95, 2.57058),
     (9, 0.95, 2.26216), (10, 0.95, 2.22814), (30, 0.95, 2.04227), (120, 0.95, 1.97993), (1, 0.5, 1.0),
     (2, 0.99, 9.92484), (7, 0.9, 1.89458)],
)  # fmt: skip
def test_student_t_matches_the_tables(degrees, level, expected):
    assert student_t(degrees, level) == pytest.approx(expected, rel=3e-6)


def test_mean_interval_by_hand():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302652729749 / math.sqrt(3)))
    mean, half = mean_interval([5.0])
    assert mean == 5.0 and math.isnan(half)
    assert mean_interval([2.0, 2.0]) == (2.0, 0.0)
    for call, message in [
        (lambda: mean_interval([]), "values must hold at least one number"),
        (lambda: student_t(0), "degrees must be >= 1, got 0"),
        (lambda: student_t(2, 95), r"level must be a fraction in \(0, 1\), got 95"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
