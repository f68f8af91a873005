"""The demo, on a tiny data set: table, summary and pictures."""

import json


def test_demo(run_tool, tool_options, tmp_path):
    log = run_tool("demo.py", *tool_options, "OUTPUT_DIR", "demo", cwd=tmp_path)
    # What a whole demo adds is a line every hundred iterations.
    assert len(log.splitlines()) + (620 + 2 * 500) // 100 < 60, log
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    names = [row["name"] for row in summary["rows"]]
    assert names[0] == "softmax + RFS" and names[-1] == "BALMS"
    for row in summary["rows"]:
        assert all(set(row[task]) == {"AP", "APr", "APc", "APf"} for task in ("bbox", "segm"))
        assert row["name"] in log
    for folder in ("softmax", "balanced_softmax", "balms"):  # predict and the other tools take it from here
        assert {"config.yaml", "model_final.pth"} <= {path.name for path in (tmp_path / "demo" / folder).iterdir()}
    assert summary["seconds"] > 0
    for picture in ("ap_by_frequency.png", "ap_by_images.png", "predictions.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 10_000
        assert picture in log
    assert 'id="compare"' in (tmp_path / "demo/report.html").read_text() and "report.html" in log
    assert "balanced softmax: the classifier trained again" in log
