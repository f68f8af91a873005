"""Real LVIS photographs, by config keys alone: train a few iterations from ImageNet weights, evaluate, evaluate
again."""

import json
import math

from lt_det.engine import argument_parser, main


def test_train_and_evaluate_on_lvis_photographs(shared_dir, repo_dir, tmp_path):
    data = shared_dir / "data/lvis_val_64"
    whole, quarter = data / "lvis_val_64.json", tmp_path / "lvis_val_16.json"
    content = json.loads(whole.read_text())
    content["images"] = content["images"][::4]
    tested = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in tested]
    quarter.write_text(json.dumps(content))
    options = [
        "OUTPUT_DIR", str(tmp_path),
        "DATASETS.REGISTER",
        str([("lvis_val_64", str(whole), f"{data}/images"), ("lvis_val_16", str(quarter), f"{data}/images")]),
        "DATASETS.TRAIN", "('lvis_val_64',)", "DATASETS.TEST", "('lvis_val_16',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", "1230",
        # 142 of the 1230 categories occur here: the prior is that of the real training set.
        "MODEL.LONG_TAIL.STATISTICS", str(shared_dir / "data/lvis_v0.5_train_cat_info.json"),
        "MODEL.WEIGHTS", str(shared_dir / "weights/R-50-imagenet.pkl"),
        # Few, small images and few detections: a test.
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "DECOUPLE.MAX_ITER", "2", "SOLVER.BASE_LR", "0.002",
        "INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "96", "TEST.DETECTIONS_PER_IMAGE", "20",
        "MODEL.RPN.POST_NMS_TOPK_TEST", "50", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64",
        "DECOUPLE.EVAL_STAGE1", "False", "DATALOADER.NUM_WORKERS", "0", "SEED",
        "0",
    ]  # fmt: skip
    config = ["--config-file", str(repo_dir / "configs/lvis_balms.yaml")]
    results = main(argument_parser().parse_args([*config, *options]))
    assert (tmp_path / "model_stage1.pth").is_file() and (tmp_path / "model_final.pth").is_file()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert losses and all(map(math.isfinite, losses))

    written = json.loads((tmp_path / "inference/metrics.json").read_text())
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75", "APr", "APc", "APf"} <= set(written[task])
        assert 0 <= results[task]["AP"] < 100

    again = main(
        argument_parser().parse_args(
            [*config, "--eval-only", *options, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
        )
    )
    assert again["bbox"]["AP"] == results["bbox"]["AP"] and again["segm"]["AP"] == results["segm"]["AP"]
