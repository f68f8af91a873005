"""A sweep's rows are those of plain evaluations with that value, while the model runs once."""

import json
import math

import pytest
import torch
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from lt_det.engine import LongTailCheckpointer
from lt_det.engine import calibration_sweep as module
from lt_det.engine.calibration_sweep import calibration_sweep, format_sweep
from lt_det.evaluation import LongTailLVISEvaluator
from lt_det.modeling import CALIBRATOR_REGISTRY, box_predictors, build_calibrator
from lt_det.modeling.roi_predictions import predict_rois

VALUES = (1.0, 0.0, 0.4)
# A trunk that finds something by chance.
WIDE = (
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "64",
)  # fmt: skip
CASCADE = (
    "MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6, 0.7),
)  # fmt: skip


def detector(cfg):
    """A detector that finds something by chance: spread scores, moved anchors, masks that fill most of the box."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for predictor in box_predictors(model):
        torch.nn.init.normal_(predictor.cls_score.weight, std=1.0)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    if model.roi_heads.mask_on:
        torch.nn.init.normal_(model.roi_heads.mask_head.predictor.weight, std=0.1)
        torch.nn.init.constant_(model.roi_heads.mask_head.predictor.bias, 1.0)
    return model


def plain(cfg, model):
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
    return inference_on_dataset(model, loader, LongTailLVISEvaluator(cfg.DATASETS.TEST[0]))


def same(a, b):
    assert a.keys() == b.keys()
    for task in a:
        assert a[task].keys() == b[task].keys()
        for metric, value in a[task].items():
            assert value == b[task][metric] or (math.isnan(value) and math.isnan(b[task][metric])), (task, metric)


@pytest.fixture
def cfg(tiny_cfg):
    def build(*changes):
        return tiny_cfg(
            "DATASETS.TEST", ("tiny_val",), "DECOUPLE.ENABLED", False, "TEST.DETECTIONS_PER_IMAGE", 60,
            *WIDE,
            "MODEL.RPN.POST_NMS_TOPK_TEST", 150,
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
            "Cascade" in str(changes), "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False,
            *changes,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("heads", [(), CASCADE], ids=["standard", "cascade"])
@pytest.mark.parametrize("name", sorted(name for name, _ in CALIBRATOR_REGISTRY))
def test_equals_plain_evaluations(cfg, tmp_path, heads, name):
    moments = ("MODEL.LONG_TAIL.CALIBRATOR.MOMENTS", str(tmp_path / "moments.json")) if name == "LogN" else ()
    cfg = cfg(*heads, *moments)
    model = detector(cfg)
    uncalibrated = plain(cfg, model)
    rows = calibration_sweep(cfg, model, name, VALUES, tmp_path)
    assert [row["value"] for row in rows] == sorted(VALUES)
    assert all(p.calibrator is None for p in box_predictors(model))
    by_value = {row.pop("value"): row for row in rows}
    same(by_value[0.0], dict(uncalibrated))
    assert uncalibrated["segm"]["AP"] > 0
    for predictor in box_predictors(model):
        predictor.set_calibrator(build_calibrator(cfg, name=name, value=0.4))
    same(by_value[0.4], dict(plain(cfg, model)))
    if name != "TauNorm":
        assert by_value[1.0]["bbox"] != by_value[0.0]["bbox"]


def test_runs_the_model_once_and_reuses(cfg, tmp_path, monkeypatch):
    cfg = cfg()
    model = detector(cfg)
    calls = []
    model.backbone.register_forward_hook(lambda *args: calls.append(1))
    # Small parts, so that there are several.
    monkeypatch.setattr(module, "PART_BYTES", 20_000)
    rows = calibration_sweep(cfg, model, "NorCal", VALUES, tmp_path)
    assert len(calls) == 8
    assert len(list((tmp_path / "detections").glob("part-000-*.npz"))) > 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["parameter"] == "gamma" and [r["value"] for r in written["rows"]] == [0.0, 0.4, 1.0]
    assert written["rows"][1]["segm"]["AP"] == rows[1]["segm"]["AP"]

    again = calibration_sweep(cfg, None, "NorCal", VALUES, tmp_path, reuse=True)
    for a, b in zip(again, rows):
        assert a.pop("value") == b.pop("value")
        same(a, b)
    with pytest.raises(ValueError, match="(?s)differs in values.*without --reuse"):
        calibration_sweep(cfg, None, "NorCal", (0.0, 0.3), tmp_path, reuse=True)
    (tmp_path / "detections" / "store.json").unlink()
    with pytest.raises(ValueError, match="no finished run"):
        calibration_sweep(cfg, None, "NorCal", VALUES, tmp_path, reuse=True)


def test_masks_of_unannotated_categories_are_not_stored(cfg, tmp_path):
    cfg = cfg()
    calibration_sweep(cfg, detector(cfg), "NorCal", VALUES, tmp_path)
    evaluator = LongTailLVISEvaluator("tiny_val")
    pairs = kept = 0
    for image in module.DetectionStore(tmp_path / "detections"):
        wanted = evaluator.classes_with_masks(int(image["image_id"][0]))
        assert set(image["classes"][image["mask_index"]]) <= set(wanted)
        pairs, kept = pairs + len(image["classes"]), kept + len(image["masks"])
    assert 0 < kept < pairs


@pytest.mark.parametrize("heads", [(), CASCADE], ids=["standard", "cascade"])
def test_halted_inference_is_the_detectors(cfg, heads):
    cfg = cfg(*heads)
    model = detector(cfg)
    batch = [
        x for _, x in zip(range(3), (one for part in build_detection_test_loader(cfg, "tiny_val") for one in part))
    ]
    with torch.no_grad():
        wanted = model.inference(batch, do_postprocess=False)
    rois = predict_rois(model, batch)
    found = rois.add_masks(rois.detections()[0])
    for a, b in zip(found, wanted):
        assert len(a) == len(b) > 0
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes) and torch.equal(a.pred_masks, b.pred_masks)
    with pytest.raises(ValueError, match="eval()"):
        predict_rois(model.train(), batch)


def test_boxes_only(cfg, tmp_path):
    cfg = cfg("MODEL.MASK_ON", False)
    rows = calibration_sweep(cfg, detector(cfg), "NorCal", (0.0, 0.5), tmp_path)
    assert "segm" not in rows[0]
    table = format_sweep(rows, "gamma").splitlines()
    assert "gamma" in table[0] and "bbox APr" in table[0] and "mask" not in table[0] and len(table) == 4
    assert sum("*" in line for line in table) == 1


def test_bad_arguments(cfg, tmp_path):
    with pytest.raises(ValueError, match="no values"):
        calibration_sweep(cfg(), None, "NorCal", (), tmp_path)
    with pytest.raises(ValueError, match="must be finite and not negative"):
        calibration_sweep(cfg(), None, "NorCal", (-1.0,), tmp_path)
    with pytest.raises(ValueError, match="DATASETS.TEST must name one"):
        calibration_sweep(cfg("DATASETS.TEST", ()), None, "NorCal", (1.0,), tmp_path)


def test_tool(cfg, tiny_options, repo_dir, load_script, tmp_path, capsys):
    built = cfg()
    LongTailCheckpointer(detector(built), str(tmp_path)).save("model")
    tool = load_script("tools/sweep_calibration.py")
    args = tool.parse([
        "--config-file", str(repo_dir / "configs/glyph_softmax.yaml"), "--values", "0", "1", *tiny_options,
        *WIDE, "DATASETS.TEST", "('tiny_val',)",
        "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False",
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "False",
    ])  # fmt: skip
    assert args.values == [0.0, 1.0] and args.calibrator == "LogitAdjustment"
    with pytest.raises(SystemExit):
        tool.parse(["--values", "all"])
    rows = tool.main(args)
    assert [row["value"] for row in rows] == [0.0, 1.0]
    assert "mask APr" in capsys.readouterr().out
    assert (tmp_path / "out/calibration_LogitAdjustment/sweep.json").is_file()
    assert MetadataCatalog.get("tiny_val").json_file
