"""Features in the plane: what is drawn, and the tool on a trained model."""

import numpy as np
import pytest

from lt_det.visualization import plot_features, short_names


def blobs(spread):
    """Four categories around the axes of four dimensions; those of the first two are ``spread`` apart."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 12)
    centres = np.eye(4)
    centres[1] = centres[0] + spread * (centres[1] - centres[0])
    return centres[labels] + random.normal(0, 0.05, (48, 4)), labels


def test_silhouettes_say_how_far_apart_categories_are(tmp_path):
    names, groups = {0: "a", 1: "b", 2: "c", 3: "d"}, {0: "r", 1: "r", 2: "f", 3: "f"}
    models = {"mixed": blobs(0.0), "apart": blobs(1.0)}
    scores = plot_features(models, names, groups, tmp_path / "out/features.png", title="four")
    assert abs(scores["mixed"]["r"]) < 0.1 < 0.9 < scores["apart"]["r"] < 1
    # Frequent ones stand apart in both; cosine distances of orthogonal axes against those within.
    assert scores["mixed"]["f"] == pytest.approx(scores["apart"]["f"], abs=0.02) and scores["apart"]["f"] > 0.9
    picture = (tmp_path / "out/features.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_short_names():
    assert short_names(["greek_capital_letter_psi", "plus_sign"]) == ["Ψ", "+"]
    for lvis in (["greek_capital_letter_psi", "traffic_light"], ["owl", "banana"], ["bell"]):
        assert short_names(lvis) == lvis


def test_tool(run_tool, tool_options, repo_dir, tmp_path):
    config = repo_dir / "configs/glyph_softmax.yaml"
    run_tool("train_net.py", "--config-file", config, "OUTPUT_DIR", tmp_path / "model", *tool_options, cwd=tmp_path)
    args = ["--model", f"one={tmp_path / 'model'}", "--categories", 3, "--output", "features.png"]
    log = run_tool("plot_features.py", *args, cwd=tmp_path)
    row = next(line for line in log.splitlines() if line.startswith("| one"))
    rare, frequent = row.split("|")[2:4]
    assert -1 <= float(rare) <= 1 and frequent.strip() == "-"  # the tiny data set has no frequent category
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")
    assert "give a folder that training has left" in run_tool(
        "plot_features.py", "--model", "x=nowhere", "--output", "x.png", cwd=tmp_path, fails=True
    )
