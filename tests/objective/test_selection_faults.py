"""Plants faults in the C++ of the selections (csrc/token_select.h, csrc/cpu/token_*.cpp), one at a time. A comparison
with the torch code that the kernels replaced sees each of them."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from entcov import _cpu
from entcov.objective.selection import select_clip_cov, select_largest
from entcov.objective.token_covariance import covariance_summary, token_covariance
from entcov.ops import core
from tests.emulator.build import ROOT, compiler, run_compiler
from tests.support import selection_in_torch as in_torch
from tests.support.thread_ranks import ThreadRanks

HEADER, SELECT, MEANS = "token_select.h", "cpu/token_select.cpp", "cpu/token_means.cpp"
FAULTS = {  # file, old, new
    "no fault": (HEADER, "", ""),
    "advantage is not centred": (MEANS, "y[i] - mean_y", "y[i]"),
    "masked tokens count in the means": (MEANS, "tokens += a.mask[begin + i]", "tokens += 1"),
    "eps is left out": (HEADER, "static_cast<float>(num_tokens) + static_cast<float>(eps)", "num_tokens"),
    "the fine part of a sum is lost": (HEADER, "static_cast<double>(fine) *", "0.0 *"),
    "the count is rounded": (HEADER, "static_cast<int64_t>(share);", "static_cast<int64_t>(share + 0.5);"),
    "one token always": (HEADER, "if (n < spec.at_least) n = spec.at_least;", "if (n < 1) n = 1;"),
    "rounding up is left out": (HEADER, "if (spec.round_up) share += 0.9999;", ""),
    "the draw ignores the step": (HEADER, "+ spread(seed)) + spread(step)", "+ spread(seed))"),
    "the draw ignores the seed": (HEADER, "mix(spread(token_id)) + spread(seed)", "mix(spread(token_id))"),
    "the draw goes by the place": (SELECT, "token_hash(a.tokens.token_id[begin + j],", "token_hash(begin + j,"),
    "ties go by the place": (SELECT, "token_hash(a.tokens.token_id[member.token],", "token_hash(member.token,"),
    "excluded tokens are drawn": (SELECT, "candidate[i] &= !exclude[i];", ";"),
    "the open interval is closed": (SELECT, "(value[i] > spec.low)", "(value[i] >= spec.low)"),
    "masked tokens are drawn": (SELECT, "mask[i] & (value[i] >= spec.low)", "1 & (value[i] >= spec.low)"),
    "all ties are taken": (SELECT, "digit > a.digit && a.some;", "digit >= 0 && a.some;"),
    "negative numbers sort backwards": (HEADER, "0x80000000u ? ~bits", "0x80000000u ? bits ^ 0x80000000u"),
    "the quantile is one off": (HEADER, "/ 1000 + 1;", "/ 1000 + 2;"),
    "counters of few tokens stay": (SELECT, "= a.counts->groups[bin / kBinsAGroup] = 0;", "+= 0 * bin;"),
    "ids may repeat": (HEADER, "return w.marks[1] - static_cast<int64_t>(w.set_bits);", "return 0 * w.marks[1];"),
    "the map is that of one rank": (SELECT, "if (ranks > 1) {", "if (false) {"),
}  # fmt: skip


class Steps:
    """entcov._cpu, with the launchers of selections made of sources that may have a fault."""

    def __init__(self, folder: Path, file: str, old: str, new: str):
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
        text = (ROOT / "csrc" / file).read_text()
        assert not old or text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
        (folder / "csrc" / file).write_text(text.replace(old, new) if old else text)
        source, library = Path(__file__).with_name("select_steps.cpp"), folder / "steps.so"
        flags = ["-std=c++17", "-O0", "-fPIC", "-shared", f"-I{folder / 'csrc'}"]
        run_compiler([*compiler(), *flags, str(source), "-o", str(library)])
        self.library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str):
        return getattr(_cpu, name)

    def call(self, name: str, *args) -> None:
        def native(x):
            if isinstance(x, (tuple, list)):
                kind = ctypes.c_double if isinstance(x[0], float) else ctypes.c_int64
                return (kind * len(x))(*x)
            return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)

        getattr(self.library, name)(*map(native, args))

    def token_sums(self, values, mask, T, sums, _):
        self.call("token_sums", values[0], values[1], len(values[1]), mask, T, sums)

    def token_scores(self, values, mask, T, *rest):
        self.call("token_scores", values[0], values[1], len(values[1]), mask, T, *rest[:-1])

    def token_select(self, tokens, T, spec, ranks, first, last, workspace, outputs, _):
        kind, strict, round_up, low, high, ratio, *numbers = spec
        numbers = (kind, int(strict), int(round_up), *numbers)
        self.call("token_select", tokens, T, numbers, (low, high, ratio), ranks, first, last, workspace, outputs)

    def token_summary(self, *args):
        self.call("token_summary", *args[:-1])


def checked(monkeypatch) -> None:
    T, g = 1500, torch.Generator().manual_seed(0)
    logprob, advantage = -2 * torch.rand(T, generator=g), torch.randint(-3, 4, (T,), generator=g).float()
    logprob[: T // 2] = logprob[: T // 2].round()  # ties
    mask, ids = torch.rand(T, generator=g) < 0.8, torch.randperm(3 * T, generator=g)[:T]
    exclude = torch.rand(T, generator=g) < 0.3
    scores = token_covariance(logprob, advantage, mask, denominator_eps=1.0)
    value, mean = in_torch.covariance(logprob, advantage, mask, 1.0)
    assert torch.equal(scores.value, value) and torch.equal(
        torch.stack([scores.mean_logprob, scores.mean_advantage]), mean
    )
    different = token_covariance(-torch.rand(T, generator=g), torch.randn(T, generator=g), mask)
    summary = [float(x) for x in covariance_summary(different).values()]
    assert summary == [float(x) for x in in_torch.summary(different.value, mask)]
    low = float(value[mask].median())
    for strict, seed, step in ((False, 1, 2), (True, 1, 3), (True, 2, 3)):
        call = dict(ratio=0.2, seed=seed, step=step, strict=strict, exclude=exclude if strict else None)
        expected = in_torch.select(value, mask, ids, interval=(low, 9.0), **call)
        assert torch.equal(select_clip_cov(scores, ids, low=low, high=9.0, **call).mask, expected.mask)
    everything = select_clip_cov(scores, ids, ratio=1.0, low=-99.0, high=99.0, seed=0, step=0)
    assert torch.equal(everything.mask, mask)
    for ratio in (0.0, 0.0505, 0.5):
        for round_up in (False, True):
            call = dict(ratio=ratio, seed=5, step=9, round_up=round_up)
            found, expected = select_largest(scores, ids, **call), in_torch.select(value, mask, ids, **call)
            assert torch.equal(found.mask, expected.mask) and float(found.threshold) == expected.threshold
    smallest = torch.where(mask, value, torch.inf).argsort()[:2]  # two tokens that are not chosen
    with pytest.raises(ValueError, match="at least 1 tokens have the id of another one"):
        select_largest(scores, ids.index_fill(0, smallest, 3 * T), ratio=0.05, seed=5, step=9)
    ranks = ThreadRanks(2, monkeypatch)

    def with_the_ids_of_another_rank(rank):
        own = token_covariance(logprob, advantage, mask, group=ranks)
        with pytest.raises(ValueError, match="token_id must be different for every unmasked token"):
            select_largest(own, ids, ratio=0.1, seed=0, step=0, group=ranks)
        return int(select_largest(own, ids + 3 * T * rank, ratio=0.1, seed=0, step=0, group=ranks).count)

    assert ranks.run(with_the_ids_of_another_rank) == [int(0.1 * 2 * int(mask.sum()))] * 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_selections_is_seen(name, tmp_path, monkeypatch):
    monkeypatch.setitem(core.KERNELS, "cpu", Steps(tmp_path, *FAULTS[name]))
    if name == "no fault":
        checked(monkeypatch)
        return
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        checked(monkeypatch)
