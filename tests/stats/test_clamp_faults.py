"""Faults planted in csrc/clamp.h, one at a time, and seen by the checks of the tests of the clamped entropy: wrong
values, ranks that differ, or more rounds than the data want."""

import ctypes
from pathlib import Path

import pytest
import torch

from entcov import _cpu
from entcov.ops import core
from tests.emulator.build import ROOT, compiler, run_compiler
from tests.support.clamp_oracle import adversarial, assert_exact, clamped, even_split, real_looking
from tests.support.thread_ranks import ThreadRanks

HEADER = ROOT / "csrc" / "clamp.h"
FAULTS = {
    "none": ("", ""),
    "ties are kept whole": ("clamp[1] = copies / static_cast<float>(equal);", "clamp[1] = 1.0f;"),
    "the threshold itself is not kept": ("rest += copies * e;", ""),
    "the threshold has no part in the mean": ("sum_xexp += copies * y * e;", ";"),
    "a maximum at the threshold counts twice": ("rest = copies - 1.0f", "rest = copies"),
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
    "sums keep their shard's maximum": ("sums.rest += rest * s.factor,", "sums.rest += rest,"),
    "the bracket begins at the rank": ("least = (kept + margin) * kSketch", "least = (kept - margin) * kSketch"),
}  # fmt: skip


@pytest.fixture
def faulty(request, tmp_path, monkeypatch):
    """Has clamp_bracket and clamp_refine of the CPU done by this header."""
    old, new = FAULTS[request.param]
    text = HEADER.read_text()
    assert not old or text.count(old) == 1, f"{old!r} is in {HEADER.name} {text.count(old)} times"
    (tmp_path / "clamp.h").write_text(text.replace(old, new) if old else text)
    library = tmp_path / "steps.so"
    source = Path(__file__).with_name("clamp_steps.cpp")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{tmp_path}", f"-I{HEADER.parent}"]
    run_compiler([*compiler(), *flags, str(source), "-o", str(library)])
    steps = ctypes.CDLL(str(library))

    class Kernels:
        def __getattr__(self, name):
            return step(name) if name in ("clamp_bracket", "clamp_refine") else getattr(_cpu, name)

    def step(name):
        def run(*args):
            members = [x for arg in args[:-1] for x in (arg if isinstance(arg, tuple) else (arg,))]
            getattr(steps, name)(*(ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x) for x in members))

        return run

    monkeypatch.setitem(core.KERNELS, "cpu", Kernels())
    return request.param


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


@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_a_fault_in_the_protocol_is_seen(faulty, monkeypatch):
    if faulty == "none":
        return judge(monkeypatch)
    with pytest.raises(AssertionError):
        judge(monkeypatch)
