"""token_stats on one process: values and gradients against float64, and every promise of its docstring."""

import math
import subprocess
import sys

import pytest
import torch

from entcov.stats import token_stats as module
from entcov.stats.token_stats import token_stats
from entcov.verify import reference
from entcov.verify.check import check_rows
from entcov.verify.row_kinds import KINDS, make_rows, value_bound

OUTPUTS = ("logprob", "entropy", "clamped_entropy", "collision", "varentropy", "entropy_drift")
# 1: no choice at all; 7, 8: below and at a vector's width; 1000: no multiple of it; 32000, 151936: real vocabularies.
SMALL = [(5, 1), (5, 7), (5, 8), (3, 1000)]
LARGE = [(2, 32000), (2, 151936)]


def random_case(T=6, V=37, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(T, V, generator=rng)).to(dtype)
    return logits, torch.randint(0, V, (T,), generator=rng)


def grad_of(output, logits, weight):
    return torch.autograd.grad((output * weight).sum(), logits, retain_graph=True)[0]


def assert_passes(**selection):
    rows = list(check_rows(**selection, ops=["token_stats"]))
    assert rows
    failed = [row.cells() for row in rows if not row.passed]
    assert not failed, failed


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_on_small_rows(kind):
    assert_passes(shapes=SMALL, kinds=[kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_gradients_on_real_vocabularies(dtype):
    assert_passes(shapes=LARGE, dtypes=[dtype], kinds=["gaussian", "peaked", "-inf columns", "ties"])


def test_the_check_can_fail():
    """The bounds behind the two tests above are not so wide that a wrong temperature would pass."""
    logits, target = random_case()
    wrong = token_stats(logits, target, temperature=1.0001)
    expected = reference.token_stats(logits, target)
    for name in ("logprob", "entropy"):
        assert ((getattr(wrong, name).double() - expected[name]).abs() > value_bound(name, expected[name])).any()


def test_four_logits_by_hand():
    stats = token_stats(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([1]), moments=True)
    for got, expected in [
        (stats.logprob, math.log(0.236883)),
        (stats.entropy, 0.947537),
        (stats.collision, 0.643914**2 + 0.236883**2 + 0.087144**2 + 0.032059**2),
        (stats.entropy_drift, 0.116701 + 0.168817),
    ]:
        assert got.item() == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_keeps_its_digits_down_to_1e_minus_7(dtype):
    """One logit v, all others 0: rest = (V - 1) e^-v, H = log1p(rest) + v rest / (1 + rest), in closed form (a float64
    softmax already loses digits here). A textbook lse - sum p z in fp32 is off by about 1e-6, so has none."""
    V = 151936
    logits = torch.zeros(3, V, dtype=dtype)
    heights = (27.0, 28.5, 30.0)
    logits[:, 11] = torch.tensor(heights)
    got = token_stats(logits, torch.full((3,), 11))
    for i, v in enumerate(heights):
        rest = (V - 1) * math.exp(-v)
        entropy = math.log1p(rest) + v * rest / (1 + rest)
        assert 1e-7 < entropy < 1e-5
        assert got.entropy[i].item() == pytest.approx(entropy, rel=1e-5)
        assert got.logprob[i].item() == pytest.approx(-math.log1p(rest), rel=1e-5)


def test_predicted_drift_has_the_right_rate():
    """The entropy after a small step on the token's own gradient: halving the step halves the relative error."""
    logits, target = random_case(T=4, V=11)
    drift = token_stats(logits, target, moments=True, temperature=0.8).entropy_drift.double()
    log_p = reference.log_probs(logits, 0.8)
    step = torch.nn.functional.one_hot(target, 11) - log_p.exp()

    def relative_error(alpha):
        moved = reference.log_probs(logits.double() / 0.8 + alpha * step)
        true = reference.entropy_of(moved) - reference.entropy_of(log_p)
        return (alpha * drift - true) / true

    ratio = relative_error(0.02) / relative_error(0.01)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0), rtol=0.05, atol=0)


# ---- shapes, defaults, ignored rows ---------------------------------------------------------------------------------


def test_leading_dims_vocab_size_and_temperature():
    logits, target = random_case(T=12, V=40)
    cube = logits.view(3, 4, 40).requires_grad_()
    out = token_stats(cube, target.view(3, 4) % 33, vocab_size=33, temperature=0.6, top_k=9, moments=True)
    expected = reference.token_stats(logits, target % 33, vocab_size=33, temperature=0.6, top_k=9)
    for name in OUTPUTS:
        assert getattr(out, name).shape == (3, 4) and getattr(out, name).dtype == torch.float32
        torch.testing.assert_close(getattr(out, name).flatten().double(), expected[name], rtol=1e-5, atol=1e-5)
    grad = grad_of(out.logprob + out.entropy + out.clamped_entropy, cube, 1.0)
    assert grad.shape == cube.shape and (grad[..., 33:] == 0).all() and (grad[..., :33] != 0).any()


def test_padding_columns_are_not_read():
    logits, target = random_case(V=40)
    poisoned = logits.clone()
    poisoned[:, 33:] = torch.nan
    clean, other = (token_stats(x, target % 33, vocab_size=33, clamp_p=0.3, moments=True) for x in (logits, poisoned))
    assert all(torch.equal(a, b) for a, b in zip(clean, other, strict=True))


def test_one_row_without_leading_dims():
    out = token_stats(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2), clamp_p=0.4)
    assert out.logprob.shape == () and out.entropy.item() == pytest.approx(0.832396, abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_tokens(shape):
    logits = torch.empty(shape, requires_grad=True)
    out = token_stats(logits, torch.empty(shape[:-1], dtype=torch.int64), clamp_p=0.2, moments=True)
    assert all(x.shape == shape[:-1] for x in out)
    (out.logprob.sum() + out.clamped_entropy.sum()).backward()
    assert logits.grad.shape == shape


def test_ignored_rows_are_zero_even_where_they_hold_nan_or_nothing_finite():
    logits, target = random_case()
    logits[1], logits[2] = torch.nan, -torch.inf
    target[1], target[2] = -100, -100
    logits.requires_grad_()
    out = token_stats(logits, target, clamp_p=0.25, moments=True)
    for value in out:
        assert (value[1:3] == 0).all() and value.isfinite().all()
    grad = grad_of(sum(out[:3]), logits, 1.0)
    assert (grad[1:3] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


def test_all_ignored_with_another_ignore_index():
    logits, target = random_case()
    logits.requires_grad_()
    out = token_stats(logits, torch.full_like(target, 3), ignore_index=3, top_k=2, moments=True)
    assert all((value == 0).all() for value in out)
    assert (grad_of(out.entropy, logits, 1.0) == 0).all()


@pytest.mark.parametrize("top_k", [None, 5])
def test_nan_and_infinity_stay_in_their_row(top_k):
    logits, target = random_case()
    alone = token_stats(logits, target, top_k=top_k, moments=True)
    logits[2, 3], logits[4, 0], logits[5, :] = torch.nan, torch.inf, torch.nan
    logits.requires_grad_()
    out = token_stats(logits, target, top_k=top_k, moments=True)
    for name, value, before in zip(out._fields, out, alone, strict=True):
        if value is not None:
            assert value[[2, 4, 5]].isnan().all(), name
            assert torch.equal(value[[0, 1, 3]], before[[0, 1, 3]]), name
    grad = grad_of(sum(x for x in out[:3] if x is not None), logits, 1.0)
    assert grad[[2, 4, 5]].isnan().all() and grad[[0, 1, 3]].isfinite().all()


# ---- memory, mutation, autograd -------------------------------------------------------------------------------------


def test_rows_with_a_stride_are_read_in_place():
    """A row stride larger than the vocabulary, and [B, S] dims that one stride walks: no copy, so the logits kept for
    backward are the caller's own storage."""
    wide = torch.randn(4, 3, 50, requires_grad=True)
    view = wide[..., 5:42]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = token_stats(view, torch.full((4, 3), 2), clamp_p=0.2)
    expected = reference.token_stats(view.detach(), torch.full((4, 3), 2), clamp_p=0.2)
    torch.testing.assert_close(out.clamped_entropy.double(), expected["clamped_entropy"], rtol=1e-5, atol=1e-6)
    big = [t for t in kept if t.shape[-1:] == (37,)]
    assert len(big) == 1 and big[0].untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()


def test_leading_dims_that_no_stride_walks_are_still_right():
    logits = torch.randn(3, 5, 11, requires_grad=True)
    target = torch.randint(0, 11, (3, 4))
    out = token_stats(logits[:, :-1], target)
    expected = reference.token_stats(logits.detach()[:, :-1], target)
    torch.testing.assert_close(out.logprob.double(), expected["logprob"], rtol=1e-5, atol=1e-5)
    assert (grad_of(out.entropy, logits, 1.0)[:, -1] == 0).all()


def test_saved_bytes_a_token():
    """16 bytes of statistics (28 with moments, 16 more with a clamp) beside the caller's own tensors."""
    logits, target = random_case(T=64, V=100)
    logits.requires_grad_()
    for settings, most in [({}, 16), ({"moments": True}, 28), ({"clamp_p": 0.2}, 32)]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            token_stats(logits, target, **settings)
        own = {logits.data_ptr(), target.data_ptr()}
        assert sum(t.nbytes for t in kept if t.data_ptr() not in own) <= most * 64


def test_nothing_is_kept_without_gradients():
    logits, target = random_case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert not token_stats(logits, target).entropy.requires_grad
        with torch.no_grad():
            assert not token_stats(logits.clone().requires_grad_(), target).entropy.requires_grad
    assert kept == []


def test_logits_are_not_written_and_backward_twice_gives_the_same_bits():
    logits, target = random_case()
    logits.requires_grad_()
    before, version = logits.detach().clone(), logits._version
    out = token_stats(logits, target, top_k=4, moments=True)
    loss = out.logprob.sum() + 0.1 * out.entropy.sum() - out.clamped_entropy.sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert logits._version == version and torch.equal(logits.detach(), before)


def test_moments_are_detached_and_unused_outputs_cost_nothing(monkeypatch):
    logits, target = random_case()
    logits.requires_grad_()
    out = token_stats(logits, target, top_k=3, moments=True)
    assert not any(x.requires_grad for x in (out.collision, out.varentropy, out.entropy_drift))
    asked, original = [], module.logits_grad

    def spy(logits, target, stats, clamp, grads, spec):
        asked.append([g is not None for g in grads])
        return original(logits, target, stats, clamp, grads, spec)

    monkeypatch.setattr(module, "logits_grad", spy)
    grad_of(out.entropy, logits, 1.0)
    grad_of(out.logprob, logits, 1.0)
    assert asked == [[False, True, False], [True, False, False]]


def test_a_second_derivative_is_an_error():
    logits, target = random_case()
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_stats(logits, target).entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_stats has no second derivative"):
        grad.sum().backward()


def test_rows_do_not_depend_on_each_other_or_on_threads():
    """Batch-invariant: a row alone, in a batch, and under another thread count gives the same bits."""
    logits, target = random_case(T=9, V=5000, dtype=torch.bfloat16)
    whole = token_stats(logits, target, clamp_p=0.3, moments=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = token_stats(logits, target, clamp_p=0.3, moments=True)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 5, 8):
        alone = token_stats(logits[i : i + 1], target[i : i + 1], clamp_p=0.3, moments=True)
        for a, b, c in zip(whole, alone, again, strict=True):
            assert torch.equal(a[i], b[0]) and torch.equal(a, c)


def test_autocast_changes_nothing():
    logits, target = random_case()
    plain = token_stats(logits, target, clamp_p=0.3, moments=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_stats(logits, target, clamp_p=0.3, moments=True)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


# ---- torch.compile --------------------------------------------------------------------------------------------------


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(29, 8), torch.nn.Linear(8, 29, bias=False)

    def forward(self, tokens, target):
        stats = token_stats(self.head(self.embed(tokens).tanh()), target, temperature=0.9, clamp_p=0.25, moments=True)
        loss = -stats.logprob.mean() - 0.01 * stats.clamped_entropy.mean() + 0.001 * stats.entropy.sum()
        return loss, stats.entropy_drift.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile_inside_a_model(dynamic):
    torch.manual_seed(0)
    model = TinyModel()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (6, 9):
        tokens, target = torch.randint(0, 29, (2, T)), torch.randint(0, 29, (2, T))
        target[0, 1] = -100
        results = []
        for run in (model, compiled):
            model.zero_grad()
            loss, drift = run(tokens, target)
            loss.backward()
            results.append((loss.detach(), drift, *(p.grad.clone() for p in model.parameters())))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


CHANGES = {
    "scaled": lambda x: x.mul_(2),
    "tempered": lambda x: x.div_(0.7),
    "shifted": lambda x: x.add_(1),
    "zeroed": lambda x: x.zero_(),
    "turned to probabilities": lambda x: x.copy_(x.softmax(-1)),
}


def changed_after_forward(change, stats_of=token_stats):
    """A function that writes its logits once it has its loss."""

    def loss(leaf, target):
        logits = leaf * 1.5
        stats = stats_of(logits, target, clamp_p=0.3)
        total = stats.logprob.sum() + stats.entropy.sum() - stats.clamped_entropy.sum()
        with torch.no_grad():
            change(logits)
        return total

    return loss


@pytest.mark.parametrize("name", CHANGES)
def test_logits_that_were_written_before_backward_are_an_error_compiled_too(name):
    """What a compiled function writes goes unseen by autograd's versions; without the op's own look the gradient was
    wrong in silence, by 149 percent for a factor of 2."""
    torch.compiler.reset()  # else the fifth function is one more than the compiler's limit
    logits, target = make_rows("gaussian", 6, 37, torch.float32), torch.tensor([3, 36, -100, 0, 9, 20])
    for run, message in (
        (changed_after_forward(CHANGES[name]), "modified by an inplace operation"),
        (
            torch.compile(changed_after_forward(CHANGES[name]), backend="aot_eager"),
            "logits must not be changed between forward and backward.* in row [0-5] the target's logit was",
        ),
    ):
        loss = run(logits.clone().requires_grad_(), target)
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
    with torch.no_grad():  # whoever needs no gradient may write
        changed_after_forward(CHANGES[name])(logits, target)


def test_a_change_that_spares_all_targets_is_seen_where_token_stats_is_not_compiled():
    """The op looks at the target's logit alone; the way that the docstring gives sees every change."""

    def hide(x):
        x[:, 10:15] = -torch.inf

    logits, target = make_rows("gaussian", 4, 37, torch.float32), torch.tensor([3, 36, 0, 9])
    safe = changed_after_forward(hide, lambda *args, **kwargs: torch.compiler.disable(token_stats)(*args, **kwargs))
    loss = torch.compile(safe, backend="aot_eager")(logits.clone().requires_grad_(), target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_importing_entcov_does_not_import_the_compiler():
    """It would double the time: a second on a fast machine."""
    program = "import sys, entcov.stats.token_stats; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# ---- errors ---------------------------------------------------------------------------------------------------------

BAD_CALLS = [
    (dict(target=torch.zeros(5, dtype=torch.int64)), ValueError, r"target must have the leading shape .* \(6,\), got"),
    (dict(target=torch.zeros(6, dtype=torch.int32)), TypeError, "target must be torch.int64, got torch.int32"),
    (dict(target=torch.tensor([0, 1, 99, 3, -5, 0])), ValueError, r"2 of 6 are not, first 99 at row 2"),
    (dict(logits=torch.zeros(6, 37, dtype=torch.float64)), TypeError, "bfloat16 or float16, got torch.float64"),
    (dict(logits=torch.zeros(37, 6).t()), ValueError, "stride 1 along the vocabulary"),
    (dict(logits=torch.full((6, 37), -torch.inf)), ValueError, r"6 rows have no finite logit \(first: row 0\)"),
    (dict(temperature=0.0), ValueError, "temperature must be positive.*got 0.0"),
    (dict(temperature=torch.tensor(1.0, requires_grad=True)), ValueError, "temperature must not require a gradient"),
    (dict(ignore_index=-100.0), TypeError, "ignore_index must be an integer, got -100.0"),
    (dict(temperature=math.nan), ValueError, "temperature must be positive.*got nan"),
    (dict(clamp_p=20), ValueError, r"clamp_p must be in \[0, 1\), a fraction, not percent, got 20"),
    (dict(clamp_p=-0.1), ValueError, "clamp_p must be in"),
    (dict(clamp_p=math.nan), ValueError, "clamp_p must be in"),
    (dict(top_k=0), ValueError, r"top_k must be in \[1, vocab_size = 37\], got 0"),
    (dict(top_k=38), ValueError, r"top_k must be in \[1, vocab_size = 37\], got 38"),
    (dict(top_k=3, clamp_p=0.2), ValueError, "clamp_p and top_k exclude each other"),
    (dict(vocab_start=5), ValueError, "vocab_start must be 0 or None without a group"),
    (dict(vocab_size=38), ValueError, r"vocab_size must be in \[1, 37\]"),
    (dict(vocab_size=0), ValueError, r"vocab_size must be in \[1, 37\]"),
]


@pytest.mark.parametrize("changes, kind, message", BAD_CALLS)
def test_bad_arguments_are_named(changes, kind, message):
    logits, target = random_case()
    arguments = {"logits": logits, "target": target, **changes}
    with pytest.raises(kind, match=message):
        token_stats(**arguments)


def test_some_empty_rows_are_counted():
    logits, target = random_case()
    logits[[1, 4]] = -torch.inf
    with pytest.raises(ValueError, match=r"2 rows have no finite logit \(first: row 1\)"):
        token_stats(logits, target)


def test_row_kinds_are_what_they_say():
    peaked = reference.token_stats(make_rows("peaked", 8, 1000, torch.float32), torch.zeros(8, dtype=torch.int64),
                                   temperature=0.7)["entropy"]  # fmt: skip
    assert (peaked > 1e-7).all() and (peaked < 1e-4).all()
    masked = make_rows("-inf columns", 8, 1000, torch.float32)
    assert 0.6 < (masked == -torch.inf).float().mean() < 0.9 and masked.isfinite().any(-1).all()


# ---- differences of logits that do not fit fp32 ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 7.0, 1e6, 1e30, 1e-3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_beyond_fp32_is_divided_before_it_overflows(dtype, temperature):
    """logprob = (target - max) / temperature - L was -inf from a difference of 3.4e38 on, whatever the temperature."""
    logits = torch.tensor([[3e38, -3e38, 0.0], [3.3e38, 3.3e38, -3.3e38], [-3e38, -2e38, 1e38]]).to(dtype)
    target = torch.tensor([1, 2, 0])
    stats = token_stats(logits, target, temperature=temperature, moments=True, top_k=2)
    for name, expected in reference.token_stats(logits, target, temperature=temperature, top_k=2).items():
        # float() makes inf of what fp32 cannot hold.
        torch.testing.assert_close(getattr(stats, name), expected.float(), rtol=1e-6, atol=1e-7, msg=name)
    assert temperature < 2 or stats.logprob.isfinite().all()
