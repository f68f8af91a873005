"""Instances keep their identity through augmentation."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image

from lt_det.data import IdentifyingMapper, build_train_mapper
from lt_det.data.mapper import annotation_id
from lt_det.engine import get_lt_det_cfg


@pytest.fixture
def record(tmp_path):
    path = str(tmp_path / "image.png")
    Image.fromarray(np.arange(80 * 100 * 3, dtype=np.uint8).reshape(80, 100, 3)).save(path)

    def annotation(x, category, **fields):
        return {"bbox": [x, 10.0, 12.0, 30.0], "bbox_mode": 1, "category_id": category, **fields}

    annotations = [annotation(5, 3), annotation(30, 1, iscrowd=1), annotation(50, 3), annotation(80, 0)]
    return {"file_name": path, "width": 100, "height": 80, "image_id": 9, "annotations": annotations}


def crop_cfg():
    cfg = get_lt_det_cfg()
    cfg.merge_from_list(["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.6, 0.4], "MODEL.MASK_ON", False])
    return cfg


def test_instances_are_detectron2s_with_ids(record):
    cfg = crop_cfg()
    ids = {x: annotation_id(record["file_name"], i) for i, x in enumerate((5, 30, 50, 80))}
    assert len(set(ids.values())) == 4 and all(0 <= i < 2**63 for i in ids.values())
    seen = set()
    for seed in range(20):
        np.random.seed(seed)
        mine = IdentifyingMapper(cfg, is_train=True)(record)["instances"]
        np.random.seed(seed)
        stock = DatasetMapper(cfg, is_train=True)(record)["instances"]
        assert torch.equal(mine.gt_classes, stock.gt_classes) and torch.equal(
            mine.gt_boxes.tensor, stock.gt_boxes.tensor
        )
        assert mine.gt_ids.dtype == torch.int64 and len(mine.gt_ids) == len(mine)
        for identifier, label in zip(mine.gt_ids.tolist(), mine.gt_classes.tolist()):
            assert {ids[5]: 3, ids[50]: 3, ids[80]: 0}[identifier] == label  # never the crowd's
        seen.add(tuple(mine.gt_ids.tolist()))
    assert {len(s) for s in seen} >= {1, 2}  # crops left some out


def test_the_id_is_the_files_and_the_annotations_own(record):
    assert annotation_id("a.jpg", 1) == annotation_id("a.jpg", 1)
    assert len({annotation_id(f, i) for f in ("a.jpg", "b.jpg") for i in range(50)}) == 100
    record["annotations"] = []
    assert IdentifyingMapper(crop_cfg(), is_train=True)(record)["instances"].gt_ids.shape == (0,)


@pytest.mark.parametrize("library, shrink", [("torch", 24), ("torch", 130), ("cv2", 24), ("cv2", 130)])
def test_other_resizers_differ_by_one_grey_level(record, library, shrink):
    cfg = get_lt_det_cfg()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (shrink,), "INPUT.MAX_SIZE_TRAIN", 400])
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(80), np.arange(100))[:, :, None] + rng.integers(0, 40, (80, 100, 3))
    Image.fromarray(smooth.astype(np.uint8)).save(record["file_name"])
    np.random.seed(3)
    plain = build_train_mapper(cfg, [record])(record)
    cfg.INPUT.RESIZE_WITH = library
    np.random.seed(3)
    mapper = build_train_mapper(cfg, [record])
    other = mapper(record)
    assert plain["image"].shape == other["image"].shape and min(other["image"].shape[1:]) == shrink
    assert torch.equal(plain["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
    difference = (plain["image"].int() - other["image"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < (0.05 if library == "torch" else 0.5)
    if library == "cv2" and shrink < 80:
        assert difference.max() == 0  # PIL's
    assert library in repr(mapper.augmentations)


def test_unknown_resizer(record):
    cfg = get_lt_det_cfg()
    cfg.INPUT.RESIZE_WITH = "opencv"
    with pytest.raises(ValueError, match=r"INPUT.RESIZE_WITH must be one of pil, torch, cv2, got 'opencv'"):
        build_train_mapper(cfg, [record])
