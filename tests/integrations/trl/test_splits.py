"""What `python -m benchmarks splits` shows of TRL: its choice moves with the micro-batch, ours does not."""

import pytest

pytest.importorskip("trl")

from benchmarks.splits import far, summary
from benchmarks.splits_trl import OURS, PAIRS, THEIRS, WHO, step


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    return {who: {str(rows): step(folder, who, rows) for rows in (8, 2)} for who in WHO}


def test_trl_s_choice_moves_with_the_micro_batch_and_ours_does_not(found):
    theirs, ours = found[THEIRS], found[OURS]
    assert theirs["2"].chosen != theirs["8"].chosen and abs(theirs["2"].norm - theirs["8"].norm) > 0.1
    assert ours["2"].chosen == ours["8"].chosen and ours["2"].norm == pytest.approx(ours["8"].norm, rel=1e-5)
    assert far(theirs["2"], theirs["8"]) > 1e-3 and far(ours["2"], ours["8"]) < 1e-6


def test_with_one_micro_batch_both_are_equal(found):
    (equal,) = summary(found, PAIRS)["equal"].values()
    assert equal["chosen"] == [equal["same"]] * 2 and equal["same"] > 1
    assert equal["norms"][0] == pytest.approx(equal["norms"][1], rel=1e-5)
    assert equal["parameters"] < 1e-6 < 1e-3 < equal["moved"]
