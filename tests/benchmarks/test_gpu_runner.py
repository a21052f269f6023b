"""`python -m benchmarks gpu` without a GPU: a whole rehearsal, and the parts that must not go wrong when it counts."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_toolchain, static_evidence
from benchmarks.gpu import (
    ceilings,
    checks,
    contenders,
    measurements,
    outcomes,
    report,
    results,
    rivals,
    roofline,
    runner,
    sanitizer_target,
    stages,
    timing,
    training,
    workloads,
)  # fmt: skip
from benchmarks.gpu.contenders import Contender
from benchmarks.gpu.stages import Context, Stage, command, execute, limit
from benchmarks.gpu.worker import Worker
from entcov.ops import core
from tests.support import local_ops, on_device
from tests.support.processes import run_command

ROOT = Path(__file__).parents[2]


def context(tmp_path, seconds=60.0, rivals=None, device="cpu") -> Context:
    return Context(tmp_path, tmp_path, device, rivals, None, time.monotonic() + seconds, "abc123")


def documented_commands() -> list[list[str]]:
    """The stages of each of the commands in docs/gpu.md into which half an hour is divided."""
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python -m benchmarks gpu") and "--only" in line]
    return [command[command.index("--only") + 1 : command.index("--commit")] for command in commands]


def rehearse(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    """On one core: of the two that CI has, other tests keep the second busy, and threads would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))[:1]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--out", str(out), "--seconds", "3000", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=3000, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},  # compiling takes longer than all the rest
    )  # fmt: skip


def test_three_commands_rehearse_every_stage_and_add_to_one_result(tmp_path):
    results_before, printed = runner.DOCUMENT.read_text(), ""
    parts = documented_commands()
    assert len(parts) == 3
    assert [*(s.name for s in runner.ALWAYS), *(s for part in parts for s in part)] == [s.name for s in runner.STAGES]
    for part in parts:
        assert sum(stage.seconds for stage in runner.STAGES if stage in runner.ALWAYS or stage.name in part) <= 480
    for n, part in enumerate(parts):
        # The last is on a fresh machine: what it goes on from comes along as a file.
        out = tmp_path / ("first" if n < 2 else "fresh")
        merge = [] if n < 2 else ["--merge", str(tmp_path / "first" / "results.json")]
        done = rehearse(out, "--only", *part, *merge, "--commit", "abc123")
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
        assert {path.name for path in out.iterdir()} <= {"results.json", "RESULTS.md", "logs.tar.gz", "roofline.png"}
    (run,) = json.loads((tmp_path / "fresh" / "results.json").read_text())["runs"]
    stages = run["stages"]
    assert run["rehearsal"] and set(stages) == {stage.name for stage in runner.STAGES}
    assert {name: s["status"] for name, s in stages.items()} == {
        "environment": "passed", "build": "not run", "device tests": "passed", "benchmarks": "passed",
        "op tests": "passed", "rivals": "not run", "sanitizer": "not run", "selection": "passed",
        "training": "passed", "megatron": "passed" if find_spec("mbridge") else "not run",
    }  # fmt: skip
    assert "its program ran" in stages["sanitizer"]["reason"]
    assert stages["op tests"]["passed"] > 10 and stages["device tests"]["passed"] > 10
    check_measurements(stages["benchmarks"])
    check_training(stages)
    assert " x three products" in printed
    selections = {(r["selection"], r["name"]): r["chosen"] for r in stages["selection"]["selections"]}
    assert selections["KL-Cov", "entcov"] == selections["KL-Cov", "nonzero + topk"] == 1  # of 1,000 tokens
    assert "REHEARSAL" in printed and "wrong: entropy, gradient" in printed
    text = (tmp_path / "fresh" / "RESULTS.md").read_text()
    assert "## CPU rehearsal" in text and "KL-Cov" in text and "the tiny recipe" in text
    assert runner.DOCUMENT.read_text() == results_before  # a rehearsal leaves the measurements alone
    assert (tmp_path / "first" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    with tarfile.open(tmp_path / "first" / "logs.tar.gz") as logs:  # of both commands
        assert {"logs/sanitizer_target.log", "logs/worker entcov.log"} <= set(logs.getnames())


def check_measurements(found: dict) -> None:
    records = found["measurements"]
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
    assert {r["ceiling"] for r in found["ceilings"]} == {"read", "copy"}
    assert {r["kernel"] for r in records if "kernel" in r} >= {
        "row_stats", "logits_grad_ (in place)", "covariance_stats", "head, logits kept",
    }  # fmt: skip
    assert {r["kernel"]: r["bare"] for r in records if "bare" in r} == {
        "head, logits kept": "three products", "head, chunks": "four products"
    }  # fmt: skip


def check_training(stages: dict) -> None:
    steps = stages["training"]["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3] and steps[0]["actor/grad_norm"] > 0
    if stages["megatron"]["status"] == "passed":
        assert stages["megatron"]["off_torch_actor"] < 1e-4  # the same weights and draws, and nothing has been updated


def test_without_a_gpu_the_real_run_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from benchmarks.__main__ import main

    assert main(["gpu", "--out", str(tmp_path)]) == 1
    assert "torch sees no GPU" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: python -m benchmarks" in capsys.readouterr().out


def test_what_the_command_cannot_use_is_said(tmp_path, capsys):
    from benchmarks.__main__ import main

    (tmp_path / "other.json").write_text('{"stages": {}}')
    for arguments, message in (
        (["--only", "bulid"], "--only must name stages"),
        (["--rivals", f"{tmp_path}/none"], "--rivals must be a folder (`python -m benchmarks rivals FOLDER`"),
        (["--wheels", f"{tmp_path}/none"], f"got {tmp_path}/none"),
        (["--merge", f"{tmp_path}/none.json"], "none.json must be a results.json of this command"),
        (["--merge", f"{tmp_path}/other.json"], "other.json must be a results.json of this command, got KeyError"),
    ):  # fmt: skip
        assert main(["gpu", "--rehearse", "--out", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().out


def test_the_run_starts_where_entcov_is_not_built(tmp_path):
    """It has to: its own build stage builds it. What needs entcov fails then, and nothing else."""
    without = (
        "import sys; sys.modules['entcov'] = None; from benchmarks.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", without, "gpu", "--rehearse", "--only", "benchmarks", "--out", tmp_path]
    done = run_command(words, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    (run,) = results.load(tmp_path / "results.json")
    assert run["stages"]["environment"]["status"] == "passed"
    assert "import of entcov halted" in run["stages"]["benchmarks"]["reason"]


def test_what_a_killed_command_had_measured_is_kept(tmp_path, monkeypatch):
    def measure(context, seconds):
        context.log("long").write_text("halfway")
        context.keep({"status": "passed", "ceilings": [], "measurements": [{"contender": "entcov", "failure": "x"}]})
        raise KeyboardInterrupt

    environment = Stage("environment", 1, lambda c, s: {"status": "passed", "device": "CPU rehearsal"})
    monkeypatch.setattr(
        runner, "STAGES", [environment, Stage("benchmarks", 9, measure), Stage("selection", 9, measure)]
    )
    with pytest.raises(KeyboardInterrupt):
        runner.run(types.SimpleNamespace(
            rehearse=True, out=tmp_path, only=None, merge=None, rivals=None, wheels=None, seconds=60, commit="abc",
        ))  # fmt: skip
    (run,) = results.load(tmp_path / "results.json")
    assert list(run["stages"]) == ["environment", "benchmarks"]
    found = run["stages"]["benchmarks"]
    assert (found["status"], found["reason"]) == ("partial", "was not finished")
    assert found["measurements"] == [{"contender": "entcov", "failure": "x"}]
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        assert logs.extractfile("logs/long.log").read() == b"halfway"


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_is_a_finding_and_one_without_time_is_not_run(tmp_path):
    def broken(context, seconds):
        raise ValueError("no such thing")

    failed = execute(Stage("broken", 10, broken), context(tmp_path), 60)
    assert failed["status"] == "failed" and failed["reason"] == "ValueError: no such thing"
    late = execute(Stage("late", 30, broken), context(tmp_path), 1)
    assert late["status"] == "not run" and late["reason"] == "no time left"


def test_stages_share_the_time_in_proportion_and_leave_what_they_do_not_need():
    a, b, c = (Stage(name, seconds, None) for name, seconds in (("a", 20), ("b", 100), ("c", 280)))
    assert limit([a, b, c], 400) == 20 and limit([a, b, c], 800) == 40  # --seconds makes them all longer
    assert limit([b, c], 399) == 105  # what the first left
    assert limit([c], 150) == 150  # and never more than there is


def test_processes_side_by_side_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "cores", lambda: 16)
    for n, (processes, threads) in enumerate(((1, "16"), (4, "4"), (8, "2"), (32, "1"))):
        log = tmp_path / str(n)
        process = stages.start(["sh", "-c", "echo $OMP_NUM_THREADS"], log, processes=processes)
        assert stages.finish(process, log, time.monotonic() + 60).output.strip() == threads
    started = []
    monkeypatch.setattr(checks, "cores", lambda: 16)
    monkeypatch.setattr(checks, "start", lambda command, log, *, processes, **_: started.append((command, processes)))
    monkeypatch.setattr(checks, "finish", lambda *_: stages.Finished(0, ""))
    gpu = context(tmp_path, device="cuda")
    checks.op_tests(gpu, 9)
    ((arguments, processes),) = started
    assert (arguments[arguments.index("-n") + 1], processes) == ("8", 8)
    checks.device_tests(gpu, 9)
    assert [processes for _, processes in started[1:]] == [4] * 4


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


SOME_TESTS = """
import time, pytest
def test_good(): pass
def test_off(): assert 1 == 2, "off by one"
@pytest.mark.skip(reason="no")
def test_skipped(): pass
@pytest.fixture
def broken():
    yield
    raise ValueError("boom")
def test_torn_down_badly(broken): pass
def test_hangs(): time.sleep(600)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_stopped_session_has_counted_the_tests_that_ended(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    written, log = tmp_path / "outcomes", tmp_path / "log"
    process = stages.start(
        [sys.executable, "-m", "pytest", "-p", outcomes.__name__, "--outcomes", written, tmp_path / "test_some.py",
         "-p", "no:cacheprovider", *workers], log,
    )  # fmt: skip
    while process.poll() is None and (not written.exists() or written.read_text().count("\n") < 5):
        time.sleep(0.05)
    done = stages.finish(process, log, time.monotonic())
    assert done.code is None, done.output
    found = outcomes.read(written)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1), done.output
    assert found["failures"][0].startswith("test_off: AssertionError: off by one")
    assert found["failures"][1] == "test_torn_down_badly: ValueError: boom"


def test_a_stage_of_tests_that_is_stopped_is_partial_with_its_counts(tmp_path, monkeypatch):
    def ended(*records: tuple[str, str]):
        lines = [json.dumps({"test": f"t.py::{n}", "outcome": o, "message": "bad"}) for n, o in records]
        return lambda command, *_, **__: Path(command[command.index("--outcomes") + 1]).write_text(
            "\n".join([*lines, '{"cut of'])
        )

    for code, records, status in (
        (None, [("a", "passed"), ("b", "skipped")], "partial"), (None, [("a", "passed"), ("b", "failed")], "failed"),
        (None, [], "failed"), (0, [("a", "passed")], "passed"), (0, [("a", "skipped")], "failed"),
        (1, [("a", "passed"), ("b", "failed")], "failed"),
    ):  # fmt: skip
        monkeypatch.setattr(checks, "start", ended(*records))
        monkeypatch.setattr(checks, "finish", lambda *_, code=code: stages.Finished(code, "chatter"))
        found = checks.op_tests(context(tmp_path), 9)
        assert found["status"] == status, (code, records, found)
        assert found["passed"] == sum(outcome == "passed" for _, outcome in records)
        assert ("stopped after 9 s" in found.get("reason", "")) == (code is None)


def test_the_sanitizer_sees_every_launcher(monkeypatch):
    declared = set(re.findall(r"^Error (\w+)\(", (ROOT / "csrc" / "kernels.h").read_text(), re.MULTILINE))
    assert {"message", "merge_row_stats", "clamp_sketch", "clamp_bracket", "clamp_partial", "clamp_refine"} < declared
    kernels, launched = core.KERNELS["cpu"], []

    class Watched:
        def __getattr__(self, name):
            if name in declared:
                launched.append(name)
            return getattr(kernels, name)

    monkeypatch.setitem(core.KERNELS, "cpu", Watched())
    of_tokens = {name for name in declared if name.startswith("token_")}
    for columns in (1, 40):
        calls = sanitizer_target.run_ops(torch.bfloat16, columns, 1, "cpu")
        assert set(launched) == declared - of_tokens and len(launched) == calls
        launched.clear()
    for T in (0, 1, 5001):
        calls = sanitizer_target.run_selections(T, "cpu")
        assert set(launched) == of_tokens and len(launched) == calls
        launched.clear()


def test_the_report_of_the_sanitizer_is_read():
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
    halfway = "sanitizer target: 1 of 30 (x)\nsanitizer target: 2 of 30 (y)\n"
    found = checks.read_sanitizer(halfway, None)
    assert found["status"] == "partial" and "2 of 30 of the cases ran" in found["reason"]
    assert checks.read_sanitizer(ours + halfway, None)["status"] == "failed"  # what it found before it was stopped


def tiny_wheel(folder: Path, name: str) -> None:
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "HERE = True")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", f"{name}.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")


def test_wheels_are_found_by_every_command_that_follows(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    tiny_wheel(tmp_path / "wheels", "entcov_probe")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = context(tmp_path)
    run.wheels = tmp_path / "wheels"
    wanted = ("json", "entcov_probe", "entcov_absent", "entcov_absent.part")
    assert training._missing(run, wanted) == "entcov_probe, entcov_absent, entcov_absent.part"
    found = checks.environment(run, 600)
    assert found["status"] == "passed" and found["wheels"] == ["entcov_probe-1.0-py3-none-any.whl"], found
    assert training._missing(run, wanted) == "entcov_absent, entcov_absent.part"
    assert checks._version_of("entcov_probe") == "1.0"
    (tmp_path / "wheels" / "bad-1.0-cp27-none-any.whl").write_bytes(b"")
    found = checks.install_wheels(run, 600)
    assert found["status"] == "failed" and "bad-1.0" in found["reason"]


def test_the_wheels_to_carry_are_those_that_ci_tests():
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))

    tested = pins("constraints.txt") | pins("requirements-engines.txt")
    wheels = pins("benchmarks/gpu/wheels.txt")
    assert {name for name, version in wheels.items() if tested.get(name) != version} == {"setuptools"}
    assert wheels["setuptools"] >= "77"  # pyproject.toml


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_training_without_its_packages_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "NEEDED", ("json", "entcov_absent"))
    found = training.torch_actor(context(tmp_path), 60)
    assert found == {"status": "not run", "reason": "not installed here: entcov_absent (docs/gpu.md, --wheels)"}


def test_a_training_that_goes_wrong_fails():
    good = {key: 0.5 for key in training.SHOWN} | {"training/mismatch": 1e-6}
    steps = [{"step": n, **good} for n in (1, 2, 3)]
    assert training._wrong(steps) is None
    for change, message in (
        ({"actor/entropy": float("nan")}, "step 2: actor/entropy must be finite"),
        ({"actor/entropy": 0.0}, "step 2: actor/entropy must be above 0, got 0.0"),
        ({"training/mismatch": 0.01}, "step 2: training/mismatch must be at most 0.001 nats, got 0.01"),
    ):
        assert training._wrong([steps[0], steps[1] | change, steps[2]]).startswith(message)
    assert "must have steps 1 to 3, got [1, 2]" in training._wrong(steps[:2])
    del steps[0]["actor/grad_norm"]
    assert training._wrong(steps) == "step 1: actor/grad_norm must be finite numbers, got [None]"


@pytest.mark.parametrize("entropy, status", [(1.01, "passed"), (1.2, "failed")])
def test_the_megatron_actor_is_held_against_the_torch_actor(tmp_path, monkeypatch, entropy, status):
    found = {"status": "passed", "steps": [{"step": 1, "actor/entropy": entropy}]}
    monkeypatch.setattr(training, "_train", lambda *_, **__: found)
    run = context(tmp_path)
    run.results["training"] = {"steps": [{"step": 1, "actor/entropy": 1.0}]}
    assert training.megatron_actor(run, 60)["status"] == status


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


def test_an_entcov_that_is_wrong_fails_the_stage_and_one_without_time_is_partial(tmp_path, monkeypatch):
    record = {"contender": "entcov", "workload": "token_stats", "columns": 9, "dtype": "bf16"}
    good = record | {"errors": {"logprob": 1e-6, "entropy": 2e-6}}
    late = record | {"failure": report.NOT_REACHED}
    for lines, code, status in (
        ([good], 0, "passed"), ([record | {"errors": {"logprob": "nan"}}], 0, "failed"),
        ([record | {"errors": {"logprob": 1e-6, "entropy": 1e-4}}], 0, "failed"), ([good, late], 0, "partial"),
        ([good], None, "partial"), ([late], 0, "partial"), ([good, record | {"failure": "OOM"}], 0, "failed"),
        ([], 1, "failed"),
    ):  # fmt: skip
        output = "a library's chatter\n" + "".join(json.dumps(line) + "\n" for line in lines) + '{"cut off'
        done = stages.Finished(code, output)
        monkeypatch.setattr(measurements, "command", lambda *_, done=done: done)
        found = measurements.ours(context(tmp_path), 320)
        assert found["status"] == status, (lines, code, found)
    assert measurements.ours(context(tmp_path), 5)["status"] == "partial"  # nobody had time


def test_entcov_has_its_time_whoever_else_is_slow(tmp_path, monkeypatch):
    now, given = [1000.0], {}

    def slow(arguments, log, seconds):
        given[arguments[3]] = seconds, float(arguments[arguments.index("--seconds") + 1])
        now[0] += seconds
        return stages.Finished(None, '{"contender": "x", "median_us": 1}\n')

    monkeypatch.setattr(measurements, "command", slow)
    monkeypatch.setattr(measurements.time, "monotonic", lambda: now[0])
    kept = []
    run = context(tmp_path)
    run.keep = kept.append
    (benchmarks,) = [stage for stage in runner.STAGES if stage.name == "benchmarks"]
    measurements.ours(run, benchmarks.seconds)
    assert list(given) == ["ceilings", *contenders.OWN]
    assert given["entcov"][0] >= 90 and given["entcov"][1] >= 75 and all(whole > 20 for whole, _ in given.values())
    assert now[0] == pytest.approx(1000 + benchmarks.seconds)
    assert [len(found["measurements"]) for found in kept] == [2, 4, 6, 8, 10, 12]  # after each, for a killed command


def test_the_first_shapes_of_all_workloads_come_first_and_each_is_compiled_anew(monkeypatch, capsys):
    order, resets = [], []
    monkeypatch.setattr(
        Worker, "measure", lambda self, workload, about: order.append((workload.name, about["columns"]))
    )
    monkeypatch.setitem(sys.modules, "torch._dynamo", types.SimpleNamespace())
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(order)))
    contender = Contender("x", "here", {"token_stats": None, "clamped_entropy": None, "lm_head": None})
    worker = Worker(contender, "cpu", 4, time.monotonic() + 600)
    monkeypatch.setattr("benchmarks.gpu.worker.TINY_COLUMNS", 10**6)
    worker.run()
    assert order[:4] == [
        ("token_stats", 152064),
        ("clamped_entropy", 152064),
        ("lm_head", 152064),
        ("token_stats", 19008),
    ]
    assert len(order) == 9 and resets == list(range(9))
    worker.until = 0
    worker.run()
    late = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(late) == 9 and all(record["failure"] == report.NOT_REACHED for record in late)


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


def finished(device="NVIDIA H100", commit="commit-one", ended="2026-11-21T10:00:00", driver="580.1", **found) -> dict:
    """A run; found: stage -> status, or findings."""
    environment = {"device": device, "driver": driver, "commit": commit, "packages": {}}
    stages = {name: {"seconds": 1.0, **(f if isinstance(f, dict) else {"status": f})} for name, f in found.items()}
    return {"environment": environment, "rehearsal": False, "ended": ended, "stages": stages}


def test_results_keep_the_newest_run_of_each_device():
    def renewed(text, device, commit):
        return report.renew(text, device, [finished(device, commit, benchmarks="passed")])

    text = runner.DOCUMENT.read_text()
    first = renewed(text, "NVIDIA H100", "commit-one")
    assert "Not yet measured" not in first and "commit-one" in first and first.startswith("# Measurements on GPUs")
    both = renewed(first, "NVIDIA B200", "commit-two")
    again = renewed(both, "NVIDIA H100", "commit-three")
    assert "commit-one" not in again and "commit-two" in again and "commit-three" in again
    assert again.count("## NVIDIA H100") == again.count("## NVIDIA B200") == 1


def test_commands_of_the_same_code_and_machine_are_one_run():
    first = finished(build="passed", sanitizer="failed", rivals="passed")
    second = finished(ended="2026-11-21T10:10:00", build="partial", benchmarks="passed", rivals="not run")
    (run,) = results.merged([first, second])
    assert {name: f["status"] for name, f in run["stages"].items()} == {
        "build": "partial", "sanitizer": "failed", "rivals": "passed", "benchmarks": "passed",
    }  # fmt: skip  # the later build; rivals, which had no chance, as they were
    assert run["ended"] == second["ended"] and results.merged([run, second]) == [run]


def test_other_code_and_other_machines_stay_apart_and_are_named():
    ceilings = [{"ceiling": kind, "tb_per_s": rate} for kind, rate in (("read", 3.0), ("copy", 2.8))]
    first = finished(sanitizer="failed", benchmarks={"status": "passed", "ceilings": ceilings})
    mended = finished(commit="commit-two", ended="2026-11-22T10:00:00", sanitizer="passed", rivals="passed")
    elsewhere = finished("NVIDIA H200", ended="2026-11-23T10:00:00", sanitizer="passed")
    runs = results.merged([first, mended, elsewhere])
    assert [list(run["stages"]) for run in runs] == [["benchmarks"], ["sanitizer", "rivals"], ["sanitizer"]]
    text = "\n".join(report.entry(runs[:2]))
    assert text.startswith("2 runs that differ in code, driver or versions")
    assert "commit commit-one; 2026-11-21: benchmarks" in text
    assert "commit commit-two; 2026-11-22: sanitizer, rivals" in text
    assert text.index("of those measured in another run: NVIDIA H100; driver 580.1, commit commit-one") < text.index(
        "of those measured in this run"
    )
    newer_driver = finished(driver="590.0", ended="2026-11-24T10:00:00", selection="passed")
    assert len(results.merged([*runs, newer_driver])) == 4


def test_code_is_told_apart_without_git(tmp_path):
    for path in ("csrc/a.cu", "entcov/b.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("one")
    before = runner.fingerprint(tmp_path)
    (tmp_path / "entcov" / "_cpu.so").write_text("made by the build")
    assert runner.fingerprint(tmp_path) == before
    (tmp_path / "csrc" / "a.cu").write_text("two")
    assert runner.fingerprint(tmp_path) != before


def test_the_plot_shows_what_was_measured_against_the_ceilings(tmp_path, monkeypatch):
    def measured(contender, columns, tb_per_s, **more):
        return {"contender": contender, "workload": "token_stats", "dtype": "bf16", "columns": columns,
                "pass": "forward", "tb_per_s": tb_per_s, **more}  # fmt: skip

    ceilings = [{"ceiling": "read", "tb_per_s": 3.0}]
    ours = [measured("entcov", 152064, 2.9), measured("entcov", 19008, 2.5), {"contender": "entcov", "failure": "x"},
            measured("entcov", 7, 9, workload="lm_head")]  # fmt: skip
    run = finished(benchmarks={"status": "passed", "ceilings": ceilings, "measurements": ours},
                   rivals={"status": "passed", "measurements": [measured("TRL", 152064, 1.5)]})  # fmt: skip
    assert roofline.points([run]) == {("bf16", "forward"): {"entcov": {152064: 2.9, 19008: 2.5}, "TRL": {152064: 1.5}}}
    roofline.draw([run], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    run = finished(selection="passed")
    run["environment"]["packages"]["matplotlib"] = None
    assert "No plot: matplotlib is not installed here." in report.text(run, [run])


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

    in_place = on_device.on_device(local_ops.logits_grad_, "cpu", in_place=True)
    logits = torch.randn(2, 9).as_strided((2, 4), (5, 1))
    target, weight = torch.tensor([0, 3]), torch.ones(2)
    stats = local_ops.row_stats(logits, target, 0, 4, 1.0, False, -100)
    expected = local_ops.logits_grad(logits, target, stats, weight, None, None, None, 0, 4, 1.0, -100)
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
