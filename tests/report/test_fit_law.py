"""`fit-law`: which points of a run it takes, its numbers against another fit, its files, its errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib import image

from entcov.cli import main
from entcov.report.fit_law import columns, fit_runs, read_points, run_law, tables
from entcov.rl.record.metrics import RunLogger


def write_run(folder, *, steps=60, a=0.4, power=0.5, entropy=None, budget=None, seed=0):
    """A run whose every number is known: H falls as a power of the step, held-out H is 2 H."""
    draw = np.random.default_rng(seed)
    with RunLogger(folder, tensorboard=False) as logger:
        for step in range(steps + 1):
            h = 0.8 * (step + 1) ** -power if entropy is None else entropy  # of the policy after `step`
            row = {}
            if step:
                before = 0.8 * step**-power if entropy is None else entropy
                row = {
                    "actor/entropy_response_mean": before, "actor/entropy": before / 2,
                    "critic/score/mean": 1 - a * math.exp(before) + 0.01 * draw.normal(),
                }  # fmt: skip
            if step % 5 == 0:
                row |= {"val-aux/my/set/entropy/mean": 2 * h, "val-core/my/set/acc/mean@4": 1 - 0.1 * math.exp(2 * h)}
                row |= {"val-core/my/set/acc/best@4/mean": 0.9}
            logger.log(step, row)
    if budget is not None:
        (folder / "config.yaml").write_text(f"steps: {budget}\nmodel: {{path: '${{oc.env:NO_SUCH_VARIABLE}}'}}\n")
    return folder


def test_the_command_prints_tables_and_writes_numbers_and_a_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / "plain", budget=5000), write_run(tmp_path / "other", a=0.3, budget=60)]
    out = tmp_path / "law"
    assert main(["fit-law", *map(str, runs), "--fraction", "0.25", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("plain", "other", "0.009 (mathematics) and 0.012 (code)", "first 25%", "Difference to plain"):
        assert text in shown
    found = json.loads((out / "law.json").read_text())
    assert (found["entropy"], found["reward"]) == ("actor/entropy_response_mean", "critic/score/mean")
    plain = found["runs"]["plain"]
    h = 0.8 * np.arange(1, 61) ** -0.5
    r = read_points(runs[0], *columns("response_mean")).reward
    slope, level = np.polyfit(np.exp(h), r, 1)
    assert (plain["a"], plain["b"]) == pytest.approx((-slope, level)) and abs(plain["a"] - 0.4) < plain["a_half_width"]
    slope, level = np.polyfit(np.exp(h[:15]), r[:15], 1)
    error = level + slope * np.exp(h[15:]) - r[15:]
    assert plain["forecast"]["rmse"] == pytest.approx(math.sqrt(np.mean(error**2)))
    assert plain["forecast"]["bias"] == pytest.approx(error.mean()) and plain["forecast"]["fitted_to"] == 15
    start = 0.8 * 3**-0.5  # the median of five
    assert plain["gone_step"] == pytest.approx((0.8 / math.log1p(0.1 * math.expm1(start))) ** 2)
    assert plain["steps"] == 5000 > plain["gone_step"] > 60 == found["runs"]["other"]["steps"]
    assert f"{plain['gone_step']:.0f} *" in shown  # a warning for the run whose budget is longer than its entropy lasts
    assert f"{found['runs']['other']['gone_step']:.0f} *" not in shown.split("other")[-2]
    pixels = image.imread(out / "law.png")[..., :3]
    drawn, counts = np.unique(np.rint(pixels * 255).astype(int) @ [1 << 16, 1 << 8, 1], return_counts=True)
    assert pixels.shape[:2] == (780, 1950) and {0x000000, 0xD55E00} <= set(drawn[counts > 200].tolist())
    assert not list(out.glob(".tmp*"))


def test_an_evaluation_goes_with_the_policy_that_the_next_step_begins_with(tmp_path):
    run = write_run(tmp_path / "run", steps=60)
    held = read_points(run, *columns("heldout:my/set"))
    assert held.at.tolist() == list(range(1, 62, 5))
    assert held.entropy == pytest.approx(1.6 * held.at**-0.5) and held.reward == pytest.approx(
        1 - 0.1 * np.exp(held.entropy)
    )
    mixed = read_points(run, *columns("token_mean", "heldout:my/set"))
    assert mixed.at.tolist() == list(range(1, 61, 5))  # no step begins with the last policy
    assert mixed.entropy == pytest.approx(0.4 * mixed.at**-0.5)
    assert mixed.reward == pytest.approx(1 - 0.1 * np.exp(4 * mixed.entropy))
    assert (held.budget, mixed.budget) == (60, 60)


def test_a_first_part_that_is_too_short_leaves_the_forecast_out(tmp_path):
    run = run_law(read_points(write_run(tmp_path / "run", steps=40), *columns("response_mean")), 0.15)
    assert run.forecast is None and run.law.points == 40
    pages = tables({"run": run}, 0.15)
    assert pages[1][2][0][:3] == ["run", "6", "a fit needs 8 points with different entropies"] and len(pages) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy": "tokens_mean"}, "entropy must be response_mean, .* got 'tokens_mean'; did you mean token_mean?"),
        ({"reward": "heldout"}, "reward must be train or heldout:SOURCE, got 'heldout'"),
        ({"fraction": 15}, "fraction must be in .*not a percent"),
        ({"fraction": 0.0}, "fraction must be greater than 0, got 0"),
        ({"fraction": 0.95}, r"fraction must be in \[0, 0.9\], got 0.95"),
        ({"entropy": "heldout:aime"}, "no step has the metric val-aux/aime/entropy/mean; it is measured with "
         "eval.entropy true. Logged are actor/entropy, actor/entropy_response_mean, .*val-aux/my/set/entropy/mean"),
        ({"reward": "heldout:aime"}, "no step has the metric val-core/aime/acc/mean@k. Logged are .*my/set/acc/mean@4"),
        ({"entropy": "heldout:my/set", "steps": 30}, "at least 8 points with val-aux/my/set/entropy/mean .*, got 7"),
        ({"call": {"entropy": 0.5}}, "run: entropy must vary for a fit"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path, options, message):
    run = write_run(tmp_path / "run", steps=options.pop("steps", 60), **options.pop("call", {}))
    with pytest.raises(ValueError, match=message):
        fit_runs({"run": run}, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
