"""What `python -m benchmarks splits` shows of verl: its choices move with the micro-batch, ours do not."""

import pytest

pytest.importorskip("verl")

from benchmarks.splits import far, summary
from benchmarks.splits_verl import PAIRS, WHO, step


@pytest.fixture(scope="module")
def found(model):
    return {who: {str(rows): step(model, who, rows) for rows in (8, 1)} for who in WHO}


@pytest.mark.parametrize("who", [who for who in WHO if who.startswith("verl")])
def test_verls_choice_moves_with_the_micro_batch(found, who):
    whole, single = found[who]["8"], found[who]["1"]
    assert whole.chosen and single.chosen != whole.chosen
    assert abs(single.norm - whole.norm) > 1e-2 * whole.norm and far(single, whole) > 1e-5


def test_verls_clip_cov_chooses_nothing_in_micro_batches_of_one(found):
    """A response has one advantage, so its covariance with the log-probability is 0."""
    assert found["verl clip_cov"]["1"].chosen == found["verl clip_cov, no draw"]["1"].chosen == set()


@pytest.mark.parametrize("who", [who for who in WHO if who.startswith("entcov")])
def test_ours_does_not(found, who):
    whole, single = found[who]["8"], found[who]["1"]
    assert whole.chosen and single.chosen == whole.chosen
    assert single.norm == pytest.approx(whole.norm, rel=1e-5) and far(single, whole) < 1e-6


def test_with_one_micro_batch_both_are_equal(found):
    for equal in summary(found, PAIRS)["equal"].values():
        assert equal["chosen"] == [equal["same"]] * 2 and equal["same"] > 1
        assert equal["norms"][0] == pytest.approx(equal["norms"][1], rel=1e-5)
        assert equal["parameters"] < 1e-6 < 1e-4 < equal["moved"]
