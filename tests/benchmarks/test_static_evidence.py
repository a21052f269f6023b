"""What the machine code of the CUDA kernels is like: the tool that tells, on kernels with known properties; and the
kernels themselves, which must not spill, must load 16 bytes at a time and must leave the memory the limit.
"""

import json
import platform
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import cuda_toolchain, sass, static_evidence
from benchmarks.static_evidence import Evidence

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="NVIDIA's compiler exists for Linux and Windows")
SCRATCH = Path(__file__).parent / "scratch_kernels.cu"

# Broken promises: issue slots, not the memory, limit these kernels. `busy` as compiled now, which must not grow; all
# others must stay below 1. `*`: bf16 and fp16. The last flag is 1 for rows on 16-byte boundaries; off them (0) vectors
# are cut out of two words.
NOT_MEMORY_BOUND = {
    ("covariance_stats_kernel<*,0,8>", "sm_100a"): 1.08,
    ("covariance_stats_kernel<*,0,1>", "sm_100a"): 1.18,
    ("row_stats_kernel<*,1,0,8>", "sm_100a"): 1.04,
    ("row_stats_kernel<*,1,0,1>", "sm_100a"): 1.02,
    # The pass of the clamp sorts every logit into one of three sets, which costs as much as the statistics themselves.
    ("clamped_stats_kernel<*,1>", "sm_90a"): 1.06,
    ("clamped_stats_kernel<*,0>", "sm_90a"): 1.15,
    ("clamped_stats_kernel<*,0>", "sm_80"): 1.04,
    ("clamped_stats_kernel<*,1>", "sm_100a"): 1.97,
    ("clamped_stats_kernel<*,0>", "sm_100a"): 2.06,
    ("clamped_stats_kernel<fp32,1>", "sm_100a"): 1.05,
    ("clamped_stats_kernel<fp32,0>", "sm_100a"): 1.14,
    ("clamp_partial_kernel<*,1>", "sm_90a"): 1.05,
    ("clamp_partial_kernel<*,0>", "sm_90a"): 1.12,
    ("clamp_partial_kernel<*,0>", "sm_80"): 1.04,
    ("clamp_partial_kernel<*,1>", "sm_100a"): 1.93,
    ("clamp_partial_kernel<*,0>", "sm_100a"): 2.03,
    ("clamp_partial_kernel<fp32,1>", "sm_100a"): 1.04,
    ("clamp_partial_kernel<fp32,0>", "sm_100a"): 1.12,
}


SAMPLING = {"clamp_sketch_kernel"}  # reads one sector in 20, and its loops are those of a selection in shared memory


def limit_of_busy(e: Evidence) -> float:
    return NOT_MEMORY_BOUND.get((re.sub("bf16|fp16", "*", e.kernel), e.arch), 1.0)


@pytest.fixture(scope="module")
def pinned():
    if not cuda_toolchain.candidates("nvcc") or not cuda_toolchain.candidates("nvdisasm"):
        pytest.fail(f"nvcc {cuda_toolchain.PINNED_NVCC} and nvdisasm are needed: {cuda_toolchain.INSTALL}")
    if (found := cuda_toolchain.version(cuda_toolchain.nvcc())) != cuda_toolchain.PINNED_NVCC:
        pytest.fail(f"numbers hold for nvcc {cuda_toolchain.PINNED_NVCC}, this is {found}: {cuda_toolchain.INSTALL}")


@pytest.fixture(scope="module")
def scratch(pinned) -> dict[tuple[str, str], Evidence]:
    return {(e.kernel, e.arch): e for e in static_evidence.gather([SCRATCH])}


@pytest.mark.parametrize("arch", cuda_toolchain.ARCHS)
def test_a_good_kernel_is_reported_as_such(arch, scratch):
    wide = scratch["wide<bf16>", arch]
    assert (wide.spill_bytes, wide.stack_bytes, wide.local_accesses) == (0, 0, 0)
    assert (wide.threads, wide.shared_bytes) == (256, 1024)
    assert wide.registers <= 32 and wide.occupancy == 1.0
    assert wide.load_widths == [16, 16] and wide.store_widths == [] and wide.wide_share == 1.0
    assert wide.logits == 16 and wide.ex2_per_logit == 1.0
    assert wide.busy < 1 and wide.busiest == "xu"
    # One EX2 takes a warp 2 cycles, 16 of them 32; the memory brings the warp's 1,024 bytes meanwhile.
    assert wide.busy == pytest.approx(32 * static_evidence.specification(arch).bytes_per_cycle / 1024)


@pytest.mark.parametrize("arch", cuda_toolchain.ARCHS)
def test_bad_kernels_are_reported_as_such(arch, scratch):
    spilling = scratch["spilling<fp32>", arch]
    assert spilling.registers <= 32 and min(spilling.spill_bytes, spilling.stack_bytes, spilling.local_accesses) > 100
    narrow = scratch["narrow<fp32>", arch]
    assert narrow.load_widths == [4] and narrow.wide_share == 0.0 and narrow.logits == 1
    twice = scratch["twice<fp32>", arch]
    assert twice.ex2_per_logit == 2.0
    assert twice.load_widths == [16] and twice.store_widths == [16] and twice.wide_share == 1.0
    # 8 EX2 are 16 cycles of a warp; 512 bytes are read and 512 written.
    assert twice.busy == pytest.approx(16 * static_evidence.specification(arch).bytes_per_cycle / 1024)


@pytest.mark.parametrize("arch", cuda_toolchain.ARCHS)
def test_rare_branches_are_not_on_the_usual_way(arch, scratch):
    branching = scratch["branching<fp32>", arch]
    assert branching.ex2_per_logit == 1.0  # neither the way without any, nor the one with three more


@pytest.mark.parametrize("arch", cuda_toolchain.ARCHS)
def test_the_hot_loop_is_the_one_that_loads_most(arch, scratch):
    nested = scratch["nested<fp32>", arch]  # neither the loop over rows around it nor the one over single columns
    assert nested.load_widths == [16] and nested.logits == 4 and nested.ex2_per_logit == 1.0


def test_control_flow_out_of_line_makes_no_loop_of_its_own():
    """Blocks 0 -> 1 -> 2 -> 1, and 1 -> 3 -> 2, with 3 behind the loop: a branch back that closes no second loop."""
    text = """
\t.section\t.text.k,"ax",@progbits
k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR12][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   BRA.U UP1, `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   BRA.DIV UR4, `(.L_x_4) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
"""
    (kernel,) = sass.parse(text)
    assert [len(block) for block in kernel.blocks] == [1, 2, 2, 1, 2, 1, 1]
    (loop,) = kernel.loops
    assert kernel.hot_loop() is loop and loop.blocks == {1, 2, 4, 5}
    assert [i.address for i in loop.usual(1)] == [0x10, 0x20, 0x30, 0x40]
    assert [i.address for i in loop.usual(2)] == [0x10, 0x20, 0x60, 0x70, 0x80, 0x30, 0x40]


def test_names():
    file = "45_GLOBAL__N__c1ef5b03_12_row_stats_cu_bdb79c07"
    mangled = f"_ZN6entcov4cuda{file}16row_stats_kernelI13__nv_bfloat16Lb1ELb0ELi8EEEvNS1_1AE"
    assert static_evidence.readable(mangled) == "row_stats_kernel<bf16,1,0,8>"
    assert static_evidence.logit_bytes(mangled) == 2 and static_evidence.reads_twice(mangled)
    assert not static_evidence.reads_twice(mangled.replace("Lb1ELb0E", "Lb0ELb1E"))
    assert static_evidence.reads_twice("_Z4passI13__nv_bfloat16Lb0EEvv")  # no number behind the flag
    assert not static_evidence.reads_twice("_Z4passI13__nv_bfloat16Lb1EEvv")
    assert not static_evidence.reads_twice("_Z4passIfEvv")
    assert static_evidence.logit_bytes(mangled.replace("13__nv_bfloat16", "f")) == 4
    assert static_evidence.logit_bytes(mangled.replace("13__nv_bfloat16", "6__half")) == 2
    assert static_evidence.readable("_Z5mergePKf") == "merge" and static_evidence.logit_bytes("_Z5mergePKf") is None


def test_occupancy_by_hand():
    assert static_evidence.occupancy("sm_90a", 64, 0, 256) == 0.5  # 65,536 registers hold 1,024 such threads
    assert static_evidence.occupancy("sm_90a", 80, 0, 256) == 0.375  # 24 warps in 3 blocks
    assert static_evidence.occupancy("sm_80", 32, 0, 64) == 1.0  # 32 blocks are just enough
    assert static_evidence.occupancy("sm_80", 32, 40 << 10, 256) == 4 * 256 / 2048  # 164 KiB hold 4 of 41 KiB


def test_ptxas_without_a_report_is_an_error():
    with pytest.raises(RuntimeError, match="says nothing about the resources of k"):
        cuda_toolchain.parse_ptxas("ptxas info : Compiling entry function 'k' for 'sm_90a'\n")


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, pinned):
    report = tmp_path / "static.json"
    assert command.main(["static", str(SCRATCH), "--arch", "sm_90a", "--json", str(report)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("nvcc 13.0.88") and printed[1].split()[:3] == ["kernel", "arch", "regs"]
    found = {k["kernel"]: k for k in json.loads(report.read_text())["kernels"]}
    assert len(found) == len(printed) - 2 == 6
    assert found["twice<fp32>"]["ex2_per_logit"] == 2.0 and found["narrow<fp32>"]["wide_share"] == 0.0
    assert command.main(["static", str(SCRATCH), "--arch", "sm_75"]) == 2
    assert "--arch must be one of" in capsys.readouterr().out


def test_no_kernel_breaks_its_promises(pinned):
    """One test, so that parallel workers compile the kernels once. Prints every broken promise."""
    rows = static_evidence.gather(static_evidence.kernel_sources())
    streaming = [e for e in rows if e.logits is not None and e.kernel.split("<")[0] not in SAMPLING]
    # The op kernels are templates on the logits' type; the merges of [R, T, fields] are not.
    assert {e.kernel.split("<")[0] for e in streaming} >= {
        "row_stats_kernel", "logits_grad_kernel", "covariance_stats_kernel", "logit_covariance_grad_kernel",
        "clamped_stats_kernel", "clamp_partial_kernel",
    }  # fmt: skip
    assert all("<" in e.kernel for e in streaming) and all(e.logits for e in rows if "<" in e.kernel)
    broken = [f"{e.kernel} on {e.arch}: {what}" for e in rows for what in broken_promises(e)]
    assert not broken, "\n" + "\n".join(broken)
    bound = {(re.sub("bf16|fp16", "*", e.kernel), e.arch) for e in streaming if e.busy >= 1}
    assert bound == set(NOT_MEMORY_BOUND), f"memory-bound by now, strike out: {set(NOT_MEMORY_BOUND) - bound}"


def broken_promises(e: Evidence) -> list[str]:
    promises = {
        f"{e.spill_bytes} bytes spilled": e.spill_bytes == 0,
        f"{e.stack_bytes} bytes of stack": e.stack_bytes == 0,
        f"{e.local_accesses} accesses to local memory": e.local_accesses == 0,
        f"{e.registers} registers": e.registers <= 80,
        f"{e.threads} threads a block": e.threads is not None,
        f"{e.occupancy} occupancy": e.occupancy is not None and e.occupancy >= 0.375,
    }
    if e.logits is not None and e.kernel.split("<")[0] not in SAMPLING:
        promises |= {
            f"loads of {e.load_widths} and stores of {e.store_widths} bytes": e.wide_share == 1.0,
            f"{e.ex2_per_logit} exponentials a logit": 1.0 <= e.ex2_per_logit <= 1.15,
            f"busy {e.busy:.3f} ({e.busiest})": e.busy < limit_of_busy(e),
        }
    return [what for what, kept in promises.items() if not kept]
