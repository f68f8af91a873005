"""The experiment with GML over seeds, on a tiny data set."""

import json


def test_rows_and_ablation(run_tool, tool_options, tmp_path):
    args = [
        "experiments/gml_seeds.py",
        "--output-dir",
        "out",
        "--seeds",
        1,
        "--rows",
        "softmax",
        "GML",
        "--ablation-seeds",
    ]
    small = ["MODEL.LONG_TAIL.GML.QUEUE_SIZE", "64"]
    log = run_tool(*args, "--opts", *tool_options, *small, cwd=tmp_path)
    result = json.loads((tmp_path / "out/gml_seeds.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["softmax + RFS", "L_cls alone (the teacher)", "GML"]
    table = (tmp_path / "out/gml_seeds.md").read_text()
    assert table.strip() in log and table.count("\n") == 5
    # GML had the trained teacher, and the teacher none.
    assert "TEACHER:" in (tmp_path / "out/seed1/GML/config.yaml").read_text()
    assert "loss_gml" in (tmp_path / "out/seed1/GML/metrics.json").read_text()
    assert "loss_gml" not in (tmp_path / "out/seed1/L_cls_alone/metrics.json").read_text()

    ablation = [*args[:-3], "--rows", "beta 4", "--ablation-seeds", 1]
    log = run_tool(*ablation, "--opts", *tool_options, *small, cwd=tmp_path)
    assert "GML, beta 4" in log and "seed1/GML/" not in log
    assert "BETA: 4.0" in (tmp_path / "out/seed1/GML,_beta_4/config.yaml").read_text()
    assert "not among" in run_tool(*args[:-3], "--ablation-seeds", 5, cwd=tmp_path, fails=True)
