"""The list of bad inputs that a user is most likely to bring, each with the error it gets.

One line each, from the op to the run's folder; the details are tested beside each part.
"""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from entcov import Tokens, logit_covariance, policy_loss, token_stats
from entcov.controls import make_control, select
from entcov.covariance import token_covariance
from entcov.losses import PolicyLossConfig
from entcov.rl.checkpoint import CheckpointError, load_latest, save_checkpoint
from entcov.rl.data import load_rows
from entcov.rl.metrics import RunLogger, read_metrics
from tests.thread_ranks import ThreadRanks

REWARD = {"style": "exact", "ground_truth": "1"}
LOGITS, TARGET = torch.linspace(-3, 3, 24).view(3, 8), torch.tensor([1, 2, 3])


def with_row(row: int, value: float) -> torch.Tensor:
    logits = LOGITS.clone()
    logits[row] = value
    return logits


def tokens(mask: list[bool], **fields) -> Tokens:
    ones = torch.ones(len(mask))
    values = {"logprob": -ones, "old_logprob": -ones, "advantage": ones, "loss_mask": torch.tensor(mask)}
    return Tokens(**(values | fields))


BAD_CALLS = {
    "target of another shape": (
        lambda: token_stats(LOGITS, TARGET[:2]),
        ValueError,
        r"target must have the leading shape of logits, \(3,\), got \(2,\)",
    ),
    "logits of float64": (
        lambda: token_stats(LOGITS.double(), TARGET),
        TypeError,
        "logits must be .*got torch.float64",
    ),
    "target of int32": (
        lambda: token_stats(LOGITS, TARGET.int()),
        TypeError,
        "target must be torch.int64, got torch.int32",
    ),
    "vocabulary not contiguous": (
        lambda: token_stats(LOGITS.t().contiguous().t(), TARGET),
        ValueError,
        "logits .*stride 1",
    ),
    "target outside the vocabulary": (
        lambda: token_stats(LOGITS, torch.tensor([1, 8, 3])),
        ValueError,
        r"target .*8.*",
    ),
    "target in the padding": (
        lambda: token_stats(LOGITS, torch.tensor([1, 2, 7]), vocab_size=7),
        ValueError,
        r"target .*7",
    ),
    "a row that is all -inf": (
        lambda: token_stats(with_row(1, -torch.inf), TARGET),
        ValueError,
        r"1 rows have no finite logit \(first: row 1\)",
    ),
    "percent for fraction, clamp": (
        lambda: token_stats(LOGITS, TARGET, clamp_p=33),
        ValueError,
        r"clamp_p must be in \[0, 1\), a fraction, not percent, got 33",
    ),
    "top_k beyond the vocabulary": (
        lambda: token_stats(LOGITS, TARGET, top_k=9),
        ValueError,
        "top_k must be in .*8.*got 9",
    ),
    "temperature 0": (
        lambda: token_stats(LOGITS, TARGET, temperature=0.0),
        ValueError,
        "temperature must be positive.*got 0",
    ),
    "covariance of other shapes": (
        lambda: logit_covariance(LOGITS, LOGITS[:2]),
        ValueError,
        "logits_old must have the shape of logits_new",
    ),
    "second derivative": (
        lambda: second_derivative(),
        RuntimeError,
        "second derivative",
    ),
    "no token under the mask": (
        lambda: policy_loss(tokens([False, False])),
        ValueError,
        "loss_mask must have a True token",
    ),
    "no token under the mask, selection": (
        lambda: token_covariance(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.bool)),
        ValueError,
        "mask must have a True token on at least one rank",
    ),
    "NaN advantage": (
        lambda: policy_loss(tokens([True, True], advantage=torch.tensor([1.0, torch.nan]))),
        ValueError,
        "advantage.*finite",
    ),
    "NaN log-probability in a selection": (
        lambda: select(
            [make_control("kl_cov")],
            [tokens([True, True], logprob=torch.full((2,), torch.nan), token_id=torch.arange(2))],
            step=0,
            config=PolicyLossConfig(),
        ),
        ValueError,
        "must be finite",
    ),
    "a field that the control needs": (
        lambda: policy_loss(tokens([True]), controls=[make_control("entropy_bonus", entropy_coef=0.1)]),
        ValueError,
        r"tokens\.entropy must be given",
    ),
    "percent for fraction, KL-Cov": (
        lambda: make_control("kl_cov", kl_cov_ratio=20),
        ValueError,
        "kl_cov_ratio.*20.*not a percent",
    ),
    "unknown control": (lambda: make_control("clip_cow"), ValueError, "control name must be one of .*got 'clip_cow'"),
}


def second_derivative() -> None:
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_stats(logits, TARGET).entropy.sum(), logits, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_nan_logits_stay_in_their_row():
    """Not an error of the op: it may not read values on an accelerator. The loss and the trainer stop at the NaN."""
    stats = token_stats(with_row(1, torch.nan), TARGET, clamp_p=0.3, moments=True)
    for value in stats:
        assert value.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="logprob.*finite"):
        policy_loss(tokens([True] * 3, logprob=stats.logprob))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"temperature": 2.0}, "temperature"),
        ({"clamp_p": 0.3}, "same outputs .moments, clamp."),
        ({"vocab_size": 15}, "vocab_size|vocabulary"),
        ({"target": torch.tensor([1, 2, 4])}, "target"),
        ({"logits": LOGITS.bfloat16()}, "dtype"),
        ({"logits": LOGITS[:2], "target": TARGET[:2]}, "number of tokens|T ="),
    ],
)
def test_ranks_that_call_differently(monkeypatch, other, message):
    ranks = ThreadRanks(2, monkeypatch)

    def call(rank):
        arguments = {"logits": LOGITS, "target": TARGET} | (other if rank == 1 else {})
        with pytest.raises(RuntimeError, match=message) as error:
            token_stats(arguments.pop("logits"), arguments.pop("target"), group=ranks, **arguments)
        return str(error.value)

    ranks.run(call)  # both ranks get the error


def test_corrupt_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": lambda path: path.write_bytes(bytes(1000))}, {"x": 1}, keep=2)
    save_checkpoint(tmp_path, 2, {"model": lambda path: path.write_bytes(bytes(1000))}, {"x": 2}, keep=2)
    (tmp_path / "step_2" / "model").write_bytes(bytes(999) + b"x")
    with pytest.raises(CheckpointError, match=r"step_2/model is not what was written.*Step 1 is intact"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "line 2: .*JSON"),
        ("[1]", "line 2: "),
        (json.dumps({"data_source": "x", "reward_model": REWARD, "prompt": "text"}), "line 2: prompt"),
        (json.dumps({"data_source": "x", "reward_model": REWARD, "prompt": [{"role": "user"}]}), "line 2: prompt"),
        (json.dumps({"data_source": "x", "prompt": [{"role": "user", "content": "q"}]}), "line 2: reward_model"),
    ],
)
def test_malformed_dataset_row(tmp_path, row, message):
    good = {"data_source": "x", "prompt": [{"role": "user", "content": "q"}], "reward_model": REWARD}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + row + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: 1 malformed rows:\n  " + message):
        load_rows(path)


def test_full_disk(tmp_path, monkeypatch):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"x": 1.0})
        with monkeypatch.context() as full:

            def write(fd, data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            full.setattr(os, "write", write)
            with pytest.raises(OSError, match=r"disk full: cannot write .*metrics\.jsonl; step 2 is not recorded"):
                logger.log(2, {"x": 2.0})
        logger.log(3, {"x": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
