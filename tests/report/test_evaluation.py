"""The page of an evaluated model: what it says by hand, and in a browser."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lt_det.cli.report import main
from lt_det.data import load_lvis_or_coco_json
from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.evaluation.calibration import read_thresholds
from lt_det.report.evaluation import (
    classifier_norms,
    detections_of,
    image_files,
    image_summary,
    read_run,
)


def square(x, side=10):
    return {"bbox": [x, 0, side, side], "area": side * side,
            "segmentation": [[x, 0, x + side, 0, x + side, side, x, side]]}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three images: all right; one wrong class; nothing found. Results of two models, the second misses more."""
    root = tmp_path_factory.mktemp("small")
    images = [
        {"id": i, "width": 64, "height": 48, "file_name": f"{i}.png", "neg_category_ids": [4],
         "not_exhaustive_category_ids": []}
        for i in (1, 2, 3)
    ]  # fmt: skip
    rows = [(1, 1, 0), (1, 3, 30), (2, 2, 0), (2, 3, 30), (3, 1, 0)]
    annotations = [{"id": i, "image_id": image, "category_id": c, "iscrowd": 0, **square(x)}
                   for i, (image, c, x) in enumerate(rows, 1)]  # fmt: skip
    categories = [
        {"id": 1, "name": "</script>ladle", "frequency": "r", "image_count": 2, "instance_count": 2},
        {"id": 2, "name": "sieve", "frequency": "c", "image_count": 40, "instance_count": 50},
        {"id": 3, "name": "cup", "frequency": "f", "image_count": 400, "instance_count": 600},
        {"id": 4, "name": "plate", "frequency": "f", "image_count": 300, "instance_count": 300},
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "val.json").write_text(json.dumps(content))
    for image in images:
        Image.new("RGB", (64, 48), "#88aacc").save(root / image["file_name"])
    found = [(1, 1, 0, 0.9), (1, 3, 30, 0.8), (2, 4, 0, 0.7), (2, 3, 30, 0.6)]
    results = [
        {"image_id": i, "category_id": c, "score": s, **{k: v for k, v in square(x).items() if k != "area"}}
        for i, c, x, s in found
    ]
    (root / "results.json").write_text(json.dumps(results))
    (root / "fewer.json").write_text(json.dumps(results[1:]))
    return root


@pytest.fixture(scope="module")
def ground_truth(small):
    return GroundTruth.from_json(small / "val.json")


def test_images_by_hand(small, ground_truth):
    run = read_run(ground_truth, str(small / "results.json"))
    run.analyse(ground_truth, "segm")
    # plate has no right detection: the threshold of the frequent group, whose best cut is 0.6, keeps its 0.7.
    assert run.threshold.tolist()[:1] == [0.9] and run.threshold.tolist()[2:] == [0.6, 0.6]
    summary = image_summary(ground_truth, run)
    assert summary.right.tolist() == [2, 1, 0] and summary.wrong.tolist() == [0, 1, 0]
    assert summary.f1.tolist() == [1.0, 0.5, 0.0]
    assert summary.worst(2) == [2, 1] and summary.best(5) == [0, 1]


def test_detections_and_files_of_some_images(small, ground_truth):
    some = detections_of(ground_truth, str(small / "results.json"), [2])
    assert [(d["category_id"], d["score"], d["bbox"]) for d in some] == [
        (4, 0.7, [0, 0, 10, 10]), (3, 0.6, [30, 0, 10, 10])
    ]  # fmt: skip
    again = evaluate_results(ground_truth, detections_of(ground_truth, str(small / "results.json"), [1, 2, 3]))
    for task, metrics in evaluate_results(ground_truth, str(small / "results.json")).metrics.items():
        assert again.metrics[task] == pytest.approx(metrics, abs=0, nan_ok=True)
    assert image_files(str(small / "val.json"), str(small), [3, 1]) == {i: str(small / f"{i}.png") for i in (1, 3)}
    assert image_files(str(small / "val.json"), str(small / "nowhere"), [3]) == {}


def test_images_are_found_as_in_training(tmp_path):
    """The json names a folder that is not there (``train/``), as of a data set whose images were moved."""
    images = [{"id": 7, "file_name": "train/000000000007.jpg", "height": 4, "width": 4}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    (tmp_path / "000000000007.jpg").touch()
    (record,) = load_lvis_or_coco_json(str(path), str(tmp_path))
    assert image_files(str(path), str(tmp_path), [7]) == {7: record["file_name"]}


def test_a_folder_gives_the_numbers_of_its_results(small, ground_truth, tmp_path):
    done = evaluate_results(ground_truth, str(small / "results.json"))
    done.save(str(tmp_path / "run/inference"), plots=False)
    run = read_run(ground_truth, str(tmp_path / "run/inference"))
    assert run.name == "run" and run.results is None
    for task, metrics in done.metrics.items():
        assert run.metrics[task] == pytest.approx(metrics, nan_ok=True)
    whole = read_run(ground_truth, str(tmp_path / "run"))
    assert whole.name == "run" and whole.metrics["bbox"]["AP"] == run.metrics["bbox"]["AP"]
    with pytest.raises(ValueError, match="holds no matches"):
        read_run(ground_truth, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_run(ground_truth, str(tmp_path / "none"))


def test_norms_go_to_the_classes_of_their_names(ground_truth):
    weight = torch.diag(torch.tensor([3.0, 1.0, 2.0, 4.0, 9.0]))
    state = {"roi_heads.box_predictor.cls_score.weight": weight}
    assert classifier_norms(state, ground_truth).tolist() == [3, 1, 2, 4]
    names = ["cup", "plate", "sieve", "</script>ladle"]
    assert classifier_norms(state, ground_truth, names).tolist() == [4, 2, 3, 1]
    with pytest.raises(ValueError, match="other names"):
        classifier_norms(state, ground_truth, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="no box_predictor"):
        classifier_norms({}, ground_truth)


def test_the_command_writes_page_and_thresholds(small, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = [str(small / "results.json"), "--annotations", str(small / "val.json"), "--output", str(page)]
    assert main([*arguments, "--image-root", str(small)]) == 0
    assert "page_thresholds.csv" in capsys.readouterr().out
    thresholds = read_thresholds(tmp_path / "page_thresholds.csv")
    assert thresholds["</script>ladle"] == 0.9 and thresholds["cup"] == 0.6
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 3  # two of the worst are among the best
    assert "</script>ladle" not in text and "http-equiv" in text
    assert len(text) < 3e6


@pytest.mark.parametrize("change, message", [
    (["--output", "x.html"], None),
    (["--weights", "none.pth"], "no such file"),
    (["--iou-type", "segm", "--annotations", "none.json"], "no annotation file"),
])  # fmt: skip
def test_wrong_input_is_one_line(small, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["none.json" if message is None else str(small / "results.json"),
                 "--annotations", str(small / "val.json"), "--output", "p.html", *change]  # fmt: skip
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (message or "there is no none.json") in error
    assert not list(tmp_path.glob("*.html"))


def test_two_runs_in_a_browser(small, tmp_path, chromium):
    page = tmp_path / "two.html"
    weights = tmp_path / "model.pth"
    weight = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"model": {"roi_heads.box_predictor.cls_score.weight": weight}}, weights)
    code = main(
        [str(small / "fewer.json"), str(small / "results.json"), "--annotations", str(small / "val.json"),
         "--image-root", str(small), "--output", str(page), "--replicates", "20", "--weights", str(weights),
         str(weights)]
    )  # fmt: skip
    assert code == 0
    chromium.open(page)
    # Text and the first table stood there before Plotly was started, and only charts in view are drawn.
    readable, opened = chromium.run("const t = document.documentElement.dataset; return [+t.readableMs, +t.openedMs]")
    assert 0 < readable < opened
    assert chromium.run("return document.querySelectorAll('#thresholds .chart[data-drawn]').length") == 0
    chromium.draw_all()
    assert chromium.errors() == []
    tables = "return [...document.querySelectorAll('.table')].filter(t => !t.querySelector('thead')).length"
    assert chromium.run(tables) == 0
    drawn = "return [...document.querySelectorAll('.chart')].filter(c => !c.querySelector('.cartesianlayer')).length"
    assert chromium.run(drawn) == 0
    sections = chromium.run("return [...document.querySelectorAll('main section')].map(s => s.id)")
    assert sections == ["overview", "compare", "categories", "precision-recall", "errors", "confusions", "calibration",
                        "thresholds", "classifier", "images"]  # fmt: skip
    about = chromium.run("return document.querySelector('#images').innerText")
    assert "Detections of B, results." in about and " of B are in the csv" in page.read_text()
    # Worst first: sieve was taken by plate.
    first = "return [...document.querySelectorAll('#categories tbody tr')].map(r => r.innerText)"
    rows = chromium.run(first)
    assert rows[0].startswith("sieve") and rows[0].rstrip().endswith("plate (1)")
    chromium.run(
        "const s = document.querySelector('#categories input'); s.value = 'lad'; s.dispatchEvent(new Event('input'));"
    )
    assert [r.split("\t")[0] for r in chromium.run(first)] == ["</script>ladle"]
    images = "return [...document.querySelectorAll('#images img')].map(i => i.naturalWidth)"
    assert min(chromium.run(images)) > 600


def test_the_csv_keeps_scores_exact(small, tmp_path):
    """A threshold is a score itself; rounded up it would lose its detection."""
    results = json.loads((small / "results.json").read_text())
    results[0]["score"] = float(np.nextafter(0.9, 1))
    (tmp_path / "r.json").write_text(json.dumps(results))
    main([str(tmp_path / "r.json"), "--annotations", str(small / "val.json"), "--output", str(tmp_path / "p.html")])
    with open(tmp_path / "p_thresholds.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["threshold"]) == results[0]["score"]
