"""The benchmark commands run, and what they print is what they measured. No time is asserted."""

import json
import math
import sys

from benchmarks.measure import interleaved_seconds, peak_allocated_bytes, ratio, times_of
from tests.support.processes import run_command


def test_ops_benchmark_runs_and_keeps_the_memory_promise(tmp_path):
    report = tmp_path / "ops.json"
    command = [sys.executable, "-m", "benchmarks", "ops", "--tokens", "512", "--vocab", "700", "--repeats", "2",
               "--threads", "1", "--clamp-p", "0.3", "--no-compile", "--json", str(report)]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    passes = {(row["pass"], row["name"]): row for row in result["times"]}
    assert {p for p, _ in passes} == {
        "forward", "forward+backward", "clamped forward", "clamped forward+backward"
    }  # fmt: skip
    assert passes["forward", "entcov"]["bytes_per_logit"] == 2
    assert passes["forward+backward", "entcov"]["bytes_per_logit"] == 6
    assert passes["forward+backward", "eager"]["bytes_per_logit"] == 120
    assert all(row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"] for row in result["times"])
    errors = result["errors"]["entcov"]
    assert errors["logprob"] < 1e-5 and errors["entropy"] < 1e-5 and errors["gradient"] < 2**-8
    # The goal is 64 bytes a token beyond the gradient; the usual formula holds several copies of the row.
    assert 0 < result["memory"]["entcov"]["allocated"] <= 64
    assert result["memory"]["eager"]["allocated"] > 700 * 4
    assert result["memory"]["entcov"]["resident"] < result["memory"]["eager"]["resident"]
    assert "x entcov" in done.stdout and "bytes a token" in done.stdout
    host = {row["name"]: row for row in result["host_us"]}
    assert list(host) == ["empty autograd.Function", "token_stats", "token_stats, moments", "token_stats, clamp",
                          "logit_covariance", "linear_token_stats", "policy_loss", "token_covariance"]  # fmt: skip
    once = {"token_covariance"}  # has no gradient
    assert {name for name, row in host.items() if "forward+backward" not in row} == once
    assert all(0 < row["forward"] < row.get("forward+backward", math.inf) for row in host.values())
    assert "host time" in done.stdout


def test_linear_benchmark_measures_memory_and_errors(tmp_path):
    report = tmp_path / "linear.json"
    command = [sys.executable, "-m", "benchmarks", "linear", "--tokens", "256", "--vocab", "2000", "--width", "32",
               "--chunk", "32", "--repeats", "2", "--threads", "1", "--json", str(report)]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    rows = {row["name"]: row for row in result["times"]}
    assert list(rows) == ["entcov, logits kept", "entcov, chunks of 32", "token_stats(hidden @ W.T)", "plain torch",
                          "plain torch, chunks of 32"]  # fmt: skip
    held = {name: row["peak_bytes_beyond_gradients"] for name, row in rows.items()}
    logits, weight = result["logits_bytes"], 2000 * 32
    assert logits == 256 * 2000 * 2
    assert held["entcov, chunks of 32"] < logits / 8 + 4 * weight + 2 * weight + 100 * 256 + 2**18
    assert held["entcov, logits kept"] < 1.2 * logits < 1.7 * logits < held["token_stats(hidden @ W.T)"]
    assert held["plain torch"] > 5 * logits
    assert all(row["hidden_gradient_error"] < 2**-7 and row["weight_gradient_error"] < 2**-6 for row in rows.values())


def test_head_benchmark_measures_what_hidden_states_save(tmp_path):
    """Of the logits and their gradient one is left, which is most of a model with so wide a vocabulary."""
    report = tmp_path / "head.json"
    command = [sys.executable, "-m", "benchmarks", "head", "--vocab", "20000", "--tokens", "64", "--width", "16",
               "--repeats", "2", "--threads", "1", "--json", str(report)]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    logits, hidden = json.loads(report.read_text())["rows"]
    assert logits["logits_bytes"] == 4 * 64 * 20000 * 4 and "saved MiB" in done.stdout
    assert hidden["saved_bytes"] > 0.7 * logits["logits_bytes"] and hidden["ratio"]["min"] > 0


def test_selection_benchmark_chooses_as_many_as_the_usual_code(tmp_path):
    report = tmp_path / "selection.json"
    command = [sys.executable, "-m", "benchmarks", "selection", "--tokens", "20000", "--repeats", "2", "--threads", "1",
               "--json", str(report)]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    rows = {(row["selection"], row["name"]): row for row in json.loads(report.read_text())["rows"]}
    assert rows["Clip-Cov", "entcov"]["chosen"] == rows["Clip-Cov", "nonzero + randperm"]["chosen"] > 1
    assert rows["KL-Cov", "entcov"]["chosen"] == rows["KL-Cov", "nonzero + topk"]["chosen"] > 20
    assert rows["Clip-Cov", "nonzero + randperm"]["host_reads"] >= 2 and "host reads" in done.stdout


def test_batch_benchmark_counts_bytes_and_growth(tmp_path):
    report = tmp_path / "batch.json"
    command = [sys.executable, "-m", "benchmarks", "batch", "--responses", "64", "256", "--mean", "2048", "--repeats",
               "1", "--threads", "1", "--json", str(report)]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    rows = {(row["name"], row["responses"]): row for row in result["rows"]}
    packed = rows["pack", 256]
    assert 1.5 < packed["bytes"] / packed["data"] < 3  # 13 bytes a token of prompt and response, for 8 of a response
    assert rows["mini-batches", 256]["bytes"] < packed["bytes"]  # one at a time
    assert 0.8 < result["growth"]["pack"]["bytes"] < 1.2 and "growth with the number of responses" in done.stdout


def test_measurements():
    import torch

    order = []
    seconds = interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == [*"aabb", *"aabb"] and [len(x) for x in seconds.values()] == [2, 2]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}

    found = times_of([0.004, 0.002, 0.006], [0.001, 0.001, 0.002])
    assert (found["median_ms"], found["min_ms"], found["max_ms"], found["ratio"]["median"]) == (4.0, 2.0, 6.0, 3.0)

    def three_then_one():
        first = torch.empty(3_000_000, dtype=torch.uint8)
        del first
        return torch.empty(1_000_000, dtype=torch.uint8)

    assert 3_000_000 <= peak_allocated_bytes(three_then_one) < 3_100_000


def test_splits_names_the_setup_where_neither_framework_is_installed():
    command = [sys.executable, "-c", "import sys; sys.modules['verl'] = sys.modules['trl'] = None; "
               "from benchmarks.__main__ import main; sys.exit(main(['splits']))"]  # fmt: skip
    done = run_command(command)
    assert done.returncode == 2 and done.stdout == ""
    assert "scripts/setup.sh verl" in done.stderr and "scripts/setup.sh trl" in done.stderr
