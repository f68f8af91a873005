"""The mapper gives Detectron2's pixels and instances, which keep their identity through augmentation."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lt_det.data import IdentifyingMapper, build_train_mapper, open_datasets, register_dataset
from lt_det.data.mapper import annotation_id
from lt_det.data.pixels import FastResize, enlarge, read_image
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


@pytest.fixture
def photograph(tmp_path):
    """Writes a JPEG of random smooth content; returns its path."""

    def write(mode="RGB", size=(100, 80), **options):
        rng = np.random.default_rng(0)
        small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        path = str(tmp_path / f"{mode}.jpg")
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
        return path

    return write


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"quality": 60, "progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
def test_reading_equals_detectron2(photograph, mode, options, format):
    path = photograph(mode, **options)
    np.testing.assert_array_equal(read_image(path, format), detection_utils.read_image(path, format=format))


def test_reading_turns_by_exif_and_tells_of_damage(photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photograph(exif=exif)
    turned = read_image(path, "BGR")
    assert turned.shape == (100, 80, 3)
    np.testing.assert_array_equal(turned, detection_utils.read_image(path, format="BGR"))
    data = open(photograph(), "rb").read()
    for name, content in (("cut", data[:-300]), ("none", b""), ("other", data[:40] + b"x" * 200)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError):
            read_image(str(tmp_path / name), "BGR")
    with pytest.raises(FileNotFoundError):
        read_image(str(tmp_path / "absent.jpg"), "BGR")


def test_resized_masks_are_writable():
    """torch makes tensors of them without a copy, and warns of memory that is read only."""
    transform = FastResize(T.ResizeShortestEdge(20, 40)).get_transform(np.zeros((10, 12, 3), np.uint8))
    mask = transform.apply_segmentation(np.eye(10, 12, dtype=np.uint8))
    assert mask.shape == (20, 24) and mask.flags.writeable


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    more=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    bgr=st.booleans(),
    seed=st.integers(0, 99),
)
def test_enlarging_equals_pillow(size, more, bgr, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = image[:, :, ::-1] if bgr else image
    height, width = size[0] + more[0], size[1] + more[1]
    theirs = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(enlarge(image, height, width), theirs)


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"]) and ours["image"].is_contiguous()
    a, b = ours["instances"], theirs["instances"]
    assert a.image_size == b.image_size and torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
    assert torch.equal(a.gt_classes, b.gt_classes)
    if isinstance(a.gt_masks, BitMasks):
        assert torch.equal(a.gt_masks.tensor, b.gt_masks.tensor)
    else:
        assert [[p.tolist() for p in o] for o in a.gt_masks.polygons] == [
            [p.tolist() for p in o] for o in b.gt_masks.polygons
        ]


@pytest.mark.parametrize("side", [30, 80, 130])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("crop", [False, True])
def test_mapper_equals_detectron2(record, photograph, side, mask_format, crop):
    """Polygons of floats, of integers (which Detectron2 keeps as such) and of arrays."""
    record["file_name"] = photograph()
    record["annotations"][0]["segmentation"] = [[5.5, 10, 17, 10, 17, 39.25, 5, 40], [6.0, 11.0, 9.0, 11.0, 9.0, 20.0]]
    record["annotations"][2]["segmentation"] = [[50, 10, 62, 10, 62, 40]]
    record["annotations"][3]["segmentation"] = [np.array([80.0, 10.0, 92.0, 10.0, 92.0, 40.0])]
    cfg = get_lt_det_cfg()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (side,), "INPUT.MAX_SIZE_TRAIN", 400, "MODEL.MASK_ON", True])
    cfg.merge_from_list(["INPUT.MASK_FORMAT", mask_format, "INPUT.CROP.ENABLED", crop])
    before = copy.deepcopy(record)
    for seed in range(6):
        np.random.seed(seed)
        ours = build_train_mapper(cfg, [record])(record)
        np.random.seed(seed)
        equal(ours, DatasetMapper(cfg, is_train=True)(record))
    assert repr(record) == repr(before)


def test_real_photographs_equal_detectron2(shared_dir, clean_catalogs):
    folder = shared_dir / "data" / "lvis_val_64"
    register_dataset("mapper_lvis", folder / "lvis_val_64.json", folder / "images")
    records = open_datasets("mapper_lvis")
    cfg = get_lt_det_cfg()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (640, 672, 800), "INPUT.MAX_SIZE_TRAIN", 1333, "MODEL.MASK_ON", True])
    cfg.DATASETS.TRAIN = ("mapper_lvis",)
    ours, theirs = build_train_mapper(cfg, records), DatasetMapper(cfg, is_train=True)
    for i in range(0, len(records), 4):
        np.random.seed(i)
        mine = ours(records[i])
        np.random.seed(i)
        equal(mine, theirs(records[i]))
