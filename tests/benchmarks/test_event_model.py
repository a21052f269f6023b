"""The event model, on cases whose times are known by hand, and that it moves the right way with a kernel's design."""

import itertools
from dataclasses import replace

import pytest

from benchmarks import event_model, sass
from benchmarks.event_model import Cost, Design, Machine

COST = Cost(before=100, vector=64, after=80)  # about that of row_stats, bf16, on sm_90a
QUIET = 479.0


def cycles(steps, blocks=1, resident=1, warps=1, sms=1, rate=10.0, latency=QUIET, monkeypatch=None) -> float:
    machine = Machine(sms, rate, latency)
    machine._random.uniform = lambda low, high: 1.0
    return machine.run(blocks, resident, warps, lambda *block: steps(machine, *block)) - event_model.LAUNCH


def test_a_load_takes_its_bytes_and_the_latency():
    def steps(m, block, number, warp):
        yield "until", m.load(0, 2000)

    assert cycles(steps) == 2000 / 10 + QUIET
    assert cycles(steps, warps=3) == 3 * 2000 / 10 + QUIET  # in turn through the memory, the latencies at once
    assert cycles(steps, blocks=2, resident=2, sms=2) == 2 * 2000 / 20 + QUIET  # one memory of two shares
    # One block after the other: each waits for its own, and its place is taken again after a while.
    assert cycles(steps, blocks=2) == 2 * (2000 / 10 + QUIET) + event_model.LAUNCH


def test_what_lies_in_the_cache_takes_no_bandwidth_and_what_is_stored_does():
    def steps(m, block, number, warp):
        m.store(0, 5000)
        yield "until", m.load(0, 640, event_model.L2)
        assert m.now == event_model.LAUNCH + 640 / event_model.PORT + event_model.L2
        yield "until", m.load(0, 1000)
        assert m.bytes == 6000

    assert cycles(steps) == 6000 / 10 + QUIET


def test_four_schedulers_share_the_work_and_a_barrier_waits_for_the_last():
    def steps(m, block, number, warp):
        yield "work", 100
        yield ("barrier",)
        yield "work", 10 * (warp == 0)

    for warps, rounds in ((1, 1), (4, 1), (5, 2), (8, 2)):
        assert cycles(steps, warps=warps) == 100 * rounds + event_model.BARRIER + 10


def test_a_warp_that_has_ended_holds_up_no_barrier():
    def steps(m, block, number, warp):
        if warp == 1:
            yield "work", 500
            return
        yield ("barrier",)

    assert cycles(steps, warps=2) == 500 + event_model.BARRIER


def test_tiles_hold_every_byte_of_a_row_once():
    for columns, size, design in itertools.product(
        (1, 127, 19008, 40961, 151936), (2, 4), (Design(), Design(vectors=3))
    ):
        segments = list(design.tiles(columns, size))
        assert sum(sum(map(sum, tiles)) for tiles in segments) == -(-columns * size // 16) * 16
        assert len(segments) == -(-columns // 40960)
    (tiles,) = Design(vectors=4).tiles(19008, 2)  # 2,376 vectors: two tiles, and 328 of the third's 1,024
    assert [sum(tile) // 16 for tile in tiles] == [1024, 1024, 328]
    assert [Design(group=g).worked_on(tiles[2]) for g in (1, 2, 4)] == [2, 2, 4]


def share(name="row_stats", columns=19008, sms=1, latency=QUIET, **changes) -> float:
    design = replace(event_model.KERNELS[name][3], **changes)
    return event_model.share(name, columns, "bf16", "sm_90a", COST, sms, latency, design)


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(event_model, "ROWS", 2112)  # 16 a multiprocessor


def test_no_design_is_faster_than_the_memory_and_more_under_way_is_not_slower(few_rows):
    usual = share()
    assert 0.5 < usual < 1.0
    assert share(blocks=2) < usual < share(vectors=2, ahead=2)
    assert share(latency=2 * QUIET) < usual < share(sms=4)
    assert share(group=4) < usual  # works on vectors behind the row's end
    assert share(columns=4 * 19008) > usual  # starts and ends weigh less


def test_a_first_tile_that_does_not_wait_for_the_target_reads_rows_that_are_ignored(few_rows):
    assert share(early=True) > share()
    assert share(early=True, ignored=0.5) < 0.8 * share(ignored=0.5)


def test_the_clamp_is_a_phase_of_latencies_beside_a_pass(few_rows):
    clamp = Cost(before=100, vector=150, after=150)
    design = event_model.KERNELS["clamped_stats"][3]
    found = event_model.share("clamped_stats", 19008, "bf16", "sm_90a", clamp, 1, QUIET, design)
    assert found < 0.6 < share()


CODE = """
\t.section\t.text._Z9row_statsI13__nv_bfloat16Lb1EEvv,"ax",@progbits
k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, c[0x0][0x28] ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR12][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   MOV R1, R2 ;
        /*0060*/               @P1 EXIT ;
        /*0070*/                   MOV R1, R2 ;
        /*0080*/                   MOV R1, R2 ;
        /*0090*/                   EXIT ;
"""


def test_costs_are_those_of_the_machine_code():
    (kernel,) = sass.parse(CODE)
    # An exponential of a warp takes a scheduler's quarter of 16 lanes 8 cycles; the loop has 3 instructions.
    assert event_model.cost_of(kernel, "sm_90a") == Cost(before=2, vector=8, after=2)


def test_the_factor_is_read_from_the_tables_of_a_gpu_run():
    text = "\n".join((
        "kernels alone                                             us   min-max  TB/s  of ceiling",
        "row_stats                            8192 x 19008 bf16   110  108-115  2.83  90%",
        "row_stats, moments                   8192 x 19008 bf16   120  118-125  2.60  83%",
        "logits_grad                          8192 x 152064 bf16  900  890-950  2.77  -",
        "clamped_stats                        8192 x 152064 bf16  900  890-950  2.77  40%",
    ))  # fmt: skip
    predicted = {("row_stats", 19008, "bf16"): 0.9, ("clamped_stats", 152064, "bf16"): 0.8}
    factor, count = event_model.calibration(text, lambda *case: predicted[case])
    assert count == 2 and factor == pytest.approx((1.0 * 0.5) ** 0.5)
    assert event_model.calibration("**Not yet measured on a GPU.**", lambda *case: 1.0) == (1.0, 0)
