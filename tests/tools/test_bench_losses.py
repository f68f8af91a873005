"""The benchmark of the losses writes what it promises."""

import json

import pytest


def test_benchmark_writes_its_table(run_tool, tmp_path):
    names = ["Softmax", "BalancedSigmoid", "Seesaw"]
    sizes = ["--quick", "--rows", 64, "--classes", 20, "--repeats", 1, "--device", "cpu"]
    printed = run_tool(
        "benchmarks/bench_losses.py", *sizes, "--losses", *names, "--json", "out/losses.json", cwd=tmp_path
    )
    rows = json.loads((tmp_path / "out/losses.json").read_text())["rows"]
    assert [row["loss"] for row in rows] == names
    assert [row["reference"] for row in rows] == [
        "cross_entropy",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
    ]
    assert all(row["time_ratio"] > 0 and row["extra_memory_ratio"] > 0 for row in rows)
    assert rows[0]["kept_memory_ratio"] == pytest.approx(1, rel=0.01)
    assert all(name in printed for name in names)
