"""The benchmark of the meta step writes what it promises."""

import json


def test_benchmark_writes_its_numbers(run_tool, tmp_path):
    sizes = ["--quick", "--size", 64, "--images", 1, "--rois", 32, "--classes", 20, "--repeats", 1, "--device", "cpu"]
    printed = run_tool("benchmarks/bench_meta.py", *sizes, "--json", "out/meta.json", cwd=tmp_path)
    result = json.loads((tmp_path / "out/meta.json").read_text())
    for key in (
        "ratio_to_plain_step",
        "speedup_vs_textbook",
        "memory_ratio_vs_textbook",
        "cached_step_speedup",
    ):
        assert result[key] > 0
    # The textbook keeps graphs of whole passes; this holds at any size.
    assert result["memory_ratio_vs_textbook"] < 1
    assert "meta (textbook)" in printed
