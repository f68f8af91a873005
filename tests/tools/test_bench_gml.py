"""The GML benchmark runs and writes its keys."""

import json


def test_benchmark_writes_its_numbers(run_tool, tmp_path):
    args = ["--size", 64, "--images", 1, "--rois", 32, "--classes", 12, "--repeats", 1, "--device", "cpu"]
    log = run_tool("benchmarks/bench_gml.py", *args, "--json", "out/gml.json", cwd=tmp_path)
    result = json.loads((tmp_path / "out/gml.json").read_text())
    assert result["ratio_to_softmax_with_teacher"] > 0 and result["ratio_to_softmax_without_teacher"] > 0
    # 16,384 keys of 1024 float32, their ids and the class of each.
    assert 16384 * 1024 * 4 / 1e6 < result["queue_megabytes"] < 68
    assert set(result["seconds"]) == {"softmax", "GML", "GML without the teacher", "GML, wide projections"}
    assert result["mixture_speedup_vs_loop"] > 0
    assert all(name in log for name in result["seconds"])
