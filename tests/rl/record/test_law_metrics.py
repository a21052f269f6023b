"""The law's metrics while a run goes on: from which step on, that they are the fit so far, and a resumed run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from entcov.law import entropy_lasts
from entcov.rl.record.law_metrics import LawMetrics


def rows(steps, entropy=lambda step: 0.8 * step**-0.5):
    draw = np.random.default_rng(0)
    return [
        {"step": step, "actor/entropy_response_mean": float(entropy(step)), "actor/entropy": 9.0,
         "critic/score/mean": 1 - 0.4 * math.exp(entropy(step)) + 0.01 * draw.normal()}
        for step in range(1, steps + 1)
    ]  # fmt: skip


def test_they_are_the_fit_to_all_steps_so_far():
    law, found = LawMetrics(), []
    assert law.observe(0, {"val-core/a/acc/mean@1": 0.5}) == {}
    run = rows(30)
    for row in run:
        found.append(law.observe(row["step"], row))
    assert not any(found[:19]) and all(found[19:])
    h = np.array([row["actor/entropy_response_mean"] for row in run])
    slope, level = np.polyfit(np.exp(h), [row["critic/score/mean"] for row in run], 1)
    last = found[-1]
    assert (last["law/a"], last["law/b"], last["law/ceiling"]) == pytest.approx((-slope, level, level + slope))
    lasts = entropy_lasts(np.arange(1, 31), h)
    assert (last["law/entropy_left"], last["law/gone_step"]) == (lasts.left, lasts.step)
    assert law.observe(30, run[-1]) == last  # recorded a second time


def test_a_resumed_run_has_the_same_ones():
    straight, cut = LawMetrics(), LawMetrics(rows(25))
    for row in rows(30):
        expected = straight.observe(row["step"], row)
    for row in rows(30)[25:]:
        found = cut.observe(row["step"], row)
    assert found == expected


def test_what_cannot_be_said_is_left_out():
    flat, rising = LawMetrics(rows(25, lambda step: 0.5)), LawMetrics(rows(25, lambda step: 0.5 + step / 100))
    row = rows(26, lambda step: 0.5 + step / 100)[-1]
    found = rising.observe(26, row)
    assert "law/gone_step" not in found and found["law/entropy_left"] > 1
    assert flat.observe(26, rows(26, lambda step: 0.5)[-1]) == {}
    assert rising.observe(27, row | {"actor/entropy_response_mean": math.nan}) == {}
    zero = LawMetrics(rows(25, lambda step: max(0.0, (step - 10) / 100)))
    assert zero.observe(26, row).keys() == {"law/a", "law/b", "law/ceiling"}
