"""The benchmark commands run, and what they print is what they measured. No time is asserted."""

import json
import subprocess
import sys

from benchmarks.measure import interleaved_seconds, peak_allocated_bytes, ratio


def test_ops_benchmark_runs_and_keeps_the_memory_promise(tmp_path):
    report = tmp_path / "ops.json"
    command = [sys.executable, "-m", "benchmarks", "ops", "--tokens", "512", "--vocab", "700", "--repeats", "2",
               "--threads", "1", "--clamp-p", "0.3", "--no-compile", "--json", str(report)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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


def test_measurements():
    import torch

    order = []
    seconds = interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b", *"aabb", *"aabb"] and [len(x) for x in seconds.values()] == [2, 2]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}

    def three_then_one():
        first = torch.empty(3_000_000, dtype=torch.uint8)
        del first
        return torch.empty(1_000_000, dtype=torch.uint8)

    assert 3_000_000 <= peak_allocated_bytes(three_then_one) < 3_100_000
