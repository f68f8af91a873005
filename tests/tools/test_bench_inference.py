"""The benchmark of inference runs and writes its keys."""

import json


def test_benchmark_writes_its_numbers(run_tool, tmp_path):
    args = ["--size", 64, 96, "--classes", 40, "--proposals", 200, "--detections", 20, "--repeats", 1]
    log = run_tool("benchmarks/bench_inference.py", *args, "--json", "out/inference.json", cwd=tmp_path)
    result = json.loads((tmp_path / "out/inference.json").read_text())
    assert result["identical"] is True
    for key in ("nms_speedup", "nms_speedup_one_object", "mask_head_speedup", "image_time_ratio"):
        assert result[key] > 0 and key in log
    assert [row["candidates"] for row in result["suppression"]][2] == 200 * 40
    image = result["image"]
    assert image["detections"] == 20 and image["candidates"] > 20
    assert sum(pair[0] for pair in image["parts"].values()) > 0 and all(part in log for part in image["parts"])
