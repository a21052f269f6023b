"""The comparison: its statistics by hand, and real processes that finish, fail, are interrupted, are not repeated."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from entcov.report.compare import compare, final_values, markdown, summarize, tables
from entcov.report.run_matrix import FINISHED, LOG, Job, run_matrix
from tests.support.processes import LIMIT

# A stand-in for the trainer: a real process that logs a run of a known shape, and fails or waits on request.
TRAINER = """
import json, os, pathlib, sys, time
run_dir, entropy, reward, wish = pathlib.Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
with open(run_dir / "starts", "a") as starts:
    starts.write(os.environ["OMP_NUM_THREADS"] + "\\n")
if wish == "fail":
    print("reading the recipe")
    raise RuntimeError("the task has no prompts")
if wish == "wait":
    time.sleep(60)
with open(run_dir / "metrics.jsonl", "w") as file:
    for step in range(1, 21):
        row = {"step": step, "actor/entropy": entropy + (0 if step > 18 else 1), "critic/score/mean": reward,
               "response_length/mean": 10 + step, "actor/cov_mean": 0.01}
        if step % 10 == 0:
            row |= {"val-core/a/acc/mean@2": reward, "val-core/b/acc/mean@2": 0.0, "val-core/a/acc/best@2/mean": 1.0}
        file.write(json.dumps(row) + "\\n")
"""
ENTROPY = {"none": (0.10, 0.12, 0.14), "clip_cov": (0.30, 0.36, 0.45), "aent": (0.11, 0.10, 0.16)}


@pytest.fixture
def trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return sys.executable, str(script)


def arguments(recipe, wishes=()):
    def of(control, seed, run_dir):
        wish = dict(wishes).get((control, seed), "finish")
        return [str(recipe), str(run_dir), str(ENTROPY[control][seed]), str(0.5 + 0.01 * seed), wish]

    return of


def run_compare(tmp_path, trainer, wishes=(), **changes):
    recipe = tmp_path / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text("steps: 20\n")
    settings = dict(
        controls=list(ENTROPY), seeds=[0, 1, 2], out_dir=tmp_path / "out", jobs=2, command="entcov compare r.yaml",
        display=False, program=trainer,
    ) | changes  # fmt: skip
    baselines = {control: "none" for control in settings["controls"] if control != "none"}
    return compare(arguments(recipe, wishes), **{"baselines": baselines} | settings)


def starts(tmp_path, control, seed):
    return (tmp_path / "out" / control / f"seed_{seed}" / "starts").read_text().split()


def test_table_plots_and_numbers(tmp_path, trainer, capsys):
    assert run_compare(tmp_path, trainer) == 0
    out = tmp_path / "out"
    result = json.loads((out / "comparison.json").read_text())
    none, clip = result["estimates"]["none"], result["estimates"]["clip_cov"]
    assert none["entropy"]["mean"] == pytest.approx(0.12) and clip["entropy"]["mean"] == pytest.approx(0.37)
    assert none["entropy"]["half_width"] == pytest.approx(4.302652729749 * 0.02 / math.sqrt(3))
    assert none["reward"]["by_seed"] == pytest.approx({"0": 0.5, "1": 0.51, "2": 0.52})
    assert none["accuracy"]["mean"] == pytest.approx(0.51 / 2) and none["best"]["mean"] == 1.0
    assert none["length"]["mean"] == pytest.approx(29.5)
    difference = result["differences"]["clip_cov"]["entropy"]  # 0.20, 0.24, 0.31
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["half_width"] == pytest.approx(4.302652729749 * math.sqrt(0.0031 / 3))
    ratio = [math.log(a / b) for a, b in zip(ENTROPY["clip_cov"], ENTROPY["none"], strict=True)]
    assert result["entropy_ratio"]["clip_cov"][0] == pytest.approx(math.exp(sum(ratio) / 3))
    assert result["command"] == "entcov compare r.yaml" and result["steps"] == 20
    assert result["baselines"] == {"clip_cov": "none", "aent": "none"}

    page = (out / "comparison.md").read_text()
    assert "```\nentcov compare r.yaml\n```" in page and "20 steps; finished seeds: 0, 1, 2" in page
    assert "| none | 3 | 0.1200 ± 0.0497 |" in page
    assert "| clip_cov | none | 3.07 (2.78 to 3.39) | +0.2500 ± 0.1383 * |" in page  # the interval excludes 0
    assert "| aent | none | 1.02 (0.66 to 1.56) | +0.0033 ± 0.0517 |" in page  # and here it does not
    assert "(plots/overview.png)" in page and (out / "plots" / "overview.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "Where the runs end" in printed and "comparison.md" in printed
    assert starts(tmp_path, "none", 0) == ["1"]  # one start, with one thread


def test_finished_runs_are_not_repeated_until_something_changes(tmp_path, trainer):
    run_compare(tmp_path, trainer, controls=["none", "clip_cov"], seeds=[0, 1])
    run_compare(tmp_path, trainer, controls=["none", "clip_cov"], seeds=[0, 1, 2])
    assert [len(starts(tmp_path, "clip_cov", seed)) for seed in (0, 1, 2)] == [1, 1, 1]
    (tmp_path / "recipe.yaml").write_text("steps: 30\n")
    run_compare(tmp_path, trainer, controls=["none", "clip_cov"], seeds=[0])
    assert [len(starts(tmp_path, "clip_cov", seed)) for seed in (0, 1)] == [2, 1]


def test_a_failed_run_is_reported_and_the_rest_goes_on(tmp_path, trainer, capsys):
    assert run_compare(tmp_path, trainer, {("clip_cov", 1): "fail"}) == 1
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (failure,) = result["failures"]
    assert failure["label"] == "clip_cov seed 1" and failure["reason"] == "exit 1"
    assert failure["tail"].startswith("reading the recipe") and failure["tail"].endswith("the task has no prompts")
    assert set(result["estimates"]["clip_cov"]["entropy"]["by_seed"]) == {"0", "2"}
    assert set(result["differences"]["clip_cov"]["entropy"]["by_seed"]) == {"0", "2"}
    assert set(result["estimates"]["none"]["entropy"]["by_seed"]) == {"0", "1", "2"}
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "clip_cov seed 1 (exit 1)" in page and "the task has no prompts" in page and "| clip_cov | 2 |" in page
    assert "clip_cov seed 1 failed (exit 1)" in capsys.readouterr().out
    assert run_compare(tmp_path, trainer) == 0  # the next call runs the failed one alone
    assert len(starts(tmp_path, "clip_cov", 1)) == 2 and len(starts(tmp_path, "clip_cov", 0)) == 1


def test_all_runs_failed(tmp_path, trainer):
    assert run_compare(tmp_path, trainer, {("none", 0): "fail"}, controls=["none"], seeds=[0]) == 1
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "finished seeds: none" in page and "the task has no prompts" in page and "overview.png" not in page


def test_one_seed_has_no_interval(tmp_path, trainer):
    run_compare(tmp_path, trainer, seeds=[0])
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| none | 1 | 0.1000 | 0.500 |" in page and "| clip_cov | none | 3.00 | +0.2000 |" in page


def test_baselines_can_be_named(tmp_path, trainer):
    run_compare(tmp_path, trainer, seeds=[0], baselines={"none": "aent"})
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["differences"].keys() == {"none"}
    assert result["differences"]["none"]["entropy"]["mean"] == pytest.approx(-0.01)


def test_an_interrupt_ends_the_runs_in_progress(tmp_path, trainer):
    program = f"""
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test started in the background inherits a deaf ear
from entcov.report.run_matrix import Job, run_matrix
out = Path({str(tmp_path)!r})
argv = [({trainer[0]!r}, {trainer[1]!r}, "r", str(out / str(i)), "0", "0", "wait") for i in range(3)]
run_matrix([Job(str(i), argv[i], out / str(i)) for i in range(3)], 2, display=False)
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as parent:
        deadline = time.monotonic() + LIMIT
        while not all((tmp_path / name / "starts").exists() for name in "01"):
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.02)
        parent.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in parent.communicate(timeout=LIMIT)[1]
    assert not (tmp_path / "2").exists() or not (tmp_path / "2" / "starts").exists()
    assert not any((tmp_path / name / FINISHED).exists() for name in "012")
    alive = [p for p in os.listdir("/proc") if p.isdigit() and trainer[1].encode() in _command(p)]
    assert alive == []


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:  # ended meanwhile
        return b""


def test_a_run_killed_by_a_signal_is_a_failure(tmp_path):
    argv = (sys.executable, "-c", "import os; print('so far', flush=True); os.kill(os.getpid(), 9)")
    (failure,) = run_matrix([Job("a", argv, tmp_path / "a")], display=False)
    assert (failure.reason, failure.tail, failure.log) == ("signal 9", "so far", tmp_path / "a" / LOG)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(controls=[]), "controls must hold at least one entry, got none"),
        (dict(seeds=[]), "seeds must hold at least one entry, got none"),
        (dict(seeds=[1, 1]), r"seeds must not repeat an entry, got \[1, 1\]"),
        (dict(jobs=0), "jobs must be >= 1, got 0"),
        (dict(controls=["clip_cov"]), "baselines: 'none' must be among the controls"),
        (dict(baselines={"clip_cov": "kl_cov"}), "baselines: 'kl_cov' must be among the controls"),
        (dict(controls=["../x"]), "no plain folder name cannot be compared, got '../x'"),
    ],
)
def test_bad_arguments(tmp_path, trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        run_compare(tmp_path, trainer, **changes)
    assert not (tmp_path / "out").exists()


def test_final_values_by_hand():
    rows = [{"step": 0, "val-core/a/acc/mean@1": 0.1}]
    rows += [{"step": s, "actor/entropy": float(s), "critic/score/mean": 1.0} for s in range(1, 31)]
    rows[20] |= {"val-core/a/acc/mean@1": 0.4, "val-core/b/acc/mean@1": 0.8, "val-core/a/acc/best@4": 0.9}
    values = final_values(rows)
    assert values == pytest.approx({"entropy": 29.0, "reward": 1.0, "accuracy": 0.6, "best": 0.9})
    assert final_values([{"step": 1, "actor/entropy": 2.0}]) == {"entropy": 2.0}


def test_a_run_that_ends_in_nan_does_not_drop_out_of_the_mean():
    runs = {"none": {0: [{"step": 1, "actor/entropy": math.nan}], 1: [{"step": 1, "actor/entropy": 0.5}]}}
    comparison = summarize(runs, {}, command="c")
    assert math.isnan(comparison.estimates["none"]["entropy"].mean)
    assert tables(comparison) == [
        ("Where the runs end", ["control", "seeds", "final entropy, nats"], [["none", "2", "nan"]])
    ]
    assert "| none | 2 | nan |" in markdown(comparison, plots=False)
