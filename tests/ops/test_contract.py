"""What every op promises besides its numbers: PyTorch's own checks of an op, errors that name argument, rule and value,
no second derivative, and the choice of the instruction set.
"""

import os
import subprocess
import sys

import pytest
import torch

from entcov import _cpu, ops
from tests.support.row_kinds import rows, targets

IGNORE = -100
T, V = 5, 37


def arguments(dtype=torch.float32):
    """op name -> good arguments by name; logits have a row stride of their own, one row is ignored."""
    logits = rows("gaussian", T, V + 3, dtype)[:, 1 : V + 1]
    target = targets(logits.contiguous())
    target[2] = IGNORE
    stats = ops.row_stats(logits, target, 0, V, 0.7, False, IGNORE)
    old = rows("ties", T, V, dtype)
    mask = torch.tensor([True, True, False, True, True])
    pair_stats = ops.covariance_stats(old, logits, 0, V, 0.7, mask)
    grads = torch.randn(3, T).unbind(0)
    place = {"vocab_start": 0, "vocab_size": V, "temperature": 0.7}
    rest = {"target": target, "ignore_index": IGNORE}
    gradient = {
        "stats": stats,
        "grad_logprob": grads[0],
        "grad_entropy": grads[1],
        "grad_clamped": grads[2],
        "clamp": torch.rand(T, 4),
    }
    pair_gradient = {
        "stats": pair_stats,
        "grad_covariance": grads[0],
        "grad_entropy_change": grads[1],
        "grad_kl": grads[2],
        "row_mask": mask,
    }
    return {
        "row_stats": {"logits": logits, "moments": True, **place, **rest},
        "merge_row_stats": {"shards": torch.stack((stats, stats)), "temperature": 0.7, **rest},
        "logits_grad": {"logits": logits, **gradient, **place, **rest},
        "logits_grad_": {"logits": logits.clone(), **gradient, **place, **rest},
        "covariance_stats": {"logits_old": old, "logits_new": logits, "row_mask": mask, **place},
        "merge_covariance_stats": {"shards": pair_stats[None], "row_mask": mask, "temperature": 0.7},
        "logit_covariance_grad": {"logits_old": old, "logits_new": logits, **pair_gradient, **place},
    }


NAMES = list(arguments())


def call(name, **changes):
    return getattr(ops, name)(**{**arguments()[name], **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(ops, name), (), arguments(dtype)[name])


@pytest.mark.parametrize("name", ["logits_grad", "logit_covariance_grad"])
def test_opcheck_without_the_optional_arguments(name):
    optional = {k: None for k in arguments()[name] if k.startswith("grad_") or k in ("clamp", "row_mask")}
    torch.library.opcheck(getattr(ops, name), (), {**arguments()[name], **optional})


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shape_dtype_and_strides_of_the_result(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = call(name)
    with FakeTensorMode() as mode:
        fake_arguments = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments()[name].items()
        }
        fake = getattr(ops, name)(**fake_arguments)
    if real is not None:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# ---- errors ---------------------------------------------------------------------------------------------------------

LOGITS = torch.zeros(T, V)
BAD = [
    ("row_stats", {"logits": LOGITS.double()}, TypeError, "logits must be float32, bfloat16 or float16, got .*float64"),
    ("row_stats", {"logits": LOGITS[0]}, ValueError, r"logits must be \[T, V_local\], got shape \(37,\)"),
    ("row_stats", {"logits": LOGITS.t()}, ValueError, r"logits must have stride 1 along the vocabulary"),
    ("row_stats", {"target": torch.zeros(T)}, TypeError, "target must be torch.int64, got torch.float32"),
    ("row_stats", {"target": torch.zeros(4).long()}, ValueError, r"target must have shape \(5,\).*got \(4,\)"),
    ("row_stats", {"target": torch.zeros(10).long()[::2]}, ValueError, r"target must be contiguous"),
    (
        "row_stats",
        {"target": torch.tensor([0, 37, 1, -1, 2])},
        ValueError,
        r"in \[0, vocab_size = 37\): 2 of 5 are not, first 37 at row 1",
    ),
    ("row_stats", {"temperature": 0.0}, ValueError, "temperature must be positive and finite .*, got 0.0"),
    ("row_stats", {"temperature": float("nan")}, ValueError, "temperature must be positive and finite .*, got nan"),
    ("row_stats", {"vocab_start": -1}, ValueError, "vocab_start must be >= 0, got -1"),
    ("row_stats", {"vocab_size": 0}, ValueError, "vocab_size must be >= 1, got 0"),
    ("merge_row_stats", {"shards": torch.zeros(T, 4)}, ValueError, r"shards must be \[R >= 1, T, 4 or 7\]"),
    ("merge_row_stats", {"shards": torch.zeros(0, T, 4)}, ValueError, r"got \(0, 5, 4\)"),
    ("merge_row_stats", {"shards": torch.zeros(2, T, 4).double()}, TypeError, "shards must be float32"),
    ("merge_row_stats", {"shards": torch.zeros(2, 4, T).mT}, ValueError, "shards must be contiguous within a shard"),
    ("merge_row_stats", {"shards": torch.zeros(2, 4, 4)}, ValueError, r"target must have shape \(4,\)"),
    ("logits_grad", {"stats": torch.zeros(T, 5)}, ValueError, r"stats must be \[T, 4 or 7\]"),
    ("logits_grad", {"stats": torch.zeros(4, 4)}, ValueError, r"stats must have shape \(5, 4\)"),
    ("logits_grad", {"grad_entropy": torch.zeros(T, 1)}, ValueError, r"grad_entropy must have shape \(5,\)"),
    ("logits_grad", {"grad_logprob": torch.zeros(T).double()}, TypeError, "grad_logprob must be torch.float32"),
    ("logits_grad", {"clamp": None}, ValueError, "clamp must be given with grad_clamped, got None"),
    ("logits_grad_", {"logits": LOGITS[:1].expand(T, V)}, ValueError, "logits must not overlap themselves"),
    ("covariance_stats", {"logits_old": LOGITS.half()}, TypeError, "logits_old must have the dtype of logits_new"),
    ("covariance_stats", {"logits_old": LOGITS[:, 1:]}, ValueError, "logits_old must have the shape of logits_new"),
    ("covariance_stats", {"row_mask": torch.ones(T)}, TypeError, "row_mask must be torch.bool, got torch.float32"),
    ("merge_covariance_stats", {"shards": torch.zeros(1, T, 7)}, ValueError, r"shards must be \[R >= 1, T, 8\]"),
    ("logit_covariance_grad", {"grad_kl": torch.zeros(4)}, ValueError, r"grad_kl must have shape \(5,\)"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_errors_name_argument_rule_and_value(name, change, error, message):
    with pytest.raises(error, match=message):
        call(name, **change)


def test_writing_over_logits_that_require_grad_is_refused():
    logits = LOGITS.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="logits_grad_ writes over its logits, and these require grad"):
        call("logits_grad_", logits=logits)
    with torch.no_grad():
        call("logits_grad_", logits=logits)


def test_autograd_notices_logits_that_were_written_over():
    weight = torch.ones(T, V, requires_grad=True)
    logits = weight * 2
    loss = (logits * logits).sum()  # saves the logits
    with torch.no_grad():
        call("logits_grad_", logits=logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


DERIVATIVE = {
    "row_stats": ("logits", "row_stats is a building block without a derivative; entcov.token_stats has one"),
    "merge_row_stats": ("shards", "merge_row_stats is a building block .* entcov.token_stats has one"),
    "logits_grad": ("logits", "entcov: token_stats has no second derivative"),
    "covariance_stats": ("logits_new", "covariance_stats is a building block .* entcov.logit_covariance has one"),
    "merge_covariance_stats": ("shards", "merge_covariance_stats is a building block"),
    "logit_covariance_grad": ("logits_new", "entcov: logit_covariance has no second derivative"),
}


@pytest.mark.parametrize("name", DERIVATIVE)
def test_a_derivative_of_an_op_is_a_clear_error(name):
    argument, message = DERIVATIVE[name]
    value = arguments()[name][argument].clone().requires_grad_()
    out = call(name, **{argument: value})
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()


# ---- instruction sets -----------------------------------------------------------------------------------------------


def run_with_isa(isa):
    command = [sys.executable, "-c", "from entcov import ops; print(ops.isa())"]
    return subprocess.run(command, env={**os.environ, "ENTCOV_ISA": isa}, capture_output=True, text=True)


def test_entcov_isa_forces_the_instruction_set():
    assert run_with_isa("baseline").stdout.strip() == "baseline"


def test_an_unknown_instruction_set_is_an_error():
    assert "ENTCOV_ISA must be avx512, avx2 or baseline" in run_with_isa("avx1024").stderr


def test_instruction_sets_agree(isa):
    """To rounding: the tests against float64 leave room, two vector widths with one error in common would not."""
    logits = rows("gaussian", T, 5003)
    target = targets(logits)
    stats = ops.row_stats(logits, target, 0, 5003, 1.0, True, IGNORE)
    assert ops.isa() == isa
    _cpu.set_isa("baseline")
    torch.testing.assert_close(stats, ops.row_stats(logits, target, 0, 5003, 1.0, True, IGNORE), rtol=1e-6, atol=0)
