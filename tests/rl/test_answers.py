"""What responses answer: by the data source's rule, else by their texts; kept with the solve counts."""

from __future__ import annotations

import json

import pytest

from entcov.diagnostics import Calibration
from entcov.rl.answers import Answers
from entcov.rl.evaluation import summarize
from entcov.rl.solve_counts import SolveCounts, read_solve_counts, write_solve_counts
from entcov.rl.types import Example, Prompt, Rollout


def responses(source: str, uid: int, *texts: str, truth: str = "4") -> list[Rollout]:
    prompt = Prompt(uid, Example(source, (), truth), (1,))
    return [
        Rollout(prompt, i, [3], [0.0], True, 0, text=text, reward=float(text.endswith(truth)))
        for i, text in enumerate(texts)
    ]


GSM8K = [
    *responses("openai/gsm8k", 0, "so #### 4", "it is #### 4.0", "#### 5", "no idea"),  # 4 and 4.0 are one answer
    *responses("openai/gsm8k", 1, "#### 7", "#### 7", "and #### 7", "#### 4"),
]
OWN = responses("mine", 2, "4", "so 4", "4", "4")


def test_answers_of_a_rule_and_texts_without_one():
    """Confidences 2/4 and 3/4; "4.0" counts as wrong here, so that half of the first prompt's answer is right."""
    found = Answers.of(GSM8K)
    assert found == Answers((2 + 2) / 2, Calibration(((1, 0.5, 0.5), (1, 0.75, 0.0))))
    assert found.calibration.ece == pytest.approx(0.75 / 2)
    assert Answers.of(OWN) == Answers(2.0, None)
    both = Answers.of([*OWN, *GSM8K])
    assert both == Answers((2 + 2 + 2) / 3, found.calibration)  # texts say nothing about confidence
    reordered = Answers.of([*GSM8K[4:], *OWN, *GSM8K[:4]])
    assert reordered == both


def test_an_evaluation_logs_and_keeps_them(tmp_path):
    own, ruled = summarize([*OWN, *GSM8K])
    name = "openai/gsm8k"
    metrics = ruled.metrics() | own.metrics()
    assert metrics[f"val-core/{name}/acc/maj@4/mean"] == 0.25 and metrics[f"val-aux/{name}/distinct_answers"] == 2
    assert metrics[f"val-aux/{name}/calibration/confidence"] == 0.625
    assert metrics[f"val-aux/{name}/calibration/ece"] == pytest.approx(0.375)
    assert metrics["val-aux/mine/distinct_answers"] == 2
    assert not [key for key in metrics if key.startswith("val-aux/mine/calibration") or "mine/acc/maj" in key]
    write_solve_counts(tmp_path, 3, [*OWN, *GSM8K])
    found = read_solve_counts(tmp_path)[3]
    assert {source: counts.answers for source, counts in found.items()} == {
        "mine": Answers.of(OWN), name: Answers.of(GSM8K),
    }  # fmt: skip
    one = summarize(OWN[:1])[0]  # one response each has nothing to compare
    assert one.solved.answers is None and not [key for key in one.metrics() if "distinct" in key]
    state = {"samples": 4, "histogram": [0, 0, 0, 0, 1], "solved": [4]}  # of earlier versions
    assert SolveCounts.from_state(json.loads(json.dumps(state))) == SolveCounts(4, (0, 0, 0, 0, 1), (4,))
