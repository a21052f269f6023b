"""Plants faults in the headers that host and device share (csrc/*.h), one at a time. The checks of the tests see each:
wrong values, ranks that differ, ranks that disagree and are not refused, more rounds of a clamp than the data want."""

import ctypes
from pathlib import Path

import pytest
import torch

from entcov import _cpu
from entcov.ops import core
from entcov.ops.core import RowSpec
from entcov.ops.merge_row_stats import merge_row_stats
from entcov.ops.message import message
from entcov.stats import shards
from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import token_stats
from entcov.verify.check import check_rows
from tests.emulator import emulated
from tests.emulator.build import ROOT, compiler, run_compiler
from tests.support.clamp_oracle import adversarial, assert_exact, clamped, even_split, real_looking
from tests.support.thread_ranks import ThreadRanks

HEADERS = ROOT / "csrc"
CLAMP_FAULTS = {
    "none": ("", ""),
    "ties are kept whole": ("clamp[1] = copies / static_cast<float>(equal);", "clamp[1] = 1.0f;"),
    "the threshold itself is not kept": ("sum_exp_m1 += copies * e;", ""),
    "the threshold has no part in the mean": ("sum_xexp += copies * y * e;", ";"),
    "a maximum at the threshold counts twice": ("sum_exp_m1 = copies - 1.0f", "sum_exp_m1 = copies"),
    "the rank does not count what is above": ("rank = kept - above;", "rank = kept;"),
    "a missed bracket is searched on the wrong side": ("if (kept <= above) return {b.hi + 1u, order_key(max)",
                                                       "if (kept <= above) return {kLowestKey, b.lo"),
    "a cell may hold many values": ("single = single && first == last;", "single = true;"),
    "the first cell with logits is the threshold's": ("if (rank - before <= count[i]) {", "if (true) {"),
    "bits of one shard stand for all": ("&& here < unused) unused = here;", "&& r == 0) unused = here;"),
    "listed ties are one": ("same += other[k] == x;", "same = 1;"),
    "listed logits above the threshold are left out": ("if (x > found.threshold) sums.add(", "if (false) sums.add("),
    "maxima of other shards are left out": ("(p[kPartialMax] == max ? 0.0f : left_out)", "0.0f"),
    "each shard leaves the maximum out": ("if (p[kPartialMax] == max) sums.at_max += left_out;",
                                          "if (p[kPartialMax] == max && r == 0) sums.at_max += left_out;"),
    "sums keep their shard's maximum": ("sums.sum_exp_m1 += sum_exp_m1 * s.factor,", "sums.sum_exp_m1 += sum_exp_m1,"),
    "the bracket begins at the rank": ("least = (kept + margin) * kSketch", "least = (kept - margin) * kSketch"),
}  # fmt: skip


ROW_FAULTS = {  # header, old, new
    "no fault": ("row_stats.h", "", ""),
    "logprob without the temperature": ("row_stats.h", "(2.0f * inv_temperature) - log_total", "2.0f - log_total"),
    "entropy without the mean": ("row_stats.h", "const float entropy = log_total - mean;",
                                 "const float entropy = log_total;"),
    "varentropy is not centred": ("row_stats.h", "s.sum_x2exp / total - mean * mean", "s.sum_x2exp / total"),
    "drift without the token itself": ("row_stats.h", "mean_s - (p == 0.0f ? 0.0f : p * (entropy + logprob))",
                                       "mean_s"),
    "collision of unnormalised probabilities": ("row_stats.h", "collision = (1.0f + s.sum_exp2_m1) / (total * total);",
                                                "collision = (1.0f + s.sum_exp2_m1) / total;"),
    "ignored rows have a collision": ("row_stats.h", "if (out.collision) out.collision[t] = out.var",
                                      "if (out.collision) out.var"),
    "merged sums keep their maximum": ("row_stats.h", "r.sum_exp_m1 = hi.sum_exp_m1 + total * k;",
                                       "r.sum_exp_m1 = hi.sum_exp_m1 + total;"),
    "the lower maximum is forgotten": ("row_stats.h", "1.0f + lo.sum_exp_m1,", "lo.sum_exp_m1,"),
    "second moments move by the first power": ("row_stats.h", "k2 = k * k", "k2 = k"),
    "the first shard has the target": ("row_stats.h", "r.target = a.target > b.target ? a.target : b.target;",
                                       "r.target = a.target;"),
    "entropy change has the wrong sign": ("logit_covariance.h", "out.predicted_entropy_change[t] = -covariance;",
                                          "out.predicted_entropy_change[t] = covariance;"),
    "kl without the mean change": ("logit_covariance.h", "log_ratio - mean_d * unit;", "log_ratio;"),
    "covariance is not centred": ("logit_covariance.h", "s.sum_xd / total_old - mean_x * mean_d",
                                  "s.sum_xd / total_old"),
    "the reference's move is lost": ("logit_covariance.h", "r.sum_d += (p->sum_d + moved * total) * s.factor;",
                                     "r.sum_d += p->sum_d * s.factor;"),
    "calls are not compared": ("signature.h", "mine.call[0] != first.call[0] ||", ""),
    "half of the hash is not compared": ("signature.h", "mine.call[1] != first.call[1] ||", ""),
    "ranks that failed agree": ("signature.h", "|| mine.call[0] == 0) return false;", ") return false;"),
    "shards may overlap": ("signature.h", "if (clash) return false;", ""),
    "shards may leave a hole": ("signature.h", "(mine.columns == 0 || mine.start == before)", "true"),
    "shards may end early": ("signature.h", "all == vocab_size &&", ""),
}  # fmt: skip


class Steps:
    """entcov._cpu, with some of its launchers made of a header that may have a fault."""

    def __init__(self, folder, header, old, new):
        text = (HEADERS / header).read_text()
        assert not old or text.count(old) == 1, f"{old!r} is in {header} {text.count(old)} times"
        for path in HEADERS.glob("*.h"):
            (folder / path.name).write_text(path.read_text())
        (folder / header).write_text(text.replace(old, new) if old else text)
        source, library = Path(__file__).with_name("header_steps.cpp"), folder / "steps.so"
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{folder}"]
        run_compiler([*compiler(), *flags, str(source), "-o", str(library)])
        self.library = ctypes.CDLL(str(library))

    def call(self, name, *args):
        members = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
        getattr(self.library, name)(
            *(ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x) for x in members)
        )

    def clamp_bracket(self, *args):
        self.call("clamp_bracket", *args[:-1])

    def clamp_refine(self, *args):
        self.call("clamp_refine", *args[:-1])

    def merge_row_stats(self, *args):
        self.call("merge_row_stats", *args[:-1])

    def merge_covariance_stats(self, *args):
        self.call("merge_covariance_stats", *args[:-1])

    def row_stats(self, logits, target, spec, fields, stats, outputs, *rest):
        _cpu.row_stats(logits, target, spec, fields, stats, (0,) * 5, *rest)
        if outputs[0]:
            self.call("row_outputs", stats, logits[3], fields, float(spec[2]), outputs, target, spec[3])

    def covariance_stats(self, old, new, mask, spec, stats, outputs, *rest):
        _cpu.covariance_stats(old, new, mask, spec, stats, (0,) * 4, *rest)
        if outputs[0]:
            self.call("covariance_outputs", stats, new[3], float(spec[2]), outputs)

    def __getattr__(self, name):
        return getattr(_cpu, name)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    with emulated.fresh_memory_is_nan():
        yield lambda header, old, new: monkeypatch.setitem(core.KERNELS, "cpu", Steps(tmp_path, header, old, new))


def judge(monkeypatch):
    """Raises an AssertionError where something is wrong."""
    for V, kinds in ((100, ("two values", "all equal", "signed zeros")), (3000, adversarial(8))):
        for kind in kinds:
            for dtype in (torch.bfloat16, torch.float32):
                rows = adversarial(V)[kind][:2].to(dtype)
                for kept in (1, V // 3, int(0.67 * V)):
                    splits = [even_split(V, 2), [0, V // 7, V // 7, V // 2, V]]
                    assert_exact(rows, kept, monkeypatch=monkeypatch, splits=splits)
    V = 152064
    for mean, kept, dtype, collectives in (
        (8.0, V - int(0.33 * V), torch.bfloat16, 2),
        (-8.0, 8000, torch.bfloat16, 2),
        (0.0, V - int(0.45 * V), torch.float32, 3),
    ):
        ranks = ThreadRanks(4, monkeypatch)
        clamped(ranks, real_looking(2, V, dtype, mean), even_split(V, 4), top_k=kept)
        assert ranks.collectives == collectives, (mean, kept, ranks.collectives)


@pytest.mark.parametrize("fault", CLAMP_FAULTS)
def test_a_fault_in_the_clamp_is_seen(fault, plant, monkeypatch):
    plant("clamp.h", *CLAMP_FAULTS[fault])
    if fault == "none":
        return judge(monkeypatch)
    with pytest.raises(AssertionError):
        judge(monkeypatch)


def judge_rows(monkeypatch):
    """Raises an AssertionError where a value is wrong, or shards that do not agree are not refused."""
    lines = check_rows(((3, 7), (4, 300)), ("float32",), ops=("token_stats", "logit_covariance"))
    wrong = [line.cells() for line in lines if not line.passed]
    assert not wrong, wrong[:3]
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 3
    changed, target = logits.roll(1, 0), torch.tensor([0, 299, -100, 130])

    def call(rank, ranks, start, vocab_size, temperature=1.0):
        own = slice(start, start + 100)
        settings = {"group": ranks, "vocab_start": start, "vocab_size": vocab_size, "temperature": temperature}
        stats = token_stats(logits[:, own], target, moments=True, **settings)
        change = logit_covariance(logits[:, own], changed[:, own], loss_mask=target >= 0, **settings)
        return [*(x for x in stats if x is not None), *change]

    def of_ranks(*places, **differently):
        ranks = ThreadRanks(len(places), monkeypatch)
        return ranks.run(lambda r: call(r, ranks, *places[r], **(differently if r == 1 else {})))

    settings = {"temperature": 1.0}
    whole = [
        *token_stats(logits, target, moments=True, **settings),
        *logit_covariance(logits, changed, loss_mask=target >= 0),
    ]
    expected = [x for x in whole if x is not None]
    assert all((x[target < 0] == 0).all() for x in expected)
    for found in of_ranks((0, 300), (100, 300), (200, 300)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(shards.ranks, "host_may_read", lambda device: False)
    counted = target >= 0
    for places, differently in (
        (((0, 300), (100, 300), (200, 300)), {"temperature": 1.5}),
        (((0, 300), (100, 300), (100, 300)), {}),
        (((0, 300), (100, 300), (150, 300)), {}),
        (((0, 300), (100, 300), (205, 300)), {}),
        (((0, 350), (100, 350), (200, 350)), {}),
        (((0, 200), (0, 200)), {}),
        (((0, 150), (60, 150)), {}),
    ):
        for found in of_ranks(*places, **differently):
            assert all(x[counted].isnan().all() for x in found[:2] + found[5:]), (places, differently)
    failed = [message(torch.zeros(4, 4), target, 0, start, 150)[None] for start in (0, 150)]
    merged = merge_row_stats(torch.cat(failed), target, RowSpec(0, 300))
    assert merged[1][counted].isnan().all()
    alike = [message(torch.ones(4, 4), target, 3, start, 150) for start in (0, 150)]
    for word in (0, 1):
        spoiled = alike[1].clone()
        spoiled[-4 + word : -3 + word or None].view(torch.int32).bitwise_xor_(1 << 20)
        assert merge_row_stats(torch.stack((alike[0], spoiled)), target, RowSpec(0, 300))[1][counted].isnan().all()


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_fault_in_rows_or_signatures_is_seen(fault, plant, monkeypatch):
    plant(*ROW_FAULTS[fault])
    if fault == "no fault":
        return judge_rows(monkeypatch)
    with pytest.raises(AssertionError):
        judge_rows(monkeypatch)
