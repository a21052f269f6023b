"""Logits and LM heads as DTensors on two gloo ranks, against the whole vocabulary in float64."""

import json

import pytest
import torch.multiprocessing as mp

from tests.support import dtensor_cases


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtensor")
    mp.spawn(dtensor_cases.main, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", dtensor_cases.CASES)
def test_on_two_ranks(outcome, name):
    for rank in range(2):
        assert outcome[rank][name] is None, f"rank {rank}: {outcome[rank][name]}"
