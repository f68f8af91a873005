"""Copy-paste: pixels, masks, boxes and federated fields of what is pasted and of what is under it."""

import pickle

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import detection_utils
from PIL import Image

from lt_det.config import get_lt_det_cfg
from lt_det.data import CopyPaste, CopyPasteMapper, DatasetRecords, build_train_mapper, open_datasets, register_dataset
from lt_det.data.mapper import annotation_id


def square(x, y, side):
    return [[float(v) for v in (x, y, x + side, y, x + side, y + side, x, y + side)]]


def thing(x, y, side, category, **fields):
    box = [float(x), float(y), float(side), float(side)]
    return {"bbox": box, "bbox_mode": 1, "category_id": category, "segmentation": square(x, y, side), **fields}


@pytest.fixture
def records(tmp_path):
    """Two images: a dark one with three objects of class 0, and a light one with a white object of class 1."""
    Image.new("RGB", (40, 30), (10, 10, 10)).save(tmp_path / "dark.png")
    light = np.full((30, 40, 3), 100, np.uint8)
    light[5:15, 10:20] = 255
    Image.fromarray(light).save(tmp_path / "light.png")

    def record(name, image_id, annotations, negative):
        return {
            "file_name": str(tmp_path / f"{name}.png"), "image_id": image_id, "width": 40, "height": 30,
            "neg_category_ids": negative, "not_exhaustive_category_ids": [], "annotations": annotations,
        }  # fmt: skip

    dark = [thing(0, 0, 8, 0), thing(20, 10, 10, 0), thing(2, 20, 6, 0)]
    return [record("dark", 1, dark, [3]), record("light", 2, [thing(10, 5, 10, 1)], [1])]


def bitmask(obj):
    segmentation = obj["segmentation"]
    if isinstance(segmentation, list):
        return detection_utils.polygons_to_bitmask([np.asarray(p) for p in segmentation], 30, 40)
    return mask_util.decode(segmentation).astype(bool)


def only_class_1(paste):
    paste._total = np.array([0.0, 1.0])
    return paste


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_pasted_pixels_and_masks_agree(records, seed, rle):
    if rle:
        for record in records:
            for obj in record["annotations"]:
                obj["segmentation"] = mask_util.encode(np.asfortranarray(bitmask(obj).astype(np.uint8)))
    paste = only_class_1(CopyPaste(records, probability=1, num_objects=2))
    np.random.seed(seed)
    before = detection_utils.read_image(records[0]["file_name"], format="BGR")
    record = {**records[0]}
    kept = [dict(obj) for obj in records[0]["annotations"]]
    image = paste(before, record, "BGR")
    assert (before == 10).all() and records[0]["annotations"] == kept  # what was given is left as it was
    white = (image == 255).all(2)
    pasted = [obj for obj in record["annotations"] if obj["category_id"] == 1]
    old = [obj for obj in record["annotations"] if obj["category_id"] == 0]
    assert 1 <= len(pasted) <= 2 and white.any()
    assert ((image == 10).all(2) | white).all()  # nothing but the object's own pixels came along
    # Masks tell the pixels: the pasted ones are white, the others' are not.
    np.testing.assert_array_equal(np.logical_or.reduce([bitmask(obj) for obj in pasted]), white)
    for obj in old:
        assert not (bitmask(obj) & white).any()
    for obj in record["annotations"]:
        mask = bitmask(obj)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        if obj["bbox_mode"] == 1:
            x, y, w, h = obj["bbox"]
            assert [x, y, x + w, y + h] == tight
        else:
            assert obj["bbox"] == tight
    # Objects of which less than a tenth is left are gone; of others all that is not covered is there.
    seen = [bitmask(obj) for obj in kept]
    left = [mask & ~white for mask in seen if (mask & ~white).sum() >= 0.1 * mask.sum() and (mask & ~white).any()]
    assert len(left) == len(old) and all((a == bitmask(b)).all() for a, b in zip(left, old))


def test_ids_of_pasted_objects_are_those_of_what_they_copy(records):
    record = {**records[0]}
    only_class_1(CopyPaste(records, probability=1))(
        detection_utils.read_image(record["file_name"], format="BGR"), record, "BGR"
    )
    pasted = [obj for obj in record["annotations"] if obj["category_id"] == 1]
    assert {obj["gt_id"] for obj in pasted} == {annotation_id(records[1]["file_name"], 0)}


@pytest.mark.parametrize(
    "negative, incomplete, annotated, expected",
    [
        ([2, 5], [], (0,), ([5], [])),  # its absence was verified: the pasted one is all there is
        ([5], [], (0, 1), ([5], [])),  # its instances were annotated
        ([5], [], (0,), ([5], [2])),  # nobody looked for it: there may be others
        ([5], [2], (0,), ([5], [2])),
    ],
)
def test_federated_fields(records, negative, incomplete, annotated, expected):
    record = {
        **records[0],
        "neg_category_ids": negative,
        "not_exhaustive_category_ids": incomplete,
        "annotations": [thing(5 * i, 5, 4, c) for i, c in enumerate(annotated)],
    }
    paste = only_class_1(CopyPaste(records, probability=1, num_objects=3))
    paste(detection_utils.read_image(record["file_name"], format="BGR"), record, "BGR")
    assert (record["neg_category_ids"], record["not_exhaustive_category_ids"]) == expected


def test_classes_are_drawn_by_their_weight(records):
    records = [{"annotations": [thing(0, 0, 9, 0)] * 90}, {"annotations": [thing(0, 0, 9, 2)] * 10}]
    np.random.seed(0)
    for power, share in ((1.0, 0.5), (0.0, 0.1), (0.5, 10**0.5 / (90**0.5 + 10**0.5))):
        paste = CopyPaste(records, class_power=power)
        draws = [paste.draw() for _ in range(4000)]
        assert abs(np.mean([image == 1 for image, _ in draws]) - share) < 4 * (share * (1 - share) / 4000) ** 0.5
        assert {index for image, index in draws if image == 1} == set(range(10))


def test_crowds_are_never_pasted(records):
    records[1]["annotations"][0]["iscrowd"] = 1
    paste = CopyPaste(records)
    assert {paste.draw()[0] for _ in range(50)} == {0}
    for record in records:
        for obj in record["annotations"]:
            obj["iscrowd"] = 1
    with pytest.raises(ValueError, match="no objects to paste"):
        CopyPaste(records)


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(probability=1.5), "PROB"),
        (dict(min_visible=-0.1), "MIN_VISIBLE"),
        (dict(num_objects=0), "NUM_OBJECTS"),
        (dict(scale=(2.0, 1.0)), "SCALE"),
        (dict(scale=(0.0, 1.0)), "SCALE"),
    ],
)
def test_options_out_of_range(records, options, name):
    with pytest.raises(ValueError, match=rf"INPUT.COPY_PASTE.*{name}"):
        CopyPaste(records, **options)


def test_mapper_from_a_config(tiny_paths, clean_catalogs):
    """On glyph data: every instance's mask and box agree, the same numbers give the same image, other processes too."""
    register_dataset("copy_paste_tiny", tiny_paths["train"].json_file, tiny_paths["train"].image_root)
    cfg = get_lt_det_cfg()
    cfg.merge_from_list([
        "DATASETS.TRAIN", ("copy_paste_tiny",), "MODEL.MASK_ON", True, "INPUT.MIN_SIZE_TRAIN", (64,),
        "INPUT.COPY_PASTE.ENABLED", True, "INPUT.COPY_PASTE.PROB", 1.0,
    ])  # fmt: skip
    records = open_datasets("copy_paste_tiny")
    mapper = build_train_mapper(cfg, records)
    assert isinstance(mapper, CopyPasteMapper)
    again = pickle.loads(pickle.dumps(mapper))
    more, formats = 0, set()
    for i in range(len(records)):
        samples = []
        for m in (mapper, again):
            np.random.seed(i)
            samples.append(m(records[i]))
        instances = samples[0]["instances"]
        assert (samples[0]["image"] == samples[1]["image"]).all()
        assert (instances.gt_boxes.tensor == samples[1]["instances"].gt_boxes.tensor).all()
        formats.add(type(instances.gt_masks).__name__)
        tight = instances.gt_masks.get_bounding_boxes().tensor
        assert (instances.gt_boxes.tensor - tight).abs().max() <= 2.0
        more += len(instances) - len(records[i]["annotations"])
    assert more > 0 and "BitMasks" in formats


def test_keypoints_are_refused(records):
    cfg = get_lt_det_cfg()
    cfg.INPUT.COPY_PASTE.ENABLED = True
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match="INPUT.COPY_PASTE.ENABLED does not work with MODEL.KEYPOINT_ON"):
        build_train_mapper(cfg, DatasetRecords([records]))
