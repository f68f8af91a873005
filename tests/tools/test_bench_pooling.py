"""The benchmark of RoIAlign in training writes what it promises, and finds the same gradients."""

import json
import platform


def test_benchmark_writes_its_numbers(run_tool, tmp_path):
    sizes = ["--size", 64, "--images", 1, "--rois", 16, "--classes", 12, "--repeats", 1]
    printed = run_tool("benchmarks/bench_pooling.py", *sizes, "--json", "out/pooling.json", cwd=tmp_path)
    result = json.loads((tmp_path / "out/pooling.json").read_text())
    parts = ["RoIAlign, forward", "RoIAlign, backward", "iteration"]
    assert list(result["speedup"]) == parts and all(part in printed for part in parts)
    for part in parts:
        assert set(result["seconds"][part]) == {"Detectron2", "lt_det"} and result["speedup"][part] > 0
    assert all(result["same_bits"].values()) or platform.machine() not in ("x86_64", "AMD64")
