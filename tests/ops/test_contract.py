"""What every op promises besides its numbers: PyTorch's own checks of an op, errors that name argument, rule and value,
no second derivative, and the choice of the instruction set.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entcov import _cpu
from entcov.ops import logit_covariance_grad, logits_grad, row_stats
from entcov.ops.core import RowSpec
from entcov.ops.core import isa as isa_of_the_kernels
from entcov.ops.message import message
from tests.support.row_kinds import rows, targets

IGNORE = -100
T, V = 5, 37


def arguments(dtype=torch.float32):
    """op name -> good arguments by name; logits have a row stride of their own, one row is ignored."""
    logits = rows("gaussian", T, V + 3, dtype)[:, 1 : V + 1]
    target = targets(logits.contiguous())
    target[2] = IGNORE
    spec, pair_spec = (dict(zip(RowSpec._fields, RowSpec(0, V, 0.7, IGNORE)[:n], strict=False)) for n in (4, 3))
    stats = torch.ops.entcov.row_stats(logits, target, *spec.values(), False, True)[0]
    old = rows("ties", T, V, dtype)
    mask = torch.tensor([True, True, False, True, True])
    pair_stats = torch.ops.entcov.covariance_stats(old, logits, mask, *pair_spec.values(), True)[0]
    grads = list(torch.randn(3, T).unbind(0))
    gradient = {"stats": stats, "clamp": torch.rand(T, 4), "grads": grads, "target": target, **spec}
    pair = {"logits_old": old, "logits_new": logits, "row_mask": mask, **pair_spec}

    def sent(payload):
        return torch.stack([message(payload, target, 3, 0, V), message(payload, target, 3, 0, 0)])

    return {
        "row_stats": {"logits": logits, "target": target, **spec, "moments": True, "whole": True},
        "message": {"payload": stats, "values": target, "call": 3, "start": 0, "columns": V},
        "merge_row_stats": {"messages": sent(stats), "target": target, **spec, "moments": False},
        "logits_grad": {"logits": logits, **gradient},
        "logits_grad_": {"logits": logits.clone(), **gradient},
        "covariance_stats": {**pair, "whole": True},
        "merge_covariance_stats": {"messages": sent(pair_stats), "row_mask": mask, "T": T, **pair_spec},
        "logit_covariance_grad": {**pair, "stats": pair_stats, "grads": grads},
    }


NAMES = list(arguments())


def op_of(name):
    return getattr(torch.ops.entcov, name).default


def call(name, **changes):
    return op_of(name)(**{**arguments()[name], **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    torch.library.opcheck(op_of(name), (), arguments(dtype)[name])


@pytest.mark.parametrize("name", ["logits_grad", "logit_covariance_grad", "message"])
def test_opcheck_without_the_optional_arguments(name):
    optional = {k: None for k in arguments()[name] if k in ("clamp", "row_mask", "values")}
    optional |= {"grads": [None] * 3} if "grads" in arguments()[name] else {}
    torch.library.opcheck(op_of(name), (), {**arguments()[name], **optional})


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shape_dtype_and_strides_of_the_result(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = call(name)
    with FakeTensorMode() as mode:
        fake = op_of(name)(
            **torch.utils._pytree.tree_map(
                lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, arguments()[name]
            )
        )
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (fake, real)), strict=True):
        assert one is other is None or all(f(one) == f(other) for f in (torch.Tensor.size, torch.Tensor.stride))
        assert one is None or one.dtype == other.dtype


@pytest.mark.parametrize("name", ["row_stats", "logits_grad", "logit_covariance_grad"])
def test_the_way_around_the_dispatcher_gives_the_same_bits(name, monkeypatch):
    """`define` calls its own functions where nobody watches; modes, compilers and profilers see the op."""
    wrapped = {"row_stats": row_stats._row_stats, "logits_grad": logits_grad._logits_grad}
    op = wrapped.get(name, logit_covariance_grad._logit_covariance_grad)
    names = [a.name for a in op_of(name)._schema.arguments]
    values = [arguments()[name][n] for n in names]
    at, end = names.index("vocab_start"), 1 + max(names.index(n) for n in names if n in RowSpec._fields)
    positional = (*values[:at], RowSpec(*values[at:end]), *values[end:])
    direct = op(*positional)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = op(*positional)
    assert f"entcov.{name}.default" in seen
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(direct), leaves(watched), strict=True))


# ---- errors ---------------------------------------------------------------------------------------------------------

LOGITS = torch.zeros(T, V)
GRADS = [torch.zeros(T)] * 3
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
    ("row_stats", {"vocab_start": -1}, ValueError, r"vocab_start must be in \[0, 2\^31\), got -1"),
    ("row_stats", {"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 2\^31\), got 0"),
    ("message", {"payload": torch.zeros(T)}, ValueError, r"payload must be \[T, width\], got \(5,\)"),
    ("merge_row_stats", {"messages": torch.zeros(24)}, ValueError, r"messages must be \[R >= 1, T \* width \+ 4\]"),
    ("merge_row_stats", {"messages": torch.zeros(0, 24)}, ValueError, r"got \(0, 24\)"),
    ("merge_row_stats", {"messages": torch.zeros(2, 24).double()}, TypeError, "messages must be float32"),
    ("merge_row_stats", {"messages": torch.zeros(24, 2).t()}, ValueError, "messages must be .* and contiguous"),
    ("merge_row_stats", {"messages": torch.zeros(2, 23)}, ValueError, r"with T = 5 and width >= 4, got \(2, 23\)"),
    ("merge_row_stats", {"messages": torch.zeros(2, 26)}, ValueError, r"with T = 5 and width >= 4, got \(2, 26\)"),
    ("merge_row_stats", {"moments": True}, ValueError, r"with T = 5 and width >= 7, got \(2, 24\)"),
    ("logits_grad", {"stats": torch.zeros(T, 5)}, ValueError, r"stats must be \[T, 4 or 7\]"),
    ("logits_grad", {"stats": torch.zeros(4, 4)}, ValueError, r"stats must have shape \(5, 4\)"),
    ("logits_grad", {"grads": GRADS[:2]}, ValueError, r"grads must be 3 \(grad_logprob, .*\), got 2"),
    ("logits_grad", {"grads": [None, torch.zeros(T, 1), None]}, ValueError, r"grad_entropy must have shape \(5,\)"),
    ("logits_grad", {"grads": [torch.zeros(T).double(), None, None]}, TypeError, "grad_logprob must be torch.float32"),
    ("logits_grad", {"clamp": None}, TypeError, "clamp must be a tensor, got None"),
    ("logits_grad_", {"logits": LOGITS[:1].expand(T, V)}, ValueError, "logits must not overlap themselves"),
    ("covariance_stats", {"logits_old": LOGITS.half()}, TypeError, "logits_old must have the dtype of logits_new"),
    ("covariance_stats", {"logits_old": LOGITS[:, 1:]}, ValueError, "logits_old must have the shape of logits_new"),
    ("covariance_stats", {"row_mask": torch.ones(T)}, TypeError, "row_mask must be torch.bool, got torch.float32"),
    ("merge_covariance_stats", {"messages": torch.zeros(1, 39)}, ValueError, "with T = 5 and width >= 8"),
    ("logit_covariance_grad", {"grads": [None, None, torch.zeros(4)]}, ValueError, r"grad_kl must have shape \(5,\)"),
    ("logit_covariance_grad", {"grads": GRADS * 2}, ValueError, r"grads must be 3 \(grad_covariance, .*\), got 6"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_errors_name_argument_rule_and_value(name, change, error, message):
    with pytest.raises(error, match=message):
        call(name, **change)


def test_writing_over_logits_that_require_grad_is_refused():
    logits = LOGITS.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="entcov::logits_grad_ has no derivative, and an argument requires one"):
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


@pytest.mark.parametrize(
    ("name", "argument"),
    [("row_stats", "logits"), ("merge_row_stats", "messages"), ("logits_grad", "stats"),
     ("covariance_stats", "logits_new"), ("logit_covariance_grad", "logits_old")],
)  # fmt: skip
def test_an_op_on_tensors_that_need_a_gradient_is_an_error_that_says_what_has_one(name, argument):
    value = arguments()[name][argument].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"entcov::{name} has no derivative.*call entcov.token_stats"):
        call(name, **{argument: value})
    with torch.no_grad():
        call(name, **{argument: value})


# ---- instruction sets -----------------------------------------------------------------------------------------------


def run_with_isa(isa):
    command = [sys.executable, "-c", "from entcov.ops.core import isa; print(isa())"]
    return subprocess.run(command, env={**os.environ, "ENTCOV_ISA": isa}, capture_output=True, text=True)


def test_entcov_isa_forces_the_instruction_set():
    assert run_with_isa("baseline").stdout.strip() == "baseline"


def test_an_unknown_instruction_set_is_an_error():
    assert "ENTCOV_ISA must be avx512, avx2 or baseline" in run_with_isa("avx1024").stderr


def test_instruction_sets_agree(isa):
    """To rounding: the tests against float64 leave room, two vector widths with one error in common would not."""
    logits = rows("gaussian", T, 5003)
    target, spec = targets(logits), RowSpec(0, 5003)
    stats = row_stats.row_stats(logits, target, spec, True)
    assert isa_of_the_kernels() == isa
    _cpu.set_isa("baseline")
    torch.testing.assert_close(stats, row_stats.row_stats(logits, target, spec, True), rtol=1e-6, atol=0)
