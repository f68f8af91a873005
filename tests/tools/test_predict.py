"""lt-det predict: pictures, json, results that evaluate as the run did; stock checkpoints; DefaultPredictor."""

import json
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from lt_det.cli.predict import find_images, main
from lt_det.engine.predict import Predictor, inference_config, kept
from lt_det.engine.setup import merged_config
from lt_det.evaluation import GroundTruth, evaluate_results
from lt_det.model_zoo import resolve
from lt_det.visualization.objects import GROUP_COLOURS, DrawnObject, draw_objects

NAMES = ["first", "second", "third", "fourth"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_options, repo_dir):
    """A checkpoint as lt_det writes them, of random weights, and the arguments that predict with it. Its data set is
    not here."""
    root = tmp_path_factory.mktemp("model")
    options = [*tiny_model_options, "DATASETS.TRAIN", "('not_here',)", "DATASETS.TEST", "()"]
    config = str(repo_dir / "configs/glyph_balanced_softmax.yaml")
    cfg = inference_config(merged_config(config, options))
    torch.manual_seed(3)
    model = build_model(cfg)
    with torch.no_grad():  # scores that differ
        model.roi_heads.box_predictor.cls_score.weight.mul_(3)
        model.roi_heads.box_predictor.cls_score.bias[2] += 0.5
    torch.save({"model": model.state_dict(), "run": {"thing_classes": NAMES}}, root / "model.pth")
    torch.save({"model": model.state_dict()}, root / "stock.pth")
    return config, [*options, "MODEL.WEIGHTS", str(root / "model.pth")], root


def test_predictions_of_a_folder(trained, tiny_paths, tmp_path, capsys):
    config, options, root = trained
    truth, images = tiny_paths["val"].json_file, tiny_paths["val"].image_root
    content = json.loads(Path(truth).read_text())
    for category, name in zip(content["categories"], NAMES):
        category["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "t.csv").write_text("name,threshold\nfirst,1.0\nsecond,1.0\nthird,0.0\n")
    code = main([
        str(images), "--config-file", config, "--output", str(tmp_path / "out"), "--threshold", "1.0", "--thresholds",
        str(tmp_path / "t.csv"), "--annotations", str(tmp_path / "val.json"), "--statistics", str(truth), *options
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(rows) == 8 and {d["name"] for r in rows for d in r["detections"]} == {"third"}
    frequency = {c["name"]: c["frequency"] for c in content["categories"]}
    assert {d["group"] for r in rows for d in r["detections"]} == {frequency["third"]}
    for row in rows:
        with Image.open(tmp_path / "out" / Path(row["file"]).relative_to(images)) as picture:
            assert max(picture.size) == 480
        for a in row["detections"]:
            assert a["segmentation"]["size"] == [row["height"], row["width"]]
    # All detections, not those that are shown, are the results.
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results) > sum(len(r["detections"]) for r in rows)
    gt = GroundTruth.from_json(tmp_path / "val.json")
    assert evaluate_results(gt, results).num_results == len(results)


def test_all_kinds_of_image_files(trained, tmp_path, capsys, recwarn):
    """Grey, with alpha, of a palette, CMYK, turned by EXIF; what cannot be read is left out and named."""
    config, options, _ = trained
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "below").mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    image.convert("P").save(folder / "below/palette.png")
    image.convert("CMYK").save(folder / "below/cmyk.tif")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    (folder / "cut.png").write_bytes((folder / "grey.png").read_bytes()[:600])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    assert main([str(folder), "--config-file", config, "--output", str(out), *options]) == 1
    assert not recwarn.list, [str(w.message) for w in recwarn]
    captured = capsys.readouterr()
    assert captured.out.startswith("5 images, ")
    told = captured.err[captured.err.index("2 files cannot be read") :].splitlines()
    assert len(told) == 3 and "cut.png: " in told[1] and "empty.jpg: " in told[2]
    rows = {Path(r["file"]).stem: (r["height"], r["width"]) for r in json.loads((out / "predictions.json").read_text())}
    assert rows.pop("turned") == (64, 48) and set(rows.values()) == {(48, 64)} and len(rows) == 4
    assert sorted(p.name for p in out.rglob("*.jpg")) == [
        "alpha.jpg",
        "cmyk.jpg",
        "grey.jpg",
        "palette.jpg",
        "turned.jpg",
    ]
    for name in ("grey.png", "alpha.webp", "turned.jpg"):
        (folder / name).unlink()
    (folder / "below/palette.png").unlink(), (folder / "below/cmyk.tif").unlink()
    assert main([str(folder), "--config-file", config, "--output", str(out), *options]) == 2
    assert "none of 2 files can be read as an image" in capsys.readouterr().err


def test_the_same_as_default_predictor_without_a_data_set(trained, tiny_paths):
    """Names come from the checkpoint; the data set that the config names does not exist."""
    config, options, _ = trained
    cfg = merged_config(config, options)
    ours = Predictor.from_config(cfg)
    assert ours.names == NAMES and ours.groups == [""] * 4 and ours.category_ids == [1, 2, 3, 4]
    theirs = DefaultPredictor(inference_config(cfg))
    image = np.array(Image.open(next(Path(tiny_paths["val"].image_root).rglob("*.jpg"))).convert("RGB"))
    a, b = ours(image), theirs(image[:, :, ::-1])["instances"].to("cpu")
    assert len(a) == len(b) > 0
    assert torch.equal(a.scores, b.scores.sort(descending=True).values)
    order = b.scores.argsort(descending=True, stable=True)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor[order])
    assert torch.equal(a.pred_masks, b.pred_masks[order])


def test_a_stock_checkpoint_takes_names_that_detectron2_knows(trained):
    config, options, root = trained
    stock = [*options, "MODEL.WEIGHTS", str(root / "stock.pth")]
    assert Predictor.from_config(merged_config(config, stock)).names == [f"class {i}" for i in (1, 2, 3, 4)]
    MetadataCatalog.get("predict_known").thing_classes = ["a", "b", "c", "d"]
    known = [*stock, "DATASETS.TRAIN", "('predict_known',)"]
    assert Predictor.from_config(merged_config(config, known)).names == ["a", "b", "c", "d"]


def test_a_stock_detectron2_model_is_predicted_with(tmp_path, tiny_paths, trained):
    """Detectron2's own heads and config keys alone."""
    config, options, _ = trained
    cfg = inference_config(merged_config(config, [*options, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]))
    assert not any("loss" in name for name in build_model(cfg).state_dict())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "d2.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "d2.pth")
    found = Predictor.from_config(cfg)(np.zeros((64, 80, 3), np.uint8))
    assert found.image_size == (64, 80)


def test_a_config_of_detectron2s_zoo_by_name(tiny_model_options, tmp_path, capsys):
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    if not (Path(detectron2.__file__).parent / "model_zoo/configs" / name).is_file():
        pytest.skip("this Detectron2, a source folder on the path, has no configs in its package")
    options = [*tiny_model_options, "MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "cpu"]
    torch.save({"model": build_model(merged_config(resolve(name), options)).state_dict()}, tmp_path / "d2.pth")
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    words = ["--config-file", name, "--output", str(tmp_path / "out"), "--threshold", "0", *options]
    assert main([str(tmp_path / "a.png"), *words, "MODEL.WEIGHTS", str(tmp_path / "d2.pth")]) == 0
    (row,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {d["name"] for d in row["detections"]} <= set(MetadataCatalog.get("coco_2017_val").thing_classes)
    assert row["detections"]


def test_which_are_shown():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 0, 60, 10], [80, 0, 90, 10]])
    scores, classes = torch.tensor([0.5, 0.9, 0.4, 0.2]), torch.tensor([0, 1, 0, 1])
    assert kept(boxes, scores, classes, [0.3, 0.3], 0.5).tolist() == [1, 2]  # the second takes the first's place
    assert kept(boxes, scores, classes, [0.3, 0.3], 1.0).tolist() == [1, 0, 2]
    assert kept(boxes, scores, classes, [0.45, 0.1], 0.95).tolist() == [1, 0, 3]
    none = torch.zeros(0)
    assert kept(none.view(0, 4), none, none.long(), [0.3], 0.5).tolist() == []


def test_colours_are_those_of_the_groups():
    image = np.zeros((40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:30] = True
    picture = np.asarray(draw_objects(image, [DrawnObject((10, 10, 20, 20), "", GROUP_COLOURS["r"], mask)]))
    assert picture.shape == (320, 480, 3)
    inside, edge, outside = picture[160, 160], picture[160, 81], picture[160, 400]
    assert inside[0] > inside[2] > 0 and edge[0] > 200 and not outside.any()


@pytest.mark.parametrize("change, message", [
    ({"images": ["nowhere"]}, "there is no image or folder nowhere"),
    ({"images": ["."]}, "no images"),
    ({"more": ["--thresholds", "t.csv"]}, "no name in the thresholds"),
    ({"more": ["MODEL.WEIGHTS", "none.pth"]}, "none.pth"),
])  # fmt: skip
def test_wrong_input_is_one_line(trained, tmp_path, monkeypatch, capsys, change, message):
    config, options, _ = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("name,threshold\nother,0.5\n")
    Image.new("RGB", (32, 32)).save(tmp_path / ("a.jpg" if change.get("images") != ["."] else "a.txt.none"), "JPEG")
    images = change.get("images", ["a.jpg"])
    more = change.get("more", [])
    code = main([*images, "--config-file", config, "--output", "out", *options, *more])
    assert code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]
    assert len(error) == 1 and message in error[0]


def test_images_that_would_overwrite_each_other(tmp_path):
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="several images would be written as a"):
        find_images([str(tmp_path)])


def test_sahi_loads_it(trained, tiny_paths, tmp_path):
    """sahi's own config reader, on a config that was written by inference_config, with names from the checkpoint."""
    sahi = pytest.importorskip("sahi", reason="sahi is not installed (pip install --no-deps sahi fire)")
    from sahi.predict import get_sliced_prediction

    from lt_det.engine.checkpoint import read_weights

    config, options, root = trained
    cfg = inference_config(merged_config(config, options))
    (tmp_path / "model.yaml").write_text(cfg.dump())
    _, names = read_weights(str(root / "model.pth"))
    model = sahi.AutoDetectionModel.from_pretrained(
        model_type="detectron2", model_path=str(root / "model.pth"), config_path=str(tmp_path / "model.yaml"),
        confidence_threshold=0.01, device="cpu", category_mapping={str(i): name for i, name in enumerate(names)},
    )  # fmt: skip
    image = str(next(Path(tiny_paths["val"].image_root).rglob("*.jpg")))
    result = get_sliced_prediction(image, model, slice_height=48, slice_width=48, verbose=0)
    assert result.object_prediction_list
    assert {p.category.name for p in result.object_prediction_list} <= set(NAMES)
