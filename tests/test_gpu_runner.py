"""`python -m benchmarks gpu` without a GPU: a whole rehearsal, and the parts that must not go wrong when it counts."""

import json
import os
import subprocess
import sys
import time
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_toolchain, static_evidence
from benchmarks.gpu import ceilings, checks, contenders, measurements, report, rivals, runner, timing, workloads
from benchmarks.gpu.contenders import Contender
from benchmarks.gpu.stages import Context, Stage, command, execute
from benchmarks.gpu.worker import Worker
from entcov import ops
from tests import on_device

ROOT = Path(__file__).parent.parent


def context(tmp_path, seconds=60.0, rivals=None) -> Context:
    return Context(tmp_path, "cpu", rivals, time.monotonic() + seconds, "abc123")


def test_a_rehearsal_goes_through_every_stage(tmp_path):
    results = runner.RESULTS.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path), "--seconds", "3000"],
        cwd=ROOT, capture_output=True, text=True, timeout=3000,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},  # compiling takes longer than the rest
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    stages = found["stages"]
    assert found["rehearsal"] and list(stages) == [stage.name for stage in runner.STAGES]
    assert {name: s["status"] for name, s in stages.items()} == {
        "environment": "passed", "build": "not run", "device tests": "passed", "benchmarks": "passed",
        "op tests": "passed", "rivals": "not run", "sanitizer": "not run", "selection": "passed",
    }  # fmt: skip
    assert stages["op tests"]["passed"] > 50 and stages["device tests"]["passed"] > 30
    records = stages["benchmarks"]["measurements"]
    assert {r["contender"] for r in records} == set(contenders.OWN)
    assert {r["workload"] for r in records} == set(workloads.WORKLOADS)
    mine = [r for r in records if r["contender"] == "entcov" and r["workload"] == "token_stats" and "pass" in r]
    assert [(r["dtype"], r["pass"], r["bytes_per_logit"]) for r in mine] == [
        ("bf16", "forward", 2), ("bf16", "forward+backward", 6),
        ("fp32", "forward", 4), ("fp32", "forward+backward", 12),
    ]  # fmt: skip
    assert all(max(r["errors"]["logprob"], r["errors"]["entropy"]) < 1e-5 for r in mine)
    assert all(r["errors"]["gradient"] < (1e-6 if r["dtype"] == "fp32" else 2**-7) for r in mine)
    assert all(max(r["errors_minus_infinity"].values()) < 2**-7 for r in mine)
    eager = next(r for r in records if r["contender"] == "eager torch" and "errors_minus_infinity" in r)
    assert eager["errors_minus_infinity"]["entropy"] == "nan"  # 0 * -inf, as its users know it
    assert {r["ceiling"] for r in stages["benchmarks"]["ceilings"]} == {"read", "copy"}
    assert {r["kernel"] for r in records if "kernel" in r} >= {
        "row_stats",
        "logits_grad_ (in place)",
        "covariance_stats",
        "head, logits kept",
    }
    assert {r["kernel"]: r["bare"] for r in records if "bare" in r} == {
        "head, logits kept": "three products", "head, chunks": "four products"
    }  # fmt: skip
    assert " x three products" in done.stdout
    selections = {(r["selection"], r["name"]): r["chosen"] for r in stages["selection"]["selections"]}
    assert selections["KL-Cov", "entcov"] == selections["KL-Cov", "nonzero + topk"] == 1  # of 1,000 tokens
    assert "REHEARSAL" in done.stdout and "wrong: entropy, gradient" in done.stdout
    assert "## CPU rehearsal" in (tmp_path / "RESULTS.md").read_text()
    assert runner.RESULTS.read_text() == results  # a rehearsal leaves the measurements alone


def test_without_a_gpu_the_real_run_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from benchmarks.__main__ import main

    assert main(["gpu", "--out", str(tmp_path)]) == 1
    assert "torch sees no GPU" in capsys.readouterr().out
    assert main(["gpu", "--rehearse", "--only", "bulid"]) == 2
    assert "--only must name stages" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: python -m benchmarks" in capsys.readouterr().out


def test_the_run_starts_where_entcov_is_not_built(tmp_path):
    """It has to: its own build stage builds it. What needs entcov fails then, and nothing else."""
    without = (
        "import sys; sys.modules['entcov'] = None; from benchmarks.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    for stage, code in (("environment", 0), ("benchmarks", 1)):
        done = subprocess.run(
            [sys.executable, "-c", without, "gpu", "--rehearse", "--only", stage, "--out", str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
    assert (
        "import of entcov halted"
        in json.loads((tmp_path / "results.json").read_text())["stages"]["benchmarks"]["reason"]
    )


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_is_a_finding_and_one_without_time_is_not_run(tmp_path):
    def broken(context, seconds):
        raise ValueError("no such thing")

    failed = execute(Stage("broken", 10, broken), context(tmp_path))
    assert failed["status"] == "failed" and failed["reason"] == "ValueError: no such thing"
    given = []
    execute(Stage("short", 30, lambda c, seconds: given.append(seconds) or {"status": "passed"}), context(tmp_path, 12))
    assert 10 < given[0] <= 12  # never more than the run has left
    real = replace(context(tmp_path, 60), device="cuda")  # a rehearsal measures nothing, so its stages may take longer
    execute(Stage("its own", 5, lambda c, seconds: given.append(seconds) or {"status": "passed"}), real)
    assert given[-1] == 5
    late = execute(Stage("late", 30, broken), context(tmp_path, 1))
    assert late["status"] == "not run" and late["reason"] == "no time left"


def test_a_command_that_runs_too_long_is_stopped_with_all_it_started(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print('child', p.pid, flush=True); p.wait()"
    start = time.monotonic()
    done = command([sys.executable, "-c", child], tmp_path / "log", 1.5)
    assert done.code is None and done.verdict == "partial" and time.monotonic() - start < 10
    assert "stopped after 2 s" in done.why(1.5)
    pid = int(done.output.split()[1])
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's child is still running")


def test_the_reports_of_pytest_and_of_the_sanitizer_are_read(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="off by 2&#10;x"/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error message="boom"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = checks.read_junit(tmp_path / "r.xml")
    assert found == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["b: off by 2", "d: boom"]}
    ran = "sanitizer target: all ops ran, 330 calls\n"
    assert checks.read_sanitizer(ran + "========= ERROR SUMMARY: 0 errors\n", 0)["status"] == "passed"
    ours = (
        "========= Invalid __global__ read of size 16 bytes\n"
        "=========     at void entcov::cuda::<unnamed>::row_stats_kernel<__nv_bfloat16>(RowStatsArgs)+0x1a0\n"
    )
    found = checks.read_sanitizer(ours + ran + "========= ERROR SUMMARY: 1 error\n", 0)
    assert found["status"] == "failed" and found["in_entcov"] == 1 and found["errors"] == 1
    race = "========= Error: Race reported between Write access at void entcov::cuda::k()+0x10\n"
    assert checks.read_sanitizer(race + ran + "========= RACECHECK SUMMARY: 1 hazard displayed\n", 0)["in_entcov"] == 1
    others = "========= Uninitialized __global__ memory read\n=========     at at::native::copy_kernel()+0x10\n"
    found = checks.read_sanitizer(others + ran + "========= ERROR SUMMARY: 3 errors\n", 0)
    assert found == {"status": "passed", "errors": 3, "in_entcov": 0}  # not ours, but counted
    assert checks.read_sanitizer("========= Error: Device not supported\n", 1)["status"] == "failed"
    assert checks.read_sanitizer(ran, None)["status"] == "partial"


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_overwritten_inputs_are_put_right():
    order = []
    calls = {
        "a": timing.Call(lambda turn: order.append(f"a{turn}")),
        "b": timing.Call(lambda turn: order.append(f"b{turn}"), lambda turn: order.append("restore")),
    }
    times = timing.in_turns(calls, "cpu", turns=4, seconds=0.0)  # no time: 3 turns at least
    measured = order[2 * timing.WARM_UP + timing.WARM_UP :]
    assert measured == ["a0", "restore", "b0", "a1", "restore", "b1", "a2", "restore", "b2"]
    assert len(times["a"]) == len(times["b"]) == 3
    assert timing.input_sets(311 << 20, 50 << 20) == 2 and timing.input_sets(10 << 20, 50 << 20) == 20


def test_a_contender_that_overwrites_its_inputs_gets_its_own():
    def destroying(logits, target):
        result = {"logprob": logits.float().sum(-1)}
        logits.detach().fill_(7.0)
        return result

    worker = Worker(Contender("x", "here", {}), "cpu", 4, time.monotonic() + 9)
    contender = Contender("x", "here", {"token_stats": destroying}, overwrites=lambda dtype, backward: True)
    sets = [workloads.TOKEN_STATS.make(4, 10, torch.float32, "cpu", seed) for seed in (0, 1)]
    originals = [logits.clone() for logits, _ in sets]
    call = worker.call(workloads.TOKEN_STATS, contender, sets, torch.float32, "forward")
    for turn in range(4):
        call.restore(turn)
        assert torch.equal(call.run(turn)["logprob"], originals[turn % 2].sum(-1))
    assert all(torch.equal(a, b) for (a, _), b in zip(sets, originals, strict=True))


def test_errors_are_those_against_float64():
    logits, target = workloads.TOKEN_STATS.make(5, 40, torch.float32, "cpu", 0)

    def off(logits, target):
        log_p = torch.log_softmax(logits, -1)
        return {"logprob": log_p.gather(-1, target[:, None])[:, 0] + 0.25, "entropy": -(log_p.exp() * log_p).sum(-1)}

    found = workloads.errors(workloads.TOKEN_STATS, off, (logits, target))
    assert found["logprob"] == pytest.approx(0.25, abs=1e-5) and found["entropy"] < 1e-5 and found["gradient"] < 1e-5
    assert workloads.largest(torch.tensor([1.0, torch.inf]), torch.tensor([1.5, torch.inf])) == 0.5
    assert workloads.largest(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])) != 0  # NaN is no agreement


def test_an_entcov_that_is_wrong_fails_the_stage(tmp_path, monkeypatch):
    record = {"contender": "entcov", "workload": "token_stats", "columns": 9, "dtype": "bf16"}
    for errors, status in (({"logprob": 1e-6, "entropy": 2e-6}, "passed"), ({"logprob": "nan"}, "failed"),
                           ({"logprob": 1e-6, "entropy": 1e-4}, "failed")):  # fmt: skip
        line = json.dumps({**record, "errors": errors})
        done = types.SimpleNamespace(code=0, output=f"a library's chatter\n{line}\n" + '{"cut off', why=lambda s: "")
        monkeypatch.setattr(measurements, "command", lambda *_, done=done: done)
        assert measurements.ours(context(tmp_path), 60)["status"] == status


WRONG_TRL = """
import torch
def selective_log_softmax_and_entropy(logits, index):
    if logits.dtype == torch.float32:
        raise RuntimeError("no fp32 today")
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, index[:, None])[:, 0], (log_p.exp() * log_p).sum(-1)  # the sign is wrong
"""


def test_rivals_that_fail_or_are_wrong_are_reported(tmp_path):
    folder = tmp_path / "rivals"
    folder.mkdir()
    with zipfile.ZipFile(folder / "trl-1.16.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("trl/__init__.py", "raise ImportError('needs half an ecosystem')")
        wheel.writestr("trl/kernels/__init__.py", "raise ImportError('so does this')")
        wheel.writestr("trl/kernels/logprob_entropy.py", WRONG_TRL)
    found = measurements.rivals(context(tmp_path, rivals=folder), 60)
    assert found["status"] == "passed"
    trl = [r for r in found["measurements"] if r["contender"] == "TRL"]
    measured = [r for r in trl if "median_us" in r]
    assert {r["dtype"] for r in measured} == {"bf16"} and measured[0]["source"] == "trl-1.16.0-py3-none-any.whl"
    assert all(r["errors"]["logprob"] < 1e-5 and r["errors"]["entropy"] > 5 for r in measured)
    (failure,) = [r for r in trl if "failure" in r]
    assert failure["dtype"] == "fp32" and "RuntimeError: no fp32 today (logprob_entropy.py" in failure["failure"]
    absent = {r["contender"]: r["failure"] for r in found["measurements"] if r["contender"] != "TRL"}
    assert absent["verl"] == "not in the folder: verl==0.9.1, megatron-core==0.16.1"
    assert set(absent) | {"TRL"} == set(rivals.RIVALS)
    nothing = measurements.rivals(context(tmp_path), 60)
    assert nothing["status"] == "not run"


# ---- results --------------------------------------------------------------------------------------------------------


def test_results_keep_the_newest_run_of_each_device(tmp_path):
    def renewed(text, device, number):
        run = context(tmp_path)
        run.results = {
            "environment": {"status": "passed", "seconds": 1.0, "device": device, "driver": "580.1", "commit": number},
            "benchmarks": {"status": "passed", "seconds": 2.0, "ceilings": [], "measurements": []},
        }
        return report.renew(text, run)

    text = runner.RESULTS.read_text()
    first = renewed(text, "NVIDIA H100", "commit-one")
    assert "Not yet measured" not in first and "commit-one" in first and first.startswith("# Measurements on GPUs")
    both = renewed(first, "NVIDIA B200", "commit-two")
    again = renewed(both, "NVIDIA H100", "commit-three")
    assert "commit-one" not in again and "commit-two" in again and "commit-three" in again
    assert again.count("## NVIDIA H100") == again.count("## NVIDIA B200") == 1


def test_a_row_of_the_table():
    record = {"contender": "x", "outputs": ["logprob", "entropy"], "median_us": 104.0, "tb_per_s": 3.0,
              "peak_bytes": 2**21, "slower_than_entcov": {"median": 1.25},
              "errors": {"logprob": 1e-6, "entropy": 3e-6, "gradient": "nan"},
              "errors_minus_infinity": {"logprob": 1e-6, "entropy": "nan", "gradient": 0.001}}  # fmt: skip
    cells = report.row("x", [{**record, "pass": "forward"}], {"read": 3.2, "copy": 3.0})
    assert cells == ["x", "logprob entropy", "104", "3.00", "94%", "1.25", "-", "-", "-", "-", "2", "3e-06", "nan",
                     "wrong: entropy"]  # fmt: skip


# ---- tests on a device ----------------------------------------------------------------------------------------------


def test_tensors_move_with_their_strides_and_shared_memory():
    memory = torch.arange(40.0)
    rows, same = memory.as_strided((3, 4), (7, 1), 5), memory[5:9].expand(2, 4)
    known = {}
    there, also = on_device.moved(rows, "cpu", known), on_device.moved(same, "cpu", known)
    assert (there.stride(), there.storage_offset()) == ((7, 1), 5) and torch.equal(there, rows)
    assert also.stride() == (0, 1) and torch.equal(also, same)
    there[0, 0] = -1.0
    assert also[1, 0] == -1.0 and memory[5] == 5.0  # one copy of the memory, and not the original

    in_place = on_device.on_device(ops.logits_grad_, "cpu", in_place=True)
    logits = torch.randn(2, 9).as_strided((2, 4), (5, 1))
    target, weight = torch.tensor([0, 3]), torch.ones(2)
    stats = ops.row_stats(logits, target, 0, 4, 1.0, False, -100)
    expected = ops.logits_grad(logits, target, stats, weight, None, None, None, 0, 4, 1.0, -100)
    version = logits._version
    in_place(logits, target, stats, weight, None, None, None, 0, 4, 1.0, -100)
    assert torch.equal(logits, expected) and logits._version == version + 1


@pytest.mark.skipif(not cuda_toolchain.candidates("nvcc"), reason="no nvcc")
def test_the_ceilings_are_memory_bound_by_construction(tmp_path):
    found = {(e.kernel, e.arch): e for e in static_evidence.gather([ROOT / "benchmarks" / "gpu" / "ceilings.cu"])}
    assert {kernel for kernel, _ in found} == {"read_kernel", "copy_kernel"}
    for (kernel, _), e in found.items():
        assert e.load_widths == [16] * 4 and e.store_widths == ([16] * 4 if kernel == "copy_kernel" else [])
        assert e.busy < 0.5 and e.spill_bytes == 0 and e.occupancy == 1.0
    library = ceilings.compile_library(tmp_path, "sm_90")
    assert library.entcov_read and library.entcov_copy  # links, and loads without a driver
