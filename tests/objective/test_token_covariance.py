"""Token covariance, its summary and its selections on one process, against plain-Python oracles."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from entcov import arguments
from entcov.controls import ClipCov, KLCov, select
from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import covariance_summary, token_covariance
from entcov.objective.tokens import PolicyLossConfig, Tokens
from tests.support.objective_oracle import (
    NoHostRead,
    clip_cov_oracle,
    exact_covariance,
    kl_cov_oracle,
    make_batch,
    top_by_hash,
)

# --- the numbers ----------------------------------------------------------------------------------------------------


def hand_example():
    p = torch.tensor([0.9, 0.5, 0.1, 0.8, 0.2, 0.95, 0.6, 0.05])
    advantage = torch.tensor([1.5] * 4 + [-0.5] * 4)
    return p.log(), advantage, torch.tensor([True] * 3 + [False] + [True] * 4)


def test_covariance_hand_values():
    result = token_covariance(*hand_example())
    expected = [1.22953, 0.55777, -1.28159, 0.0, 0.36706, -0.96849, -0.57460, 1.55532]
    assert result.value.tolist() == pytest.approx(expected, abs=6e-6)
    assert int(result.num_tokens) == 7
    assert float(result.mean_advantage) == pytest.approx(0.3571429, abs=1e-7)
    assert float(result.mean_logprob) == pytest.approx(-1.1811974, abs=1e-7)
    summary = covariance_summary(result)
    assert float(summary["actor/cov_mean"]) == pytest.approx(0.1264284, abs=1e-7)
    assert float(summary["actor/cov_max"]) == pytest.approx(1.55532, abs=6e-6)


def test_covariance_hand_selection():
    result = token_covariance(*hand_example())
    ids = torch.arange(8)
    both = select_clip_cov(result, ids, ratio=0.5, low=1.0, high=5.0, seed=0, step=0)
    assert both.mask.nonzero().flatten().tolist() == [0, 7]
    top = select_largest(result, ids, ratio=2 / 7, seed=0, step=0)
    assert top.mask.nonzero().flatten().tolist() == [0, 7]
    assert float(top.threshold) == pytest.approx(1.22953, abs=6e-6)


@pytest.mark.parametrize("seed", range(4))
def test_covariance_equals_rational_arithmetic(seed):
    """Bitwise. (Float64 errors could move a value that lies within 2^-50 of a rounding boundary; none here does.)"""
    tokens, _ = make_batch(seed)
    value = token_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask).value
    exact = exact_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask)
    mask = tokens.loss_mask.numpy()
    assert np.array_equal(value.numpy()[mask], exact[mask])
    assert not value[~tokens.loss_mask].any()


def adversarial_batch():
    """Large advantages that cancel, beside tiny ones: a float64 sum loses bits by the order of its terms."""
    rng = random.Random(3)
    big = [rng.uniform(2.0**18, 2.0**20) for _ in range(150)]
    advantage = np.array(big + [-b for b in big] + [rng.gauss(0, 1e-3) for _ in range(100)], np.float32)
    logprob = np.array([-(10.0 ** rng.uniform(-8, 4)) for _ in range(400)], np.float32)
    return torch.from_numpy(logprob), torch.from_numpy(advantage)


def test_means_do_not_depend_on_order_where_float64_does():
    logprob, advantage = adversarial_batch()
    mask = torch.ones(400, dtype=torch.bool)
    naive, ours = {}, set()
    for trial in range(40):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(trial))
        back = order.argsort()
        x, a = logprob[order], advantage[order]
        mean_x, mean_a = (np.add.accumulate(v.double().numpy())[-1] / 400 for v in (x, a))  # one after the other
        plain = ((x.double() - mean_x) * (a.double() - mean_a)).float()[back]
        naive.setdefault(tuple(plain.tolist()), plain)
        result = token_covariance(x, a, mask)
        ours.add((*result.value[back].tolist(), float(result.mean_logprob), float(result.mean_advantage)))
    assert len(naive) > 1, "the case must be one that a float64 sum gets wrong"
    assert len(ours) == 1

    # A borderline token: its float64 covariance moves with the order, so a threshold can be put between its values.
    first, *rest = naive.values()
    token = next(i for other in rest for i in range(400) if other[i] != first[i])
    values = sorted({float(v[token]) for v in naive.values()})
    low = values[-1]
    assert {float(v[token]) >= low for v in naive.values()} == {True, False}
    picks = set()
    for trial in range(10):
        order = torch.randperm(400, generator=torch.Generator().manual_seed(trial))
        result = token_covariance(logprob[order], advantage[order], mask)
        chosen = select_clip_cov(result, order, ratio=1.0, low=low, high=math.inf, seed=0, step=0).mask
        picks.add(tuple(sorted(order[chosen].tolist())))
    assert len(picks) == 1


def test_mean_accuracy_over_its_whole_range():
    logprob, advantage = adversarial_batch()
    result = token_covariance(logprob, advantage, torch.ones(400, dtype=torch.bool))
    for values, mean in ((logprob, result.mean_logprob), (advantage, result.mean_advantage)):
        exact = sum(Fraction(v) for v in values.double().tolist()) / 400
        assert abs(Fraction(float(mean)) - exact) <= Fraction(1, 2**42) + abs(exact) * Fraction(1, 2**51)


def test_denominator_eps_is_masked_means():
    logprob, advantage, mask = hand_example()
    result = token_covariance(logprob, advantage, mask, denominator_eps=1.0)
    assert float(result.mean_advantage) == pytest.approx(2.5 / 8)


# --- order statistics (hash and keys: test_selection_kernels.py) ------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_summary_matches_numpy(seed):
    tokens, _ = make_batch(seed, sequences=150)
    result = token_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask)
    values = result.value[tokens.loss_mask].numpy()
    assert len(values) > 2000, "the quantile must differ from the largest value"
    summary = covariance_summary(result)
    assert float(summary["actor/cov_max"]) == values.max()
    assert float(summary["actor/cov_p999"]) == np.quantile(values, 0.999, method="inverted_cdf") < values.max()
    assert float(summary["actor/cov_mean"]) == pytest.approx(values.astype(np.float64).mean(), rel=1e-12, abs=1e-14)


# --- selection against the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.002, 0.05, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_selections_match_oracle(seed, ratio):
    tokens, _ = make_batch(seed, sequences=60)
    result = token_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask)
    value = exact_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask)
    mask, ids = tokens.loss_mask, tokens.token_id
    clip = select_clip_cov(result, ids, ratio=ratio, low=0.25, high=2.0, seed=seed, step=3)
    assert set(ids[clip.mask].tolist()) == clip_cov_oracle(value, mask, ids, ratio, 0.25, 2.0, seed, 3)
    kl = select_largest(result, ids, ratio=ratio, seed=seed, step=3)
    n = int(ratio * int(mask.sum()))
    assert set(ids[kl.mask].tolist()) == kl_cov_oracle(value, mask, ids, n, seed, 3)
    assert int(kl.count) == n
    assert float(kl.threshold) == (min(value[kl.mask.numpy()]) if n else math.inf)


def test_ties_are_settled_by_the_hash():
    """All covariances are 0 (constant advantage): the top n must still be n tokens, the same in every order."""
    ids = torch.arange(1000)
    logprob, advantage, mask = -torch.rand(1000), torch.ones(1000), torch.ones(1000, dtype=torch.bool)
    result = token_covariance(logprob, advantage, mask)
    assert not result.value.any()
    expected = top_by_hash(range(1000), 100, 5, 9)
    for trial in range(3):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(trial))
        shuffled = token_covariance(logprob[order], advantage, mask)
        got = select_largest(shuffled, ids[order], ratio=0.1, seed=5, step=9)
        assert set(ids[order][got.mask].tolist()) == expected


def test_masked_tokens_are_never_drawn():
    """Their covariance reads 0, which lies inside these bounds."""
    logprob, advantage, mask = hand_example()
    result = token_covariance(logprob, advantage, mask)
    chosen = select_clip_cov(result, torch.arange(8), ratio=1, low=-9.0, high=9.0, seed=0, step=0)
    assert torch.equal(chosen.mask, mask) and int(chosen.count) == 7


def test_interval_closed_and_open():
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0])
    logprob = torch.tensor([-1.0, -3.0, -1.0, -3.0])  # covariance 1 * 2 = 2, exactly, for all
    result = token_covariance(logprob, advantage, torch.ones(4, dtype=torch.bool))
    assert result.value.tolist() == [2.0] * 4

    def count(low, high, strict):
        ids = torch.arange(4)
        return int(select_clip_cov(result, ids, ratio=1, low=low, high=high, strict=strict, seed=0, step=0).count)

    assert count(2.0, 5.0, False) == 4 and count(1.0, 2.0, False) == 4
    assert count(2.0, 5.0, True) == 0 and count(1.0, 2.0, True) == 0 and count(1.0, 5.0, True) == 4


def test_draw_is_uniform_and_changes_with_seed_and_step():
    """20 of 100 candidates over 2000 steps: each is drawn 400 +- 18 times, the worst of 100 within 4.5 deviations."""
    advantage = torch.tensor([2.0, -2.0] * 50)
    logprob = torch.tensor([-1.0, -3.0] * 50)
    result = token_covariance(logprob, advantage, torch.ones(100, dtype=torch.bool))
    ids = torch.arange(100)

    def draw(seed, step):
        return select_clip_cov(result, ids, ratio=0.2, low=1.0, high=5.0, seed=seed, step=step).mask

    times = sum(draw(0, step).long() for step in range(2000))
    assert times.sum() == 20 * 2000
    assert (times - 400).abs().max() < 4.5 * math.sqrt(2000 * 0.2 * 0.8)
    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(1, 1)) and not torch.equal(draw(0, 1), draw(1, 0))


def test_at_least_one_token():
    tokens, _ = make_batch(0)
    result = token_covariance(tokens.logprob, tokens.advantage, tokens.loss_mask)
    assert int(select_largest(result, tokens.token_id, ratio=0.0, seed=0, step=0, at_least=1).count) == 1
    assert int(select_largest(result, tokens.token_id, ratio=0.0, seed=0, step=0).count) == 0


# --- degenerate batches, errors, host synchronisation ---------------------------------------------------------------


def test_no_token_anywhere_is_an_error():
    nothing = torch.zeros(5, dtype=torch.bool)
    for length in (0, 5):
        with pytest.raises(ValueError, match="mask must have a True token"):
            token_covariance(torch.zeros(length), torch.zeros(length), nothing[:length])
    empty = token_covariance(torch.zeros(5), torch.zeros(5), nothing, empty_ok=True)
    assert not empty.value.any()
    assert int(select_largest(empty, torch.arange(5), ratio=0.5, seed=0, step=0, at_least=1).count) == 0
    chosen = select_clip_cov(empty, torch.arange(5), ratio=0.5, low=-1.0, high=1.0, seed=0, step=0, at_least=1)
    assert int(chosen.count) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**21])
def test_bad_value_is_an_error_only_under_the_mask(bad):
    mask = torch.tensor([True, True, False])
    token_covariance(torch.tensor([-1.0, -2.0, bad]), torch.ones(3), mask)
    with pytest.raises(ValueError, match=r"1 of 4 values over all ranks are not, 0 in logprob and 1 in advantage"):
        token_covariance(-torch.ones(3), torch.tensor([1.0, bad, 1.0]), mask)


def test_type_and_shape_errors():
    logprob, mask = -torch.ones(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(TypeError, match="logprob must be torch.float32 or torch.float64, got torch.bfloat16"):
        token_covariance(logprob.bfloat16(), logprob, mask)
    with pytest.raises(TypeError, match="mask must be torch.bool, got torch.float32"):
        token_covariance(logprob, logprob, logprob)
    with pytest.raises(ValueError, match=r"advantage must have shape \(3,\) as the others, got \(2,\)"):
        token_covariance(logprob, logprob[:2], mask)
    result = token_covariance(logprob, logprob, mask)
    with pytest.raises(TypeError, match="token_id must be torch.int64"):
        select_largest(result, torch.arange(3).int(), ratio=0.1, seed=0, step=0)
    with pytest.raises(ValueError, match="ratio must be in .0, 1., got 2; it is a fraction, not a percent"):
        select_largest(result, torch.arange(3), ratio=2, seed=0, step=0)


def test_repeated_token_ids_are_an_error():
    result = token_covariance(-torch.rand(6), torch.randn(6), torch.ones(6, dtype=torch.bool))
    with pytest.raises(
        ValueError,
        match="token_id must be different for every unmasked token.*at least 1 tokens have the id of another",
    ):
        select_largest(result, torch.tensor([0, 1, 2, 3, 4, 4]), ratio=0.5, seed=0, step=0)


def test_no_host_synchronisation_on_the_device_path():
    """Runs the code that any accelerator runs, on the device without data: reading a value would be an error."""
    t = 50
    tokens = Tokens(
        torch.empty(t, device="meta"),
        torch.empty(t, device="meta"),
        torch.empty(t, device="meta"),
        torch.empty(t, dtype=torch.bool, device="meta"),
        token_id=torch.empty(t, dtype=torch.int64, device="meta"),
    )
    controls = [ClipCov(), KLCov(), ClipCov(semantics="reference"), KLCov(semantics="paper")]
    with NoHostRead() as mode:
        selections, metrics = select(controls, [tokens, tokens], step=0, config=PolicyLossConfig())
    assert {"token_sums", "token_scores", "token_select", "token_summary"} <= mode.seen
    assert all(s.mask.shape == (t,) and s.mask.is_meta for row in selections for s in row)
    assert set(metrics) == {"actor/cov_mean", "actor/cov_max", "actor/cov_p999", "actor/cov_threshold"}


class Operations(NoHostRead):
    """Counts the operations that launch something on an accelerator. Views launch nothing."""

    VIEWS = ("view", "expand", "unsqueeze", "select", "slice", "detach", "alias", "unbind")
    EMPTY = ("empty", "new_empty", "empty_like")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name not in (*self.VIEWS, *self.EMPTY):
            self.found.append(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_the_device_path_has_the_bits_and_the_operations_that_are_promised(monkeypatch):
    """The code that an accelerator runs, on the CPU: it reads no value on the host, its results are those of the CPU's
    own path, and it calls the ops that docs/kernels.md counts. Launches and bytes of the ops: tests/emulator."""
    T = 3001
    rng = torch.Generator().manual_seed(0)
    logprob, advantage = -torch.rand(T, generator=rng), torch.randn(T, generator=rng)
    mask, ids = torch.rand(T, generator=rng) < 0.9, torch.randperm(T, generator=rng)
    calls = {
        "summary": lambda c: tuple(covariance_summary(c).values()),
        "clip": lambda c: selected(select_clip_cov(c, ids, ratio=2e-2, low=0.1, high=5.0, seed=3, step=7)),
        "kl": lambda c: selected(select_largest(c, ids, ratio=2e-2, seed=3, step=7)),
    }

    def selected(selection):
        return tuple(x for x in (selection.mask, selection.count, selection.threshold) if x is not None)

    of_cpu = token_covariance(logprob, advantage, mask)
    expected = {name: call(of_cpu) for name, call in calls.items()}
    monkeypatch.setattr(arguments, "readable", lambda tensor: False)
    with Operations() as found:
        of_device = token_covariance(logprob, advantage, mask)
    counted = {"covariance": found.found}
    assert torch.equal(of_device.value, of_cpu.value)
    for name, call in calls.items():
        with Operations() as found:
            result = call(of_device)
        counted[name] = found.found
        assert all(torch.equal(a, b) for a, b in zip(result, expected[name], strict=True)), name
    assert counted == {
        "covariance": ["token_sums", "token_scores"],
        "summary": ["token_select", "token_summary"],
        "clip": ["token_select"],
        "kl": ["token_select"],
    }


def test_step_and_seed_as_tensors_draw_the_same():
    """For CUDA graphs, where a number would be frozen into the capture."""
    result = token_covariance(-torch.rand(300), torch.randn(300), torch.ones(300, dtype=torch.bool))
    ids = torch.arange(300)
    for step in (0, 7, 2**40):
        call = dict(ratio=0.1, low=-9.0, high=9.0)
        number = select_clip_cov(result, ids, seed=5, step=step, **call)
        tensor = select_clip_cov(result, ids, seed=torch.tensor(5), step=torch.tensor(step), **call)
        assert torch.equal(number.mask, tensor.mask)
    assert not torch.equal(number.mask, select_clip_cov(result, ids, seed=5, step=1, **call).mask)
